"""Train one layer to stand for a run of neighbours (LLM-Streamline, Chen et al. 2024, arXiv:2403.19135).

N rows, B batch, S sequence, D hidden.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.compress.edits.tensors import check_run, layer_tensors
from shoal.data.packing import PackedRows
from shoal.data.sources import load_texts, sources_fingerprint
from shoal.data.streams import pack
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.launch.verbs.run import Run, check_length
from shoal.models.anatomy import called_on, decoder_body, decoder_layers, given_state, state_of, watched
from shoal.models.document_masks import documents_apart
from shoal.progress import each
from shoal.recipe.section import Data, Positive, RowLength, Shapes, TextSource, shaping
from shoal.runtime import device

from .grow import mean_of_layers, predicted_layers
from .merge import OfARun, one_for_a_run
from .student import loaded_teacher, write_student

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 16
"""One row in sixteen, and at least one, is kept for the errors that are reported."""
WARMUP_SHARE = 0.05
FINAL_RATE = 0.25
"""Of the peak: 2e-4 falls to 5e-5 in the authors' code, from which the weight decay is too."""
WEIGHT_DECAY = 1e-3
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Settings(OfARun):
    """Which layers become one, and how that one is trained; its target is the state after the run."""

    data: Data = field(default_factory=lambda: (TextSource("python_docs"),))
    """Text that it is trained on."""
    num_tokens: Positive = 50_000
    """Tokens of it."""
    sequence_length: RowLength = 512
    """Tokens of a row."""
    batch_size: Positive = 4
    """Rows per step."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Largest learning rate of AdamW."""
    init: Literal["first", "mean", "lesa"] = "first"
    """What training starts from: the run's first layer, the mean of its layers, or what LESA (arXiv:2502.13794)
    predicts from the layers right below and right above the run."""


def work(run: Run, settings: Settings) -> str:
    """student/ and plan.json: the run's model with one trained layer in the place of several."""
    check_length(run, settings.sequence_length, "sequence_length")
    seed, tokens = run.recipe.seed, settings.num_tokens
    texts = [(source, load_texts(source, max_characters=16 * tokens)) for source in settings.data]
    rows = pack(texts, run.tokenizer(), sequence_length=settings.sequence_length, num_tokens=tokens, seed=seed)
    teacher: Any = loaded_teacher(run)
    home = teacher.device
    trained = train_replacement(teacher.to(device()), settings, rows, seed=seed)
    teacher.to(home)
    tensors = {name: tensor.to(home) for name, tensor in trained.tensors.items()}
    start = "" if settings.init == "first" else f" (started from {settings.init})"
    words = f"layers {layers_text(settings.layers)} replaced by one trained layer{start}"
    edited = one_for_a_run(teacher, settings.layers, tensors, "replace", words)
    read = {"data": sources_fingerprint(settings.data), **shaping(run.recipe, Shapes.PLAN)}
    return write_student(run, "replace", settings, edited, teacher, read)


@dataclass(frozen=True)
class TrainedLayer:
    """A layer that stands for a run, and how well it does so on rows it was not trained on.

    Errors are E |f(h) - h'|^2 / E |h - h'|^2, h before the run and h' after it: 1 is what dropping the run costs.
    """

    tensors: dict[str, Tensor]
    """Its parameters and stored buffers by their names in the layer, in the dtypes of the run's first layer."""
    initial_error: float
    """Of what training started from: by default the run's first layer as it is."""
    error: float
    """Of the trained layer, rounded to the dtypes it is saved in."""


def train_replacement(teacher: PreTrainedModel, settings: Settings, rows: PackedRows, *, seed: int) -> TrainedLayer:
    """One layer in the place of the first of ``settings.layers``, trained to give the state after the last of them.

    The objective is that of LLM-Streamline (Chen et al. 2024, arXiv:2403.19135): min E |f(h) - h'|^2 over all tokens, h
    before the run and h' after it as the layers have them, never behind the final norm. The layer gets the input, kind
    and place of the run's first, and by default starts as it, as theirs does: of the whole run only that layer's
    weights were made for this input. Other starts are the mean of the run's layers, and what LESA predicts from the
    layers beside the run (``settings.init``). The mean is divided by what dropping the run costs on the held-out rows:
    a constant, so that errors of different runs compare and their gradients are clipped alike.

    Every batch runs through the teacher up to the end of the run, without gradient, then forward and backward through
    the one layer; no state is stored. Weights and Adam's moments are float32, under bfloat16 autocast where the teacher
    has 16 bits. Dropout is off, since the target has none. Each row is used once, in a seeded order. On a CPU equal
    seeds give equal bits.

    The other layers of the run may be of other kinds than the first: only the state they leave counts.

    Raises:
        UserError: a run outside the model, a first layer that cannot get tensors of its own, a start that cannot be
            calculated, less than two rows, states that are not finite, a run that changes nothing, a training that
            diverges.
    """
    first, last = settings.layers[0], settings.layers[-1]
    check_run(teacher, first, last - first + 1)
    stored = layer_tensors(teacher, first)
    start = _start(teacher, settings, seed=seed)
    train, held_out = _split(rows, settings.batch_size, seed=seed)
    run = _Run(teacher, rows, first, last)
    unit = run.mean_squared_error(None, held_out)
    if not 0 < unit < math.inf:
        raise UserError(
            f"{run}: change nothing in any state, or overflow in {teacher.dtype} (mean square of the change {unit}); "
            "drop them, or set dtype: float32 in the recipe"
        )
    layer = copy.deepcopy(decoder_layers(teacher)[first]).float().requires_grad_(True).eval()
    layer.load_state_dict(start)
    initial_error = run.mean_squared_error(layer, held_out) / unit
    began = f"{first} alone" if settings.init == "first" else f"its start, {settings.init},"
    log.info("%s by one: error of %s %.4f, of none 1", run, began, initial_error)
    _fit(layer, run, train, learning_rate=settings.learning_rate, unit=unit)
    tensors = {name: tensor.to(stored[name].dtype) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(tensors)
    error = run.mean_squared_error(layer, held_out) / unit
    if not math.isfinite(error):
        raise UserError(
            f"{run}: the trained layer is not finite any more; lower learning_rate (now {settings.learning_rate:g})"
        )
    log.info("%s by one: error %.4f on held-out rows", run, error)
    if error >= min(1, initial_error):
        log.warning(
            "%s: the trained layer is no better than %s; raise num_tokens or change learning_rate",
            run,
            "none" if initial_error >= 1 else f"layer {first} as it is" if settings.init == "first" else "its start",
        )
    return TrainedLayer(tensors, initial_error, error)


def _start(teacher: PreTrainedModel, settings: Settings, *, seed: int) -> Mapping[str, Tensor]:
    first, last = settings.layers[0], settings.layers[-1]
    if settings.init == "mean":
        return mean_of_layers(teacher, settings.layers)
    if settings.init == "lesa":
        return predicted_layers(teacher, [(first - 1, last + 1)], seed=seed)[0]
    return layer_tensors(teacher, first)


class _RunEnds(Exception):
    """Ends the teacher's forward after the run; carries the state there."""


@dataclass(frozen=True)
class _Run:
    """The layers ``first`` to ``last`` of a teacher, at work on rows."""

    teacher: PreTrainedModel
    rows: PackedRows
    first: int
    last: int

    def __str__(self) -> str:
        return f"replace: layers {self.first}..{self.last}"

    @torch.no_grad()
    def observe(self, batch: Tensor) -> tuple[Tensor, Callable[[nn.Module, Tensor], Tensor], Tensor]:
        """Of rows ``batch`` the state before the run, what calls a layer in the place of its first with another state,
        mask, positions and all else as they were, and the state after the run."""
        layers, device = decoder_layers(self.teacher), self.teacher.device
        calls: list[tuple[Tensor, Callable[[nn.Module, Tensor], Tensor]]] = []

        def remember(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            again = lambda layer, hidden_BSD: state_of(called_on(layer, args, kwargs, hidden_BSD))  # noqa: E731
            calls.append((given_state(args, kwargs).clone(), again))  # some layers add to their input in place

        def end(_: int, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> None:
            raise _RunEnds(state_of(output))

        positions_BS = self.rows.position_ids_NS[batch].to(device)
        ids_BS = self.rows.input_ids_NS[batch].to(device)
        try:
            with (
                watched([layers[self.first]], before=remember),
                watched([layers[self.last]], after=end),
                documents_apart(decoder_body(self.teacher), positions_BS),
            ):
                self.teacher(input_ids=ids_BS, position_ids=positions_BS, use_cache=False)
        except _RunEnds as ended:
            return *calls[0], ended.args[0]
        raise AssertionError(f"layer {self.last} was not called")

    def squared_errors(self, layer: nn.Module | None, batch: Tensor) -> Tensor:
        """(f(h) - h')^2 of every element in float32; without a layer f(h) is h."""
        hidden_BSD, again, target_BSD = self.observe(batch)
        hidden_BSD = hidden_BSD.float()
        if layer is not None:
            with torch.autocast(hidden_BSD.device.type, torch.bfloat16, enabled=self.teacher.dtype.itemsize == 2):
                hidden_BSD = again(layer, hidden_BSD)
        return (hidden_BSD.float() - target_BSD.to(hidden_BSD.device).float()).square()

    @torch.no_grad()
    def mean_squared_error(self, layer: nn.Module | None, batches: Sequence[Tensor]) -> float:
        """E (f(h) - h')^2 over all elements of the rows in ``batches``."""
        errors = [self.squared_errors(layer, batch) for batch in batches]
        return sum(error.sum(dtype=torch.float64).item() for error in errors) / sum(error.numel() for error in errors)


def _split(rows: PackedRows, batch_size: int, *, seed: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Batches of row indices to train on and to test on."""
    num_held_out = max(1, len(rows) // HELD_OUT_SHARE)
    if len(rows) <= num_held_out:
        raise UserError(
            f"replace: {len(rows)} rows of {rows.input_ids_NS.shape[1]} tokens, but one is needed to train on and one "
            "to test on; raise num_tokens or lower sequence_length"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return order[num_held_out:].split(batch_size), order[:num_held_out].split(batch_size)


def _fit(layer: nn.Module, run: _Run, batches: Sequence[Tensor], *, learning_rate: float, unit: float) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, len(batches), final=FINAL_RATE)
    )
    often = max(1, len(batches) // 10)
    for step, batch in enumerate(each(batches, f"{run} by one", unit="steps"), start=1):
        loss = run.squared_errors(layer, batch).mean() / unit
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % often == 0:
            log.info("%s: step %d of %d, error %.4f", run, step, len(batches), loss.item())


def warmup_cosine(step: int, num_steps: int, *, final: float) -> float:
    """Share of the peak rate at ``step``, from 0: a linear warm-up, then half a cosine down to the share ``final``."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
