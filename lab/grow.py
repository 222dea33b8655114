"""Put new layers between those of a model, which makes it deeper (LESA, Yang et al. 2025, arXiv:2502.13794).

A new layer is of the kind of the one below it: the configuration says of it what it says of that one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.artifacts.plan import PlannedChange
from shoal.compress.edits.tensors import check_run, layer_tensors, put_tensors
from shoal.compress.surgery.cut_model import cut_model, kept_layers
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.launch.verbs.run import Run
from shoal.models.anatomy import called_on, decoder_layers, state_of
from shoal.recipe.section import Section

from .edits.between import mean_of_layers, predicted_layers
from .edits.student import Edited, loaded_teacher, write_student
from .edits.zeroing import zero_half


@dataclass(frozen=True)
class Settings(Section):
    """Where new layers come, and what they begin as."""

    after: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Layers, counted from 0, after each of which a new one of its kind comes."""
    init: Literal["zero", "copy", "mean", "lesa"] = "zero"
    """Weights of a new layer. zero: those of the layer below it, with attention and MLP writing nothing, so that the
    student is the teacher bit for bit until it is trained; copy: those of the layer below; mean: of the layers on both
    sides; lesa: what LESA predicts from the layers on both sides."""


def work(run: Run, settings: Settings) -> str:
    """student/ and plan.json: the run's model with more layers."""
    teacher, after = loaded_teacher(run), tuple(sorted({*settings.after}))
    new = new_layers(teacher, after, settings.init, seed=run.recipe.seed)
    student, keep = cut_model(teacher, (), insert=after, share=True), kept_layers(run.num_layers, (), after)
    for layer, tensors in new.items():
        put_tensors(decoder_layers(student)[keep.index(layer) + 1], tensors, where=f"new layer after {layer}")
    writes = settings.init != "zero"
    if not writes:  # training starts from these zeros, so it is not told to keep them
        places = [keep.index(layer) + 1 for layer in after]
        for half in ("attention", "mlp"):
            zero_half(half, student, places)
    words = f"{len(after)} new layer{'s' if len(after) > 1 else ''} after {layers_text(after)} ({settings.init})"
    edited = Edited(
        student,
        PlannedChange("grow", words),
        partial(inserted_in_place, teacher, new if writes else {}),
        keep=keep,
        use_cache=not writes,
    )
    return write_student(run, "grow", settings, edited, teacher, {})


def new_layers(
    model: PreTrainedModel, after: Sequence[int], init: str, *, seed: int
) -> dict[int, Mapping[str, Tensor]]:
    """Every parameter and stored buffer of each new layer, by the layer of ``model`` that it comes after. Of `zero` it
    is a copy, which the student then silences. ``seed`` is for `lesa`.

    Raises:
        UserError: a layer that shares parameters with others; for `mean` and `lesa` no layer above, one that holds
            other tensors, or none that a prediction could be learnt from.
    """
    for layer in after:
        check_run(model, layer, 1)
        if init in ("mean", "lesa") and layer + 1 == len(decoder_layers(model)):
            raise UserError(f"grow: layer {layer} is the last, and {init} needs one on both sides; choose zero or copy")
    pairs = [(layer, layer + 1) for layer in after]
    if init == "lesa":
        return dict(zip(after, predicted_layers(model, pairs, seed=seed), strict=True))
    if init == "mean":
        return {pair[0]: mean_of_layers(model, pair) for pair in pairs}
    return {layer: {name: tensor.clone() for name, tensor in layer_tensors(model, layer).items()} for layer in after}


@contextmanager
def inserted_in_place(model: PreTrainedModel, layers: Mapping[int, Mapping[str, Tensor]]) -> Iterator[PreTrainedModel]:
    """``model`` running a new layer with the given tensors after each named one, until the block ends.

    A new layer is called as the one before it was, with that one's output. It has no slot in a cache, so that ``model``
    runs without one.
    """
    with ExitStack() as stack:
        for layer, tensors in layers.items():
            before = decoder_layers(model)[layer]
            new = copy.deepcopy(before)
            put_tensors(new, tensors, where=f"new layer after {layer}")
            stack.callback(before.register_forward_hook(partial(_run_after, new), with_kwargs=True).remove)
        yield model


def _run_after(new: nn.Module, _: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
    return called_on(new, args, kwargs, state_of(output))
