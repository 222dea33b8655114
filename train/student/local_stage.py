"""Heal every gap on its own, on hidden states: no graph from end to end, so it fits where training does not.

B batch, S sequence, D hidden.

Teacher and student run side by side, without gradient. Only where the student comes to a gap is one layer run with
gradient: the last one before the gap, which learns to give the state that the teacher has behind it. Its input is the
student's own state, so that a layer also makes up for what the healed gaps below it have left. What is kept in memory
beside the two models is the gradient and Adam state of one layer per gap, and the activations of one layer.

This is the objective of LLM-Streamline (Chen et al. 2024, arXiv:2403.19135) for a layer that is already there, at every
gap in one pass over the text.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.artifacts.artifact import differences
from shoal.atomic_files import write_json
from shoal.data.packing import PackedRows
from shoal.errors import UserError, explained_disk_errors
from shoal.lr_schedule import warmup_cosine
from shoal.models.anatomy import decoder_layers, state_of, with_state
from shoal.progress import each
from shoal.recipe.distill import Distill, LocalHeal
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import Shapes, shaping_keys
from shoal.runtime import barrier, device, is_main, rank, world_size

from ..objective.capture import capturing
from ..objective.host_batch import queued
from ..objective.layer_losses import Tokens, distances
from ..objective.objective import final_hidden
from .frozen import write_student
from .spec import TrainSpec
from .trainable import Gap, gaps, keep_zeros

log = logging.getLogger(__name__)

FINAL_RATE = 0.1
"""Share of the peak learning rate that is left at the end."""
MAX_GRADIENT_NORM = 1.0
SAVES = 8
"""Saves of a whole stage; a kill loses no more than one part in so many."""
STATE_FILE = "state.pt"


@dataclass(frozen=True)
class LocalResult:
    """Relative squared error of the student's state behind every gap, by trained layer, first and last tenth."""

    before: dict[int, float]
    after: dict[int, float]
    num_tokens: int
    seconds: float = field(compare=False)
    """Of the steps; after a stop, of those since."""


def local_stage(spec: TrainSpec, rows: PackedRows, *, folder: Path, inputs: dict[str, Any]) -> Path:
    """The folder of the student with healed gaps, a plain checkpoint; made here where it is missing or another run's.

    Every rank calls this, before DeepSpeed has to do with the models: each holds both of them whole. ``inputs`` is the
    identity of the training.

    Raises:
        UserError: as heal_locally does.
    """
    settings = spec.settings.local
    assert settings is not None
    healed, story = folder / "student", folder / "local.json"
    settings_keys = [*shaping_keys(Recipe, Shapes.LOCAL), *shaping_keys(Distill, Shapes.LOCAL, "distill.")]
    # no loss scaling here, without which float16 loses small gradients: what trains in it later heals in float32
    autocast = spec.deepspeed.autocast_dtype == torch.bfloat16 or spec.settings.weights == "bfloat16"
    autocast = autocast or spec.teacher.load.attention == "flash"  # whose kernels take no float32
    identity = {key: inputs[key] for key in ("model", "student", "prune.drop", *settings_keys)}
    identity |= {"rows": rows.fingerprint, "autocast": autocast}
    if story.is_file() and not differences(identity, json.loads(story.read_bytes())["inputs"]):
        log.info("local: done already, %s", healed)
        return healed
    student = spec.student.model(dtype="float32", device=device())
    teacher = spec.teacher.model(dtype=spec.settings.teacher.dtype, device=device())
    if settings.num_tokens > rows.input_ids_NS.numel():
        log.info(
            "distill.local.num_tokens: %d are more than the %d of distill.num_tokens, which it takes",
            settings.num_tokens,
            rows.input_ids_NS.numel(),
        )
    result = heal_locally(
        student,
        teacher.requires_grad_(False),
        rows,
        settings,
        [replace(gap, scale=spec.plan.state_scale(gap.target)) for gap in gaps(spec.plan.keep, spec.plan.num_layers)],
        autocast=autocast,
        folder=folder,
        inputs=identity,
    )
    if is_main():
        state = {name: w for name, w in student.state_dict().items() if name not in student.all_tied_weights_keys}
        write_student(student, state, spec.student, healed)
        write_json(story, {"inputs": identity, **asdict(result)})
        (folder / STATE_FILE).unlink(missing_ok=True)
    barrier()
    return healed


def heal_locally(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: PackedRows,
    settings: LocalHeal,
    places: Sequence[Gap],
    *,
    autocast: bool,
    folder: Path,
    inputs: dict[str, Any],
) -> LocalResult:
    """Train the layers before all gaps of ``student`` in place; every rank calls this, with float32 student weights.

    Each step takes the next ``settings.batch_size`` rows over all ranks. Progress is kept in ``folder``, so that the
    same call goes on after a kill and ends with the same weights.

    Raises:
        UserError: no gap to heal, a batch that ranks cannot share, an error that is not finite.
    """
    num_steps = _num_steps(rows, settings, places)
    layers = decoder_layers(student)
    student.requires_grad_(False)
    trained = {place.layer: layers[place.layer].requires_grad_(True) for place in places}
    keep_zeros(student)
    progress = _Progress(folder / STATE_FILE, inputs, trained, settings, num_steps)
    start = progress.restore()
    was_training = student.training
    student.eval()  # the target has no dropout
    began = time.monotonic()
    for step in each(range(start, num_steps), "local", unit="steps"):
        errors = _step(student, teacher, rows, places, step, settings, autocast=autocast)
        if not all(map(math.isfinite, errors)):
            raise UserError(
                f"distill.local: step {step + 1}: the states are not finite any more; lower distill.local.learning_rate"
            )
        progress.step(errors)
        if (step + 1) % max(1, num_steps // SAVES) == 0 and step + 1 < num_steps:
            progress.save(step + 1)
        if is_main() and (step + 1) % max(1, num_steps // 10) == 0:
            speed = (step + 1 - start) * settings.batch_size * rows.input_ids_NS.shape[1] / (time.monotonic() - began)
            by_layer = ", ".join(f"{place.layer}: {e:.4f}" for place, e in zip(places, errors, strict=True))
            log.info("local: step %d of %d, error by layer %s, %.0f tokens/s", step + 1, num_steps, by_layer, speed)
    student.train(was_training)
    tenth = max(1, num_steps // 10)
    before, after = (
        {place.layer: error for place, error in zip(places, _mean(part), strict=True)}
        for part in (progress.errors[:tenth], progress.errors[-tenth:])
    )
    num_tokens = num_steps * settings.batch_size * rows.input_ids_NS.shape[1]
    return LocalResult(before, after, num_tokens, time.monotonic() - began)


def _num_steps(rows: PackedRows, settings: LocalHeal, places: Sequence[Gap]) -> int:
    """Steps of the token budget, as far as there are rows.

    Raises:
        UserError: no gap to heal, or a batch that ranks cannot share or that there are too few rows for.
    """
    if not places:
        raise UserError("distill.local: this plan leaves no gap between layers; leave it out")
    if settings.batch_size % world_size():
        raise UserError(
            f"distill.local.batch_size: {settings.batch_size} rows cannot be shared by {world_size()} ranks; "
            "choose a multiple"
        )
    if settings.batch_size > len(rows):
        raise UserError(
            f"distill.local.batch_size: {settings.batch_size} rows are more than the {len(rows)} that there are; lower "
            "it or raise distill.num_tokens"
        )
    wanted = math.ceil(settings.num_tokens / (rows.input_ids_NS.shape[1] * settings.batch_size))
    return min(wanted, len(rows) // settings.batch_size)


def _step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: PackedRows,
    places: Sequence[Gap],
    step: int,
    settings: LocalHeal,
    *,
    autocast: bool,
) -> list[float]:
    """Gradients of one step over all ranks, and the mean relative error behind every gap."""
    own_rows = range(step * settings.batch_size + rank(), (step + 1) * settings.batch_size, world_size())
    # every gap's sum of errors over tokens, and last the number of these tokens
    sums = torch.zeros(len(places) + 1, dtype=torch.float64, device=device())
    for first in range(0, len(own_rows), settings.rows_at_once):
        batch = [rows[index] for index in own_rows[first : first + settings.rows_at_once]]
        ids, positions, labels = (
            torch.stack([row[name] for row in batch]) for name in ("input_ids", "position_ids", "labels")
        )
        tokens = Tokens.of(labels, positions, device())
        ids, positions = queued(ids, device()), queued(positions, device())
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=autocast):
            with capturing(teacher, {place.target for place in places}) as seen:
                final_hidden(teacher, ids, positions)
            with _learning(student, places, seen.states, tokens, sums):
                final_hidden(student, ids, positions)
        sums[-1] += len(tokens.counted)
    parameters = [p for place in places for p in decoder_layers(student)[place.layer].parameters()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if dist.is_initialized():
        dist.all_reduce(sums)
        for gradient in gradients:
            dist.all_reduce(gradient)
    num_tokens = sums[-1].clamp_min(1)  # rows may hold nothing to learn but what follows a document's first token
    for gradient in gradients:
        gradient.div_(num_tokens.to(gradient.dtype))
    return (sums[:-1] / num_tokens).tolist()


@contextmanager
def _learning(
    student: PreTrainedModel, places: Sequence[Gap], targets: dict[int, Tensor], tokens: Tokens, sums: Tensor
) -> Iterator[None]:
    """While the student runs, forward and backward of every trained layer happen where it is called."""
    layers = decoder_layers(student)
    with ExitStack() as stack:
        for index, place in enumerate(places):
            layer = layers[place.layer]
            layer.forward = _learner(layer.forward, targets[place.target], place.scale, tokens, sums, index)
            stack.callback(delattr, layer, "forward")
        yield


def _learner(
    forward: Callable[..., Any], target_BSD: Tensor, scale: float, tokens: Tokens, sums: Tensor, index: int
) -> Callable[..., Any]:
    def learn(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            output = forward(*args, **kwargs)
            state_BSD = state_of(output)
            ours_ND, theirs_ND = tokens.of_states(state_BSD).float() * scale, tokens.of_states(target_BSD).float()
            error = distances(ours_ND, theirs_ND, "mse").sum()
        error.backward()
        sums[index] += error.detach()
        return with_state(output, state_BSD.detach())

    return learn


class _Progress:
    """Optimizer, schedule and the errors of all steps; on disk too, with the trained layers, so that a kill costs
    little: written by rank 0 under a temporary name."""

    def __init__(
        self, file: Path, inputs: dict[str, Any], trained: dict[int, nn.Module], settings: LocalHeal, num_steps: int
    ) -> None:
        self.errors: list[list[float]] = []
        self._file, self._inputs, self._trained = file, inputs, trained
        self._optimizer = torch.optim.AdamW(
            [p for layer in trained.values() for p in layer.parameters()],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: warmup_cosine(step, num_steps, final=FINAL_RATE)
        )

    def step(self, errors: list[float]) -> None:
        """Let the trained layers follow their gradients; ``errors`` are those of this step, by gap."""
        self.errors.append(errors)
        for layer in self._trained.values():  # each gap is a problem of its own, so each has a norm of its own
            nn.utils.clip_grad_norm_(layer.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()

    def save(self, step: int) -> None:
        """Write what ``restore`` goes on from after ``step`` steps."""
        if not is_main():
            return
        state = {
            "inputs": self._inputs,
            "step": step,
            "layers": {layer: module.state_dict() for layer, module in self._trained.items()},
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "errors": self.errors,
        }
        temporary = self._file.with_name(f".{self._file.name}.tmp")
        with explained_disk_errors(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, temporary)
            temporary.rename(self._file)

    def restore(self) -> int:
        """The step to go on from."""
        if not self._file.is_file():
            return 0
        state = torch.load(self._file, map_location=device(), weights_only=True)
        if other := differences(self._inputs, state["inputs"]):
            log.warning("local: starts again, because %s", other[0])
            return 0
        for layer, module in self._trained.items():
            module.load_state_dict(state["layers"][layer])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.errors.extend(state["errors"])
        log.info("local: going on from step %d", state["step"])
        return state["step"]


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
