"""Put new layers between those of a model.

A new layer is of the kind of the one below it: the configuration says of it what it says of that one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import called_on, decoder_layers, state_of
from shoal.recipe.edits import Insert

from .lesa import predicted_layers, refuse_without_examples
from .merging import layer_tensors, mean_of_layers, put_tensors, refuse_different_shapes, refuse_shared_parameters


def refuse_impossible_insertion(model: PreTrainedModel, edit: Insert) -> None:
    """Refuse new layers that the shapes of ``model``, which may be without weights, show to be impossible.

    Raises:
        UserError: a layer that shares parameters with others; for `mean` and `lesa` no layer above, one that holds
            other tensors, or none that a prediction could be learnt from.
    """
    for layer in edit.after:
        refuse_shared_parameters(model, layer)
        if edit.init in ("zero", "copy"):
            continue
        if layer + 1 == len(decoder_layers(model)):
            raise UserError(
                f"insert after {layer}: is the last layer, and {edit.init} needs one on both sides; choose init: "
                "zero or copy"
            )
        refuse_different_shapes(model, (layer, layer + 1))
        if edit.init == "lesa":
            refuse_without_examples(model, layer)


def new_layers(model: PreTrainedModel, edit: Insert, *, seed: int) -> dict[int, Mapping[str, Tensor]]:
    """Every parameter and stored buffer of each new layer, by the layer of ``model`` that it comes after.

    Of `zero` it is a copy, which the student then silences. ``seed`` is for `lesa`.

    Raises:
        UserError: as refuse_impossible_insertion does; tensors that differ and are not of floating point.
    """
    refuse_impossible_insertion(model, edit)
    if edit.init == "lesa":
        pairs = [(layer, layer + 1) for layer in edit.after]
        return dict(zip(edit.after, predicted_layers(model, pairs, seed=seed), strict=True))
    if edit.init == "mean":
        return {layer: mean_of_layers(model, (layer, layer + 1)) for layer in edit.after}
    return {
        layer: {name: tensor.clone() for name, tensor in layer_tensors(model, layer).items()} for layer in edit.after
    }


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
