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
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.artifacts.artifact import PruningPlan, differences
from shoal.atomic_files import write_json, written_folder
from shoal.data.packing import PackedRows
from shoal.errors import UserError, explained_disk_errors
from shoal.lr_schedule import warmup_cosine
from shoal.models.anatomy import state_of, with_state
from shoal.models.load import decoder_layers, load_config, load_model
from shoal.progress import each
from shoal.recipe.distill import Distill, LocalHeal
from shoal.recipe.section import as_dict
from shoal.runtime import barrier, device, is_main, rank, world_size

from ..engine.arguments import autocast_dtype
from ..objective.capture import capturing
from ..objective.host_batch import queued
from ..objective.layer_losses import Tokens, distances
from ..objective.objective import final_hidden
from .frozen import finished_state, save_finished
from .trainable import Trained, keep_zeros, shares_prefix

log = logging.getLogger(__name__)

FINAL_RATE = 0.1
"""Of the peak learning rate."""
MAX_GRADIENT_NORM = 1.0
SAVES = 8
"""How often a whole training is saved; a kill loses no more than this part of it."""
STATE_FILE = "state.pt"


@dataclass(frozen=True)
class Gap:
    """One place where teacher layers are missing."""

    layer: int
    """The student's layer that is trained: the last before the gap, or the first layer where nothing is before it."""
    target: int
    """The teacher's layer whose output it shall give."""


def gaps(keep: Sequence[int], num_layers: int) -> tuple[Gap, ...]:
    """The gaps that a plan leaves, from the bottom up; ``keep`` are the teacher's layers that stay.

    A gap at the very bottom has no layer before it: the first kept one learns to work on embeddings.
    """
    found = [Gap(0, keep[0])] if keep[0] > 0 else []
    ends = [*keep[1:], num_layers]
    for layer, (kept, following) in enumerate(zip(keep, ends, strict=True)):
        if following > kept + 1:
            if found and found[-1].layer == layer:
                found.pop()
            found.append(Gap(layer, following - 1))
    return tuple(found)


def unhealed(shared: int, plan: PruningPlan, settings: Distill) -> int:
    """How many of the ``shared`` lowest layers are still the teacher's after the local stage, if there is one, which
    trains the layer before the first gap."""
    healed = () if settings.local is None else gaps(plan.keep, plan.num_layers)
    return min([shared, *(gap.layer for gap in healed[:1])])


def recorded_layers(trained: Trained, plan: PruningPlan, settings: Distill) -> int:
    """How many of the lowest layers ``distill.teacher.prefix`` spares both models.

    Raises:
        UserError: none.
    """
    if found := unhealed(shares_prefix(trained, plan), plan, settings):
        return found
    raise UserError(
        f"distill.teacher.prefix: with trainable {settings.trainable}"
        f"{'' if settings.local is None else ' after a local stage'} no layer at the bottom stays the teacher's (the "
        f"first change is at layer {plan.first_change}); choose from_first_cut and a plan that leaves the first "
        "layers, or leave it out"
    )


@dataclass(frozen=True)
class LocalResult:
    """Relative squared error of the student's state behind every gap, by trained layer, first and last tenth."""

    before: dict[int, float]
    after: dict[int, float]


def local_stage(
    teacher_dir: Path,
    student_dir: Path,
    plan: PruningPlan,
    rows: PackedRows,
    settings: Distill,
    *,
    folder: Path,
    inputs: dict[str, Any],
    dtype: str,
    load: dict[str, Any],
) -> Path:
    """The folder of the student with healed gaps, a plain checkpoint; made here where it is missing or another run's.

    Every rank calls this, before DeepSpeed has to do with the models: each holds both of them whole.
    """
    assert settings.local is not None
    healed, told = folder / "student", folder / "local.json"
    keys = ("model", "student", "prune.drop", "dtype", "attention", "distill.teacher")
    # no loss scaling here, without which float16 loses small gradients: what trains in it later heals in float32
    autocast = autocast_dtype(settings) == torch.bfloat16
    identity = {key: inputs[key] for key in keys}
    identity |= {"rows": rows.fingerprint, "autocast": autocast, "distill.local": as_dict(settings.local)}
    if told.is_file() and not differences(identity, json.loads(told.read_text())["inputs"]):
        log.info("local: done already, %s", healed)
        return healed
    student = load_model(student_dir, dtype="float32", device=device(), **load)
    teacher = load_model(teacher_dir, dtype=settings.teacher.dtype or dtype, device=device(), **load)
    num_steps = math.ceil(settings.local.num_tokens / (settings.sequence_length * settings.local.batch_size))
    if settings.local.num_tokens > rows.input_ids_NS.numel():
        wanted, there = settings.local.num_tokens, rows.input_ids_NS.numel()
        log.info(
            "distill.local.num_tokens: %d are more than the %d of distill.num_tokens, which it takes", wanted, there
        )
    result = heal_locally(
        student,
        teacher.requires_grad_(False),
        rows,
        settings.local,
        num_steps=num_steps,
        keep=plan.keep,
        num_layers=plan.num_layers,
        autocast=autocast,
        folder=folder,
        inputs=identity,
    )
    if is_main():
        stored = getattr(torch, str(load_config(student_dir).dtype or "float32").removeprefix("torch."))
        state = {name: w for name, w in student.state_dict().items() if name not in student.all_tied_weights_keys}
        with written_folder(healed) as unfinished:
            copy_all_but_weights(student_dir, unfinished)
            save_finished(student, finished_state(student, state, student_dir, dtype=stored), unfinished, dtype=stored)
        write_json(told, {"inputs": identity, "before": result.before, "after": result.after})
        (folder / STATE_FILE).unlink(missing_ok=True)
    barrier()
    return healed


def heal_locally(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: PackedRows,
    settings: LocalHeal,
    *,
    num_steps: int,
    keep: Sequence[int],
    num_layers: int,
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
    places = gaps(keep, num_layers)
    if not places:
        raise UserError("distill.local: this plan leaves no gap between layers; leave it out")
    if settings.batch_size % world_size():
        raise UserError(
            f"distill.local.batch_size: {settings.batch_size} rows cannot be shared by {world_size()} ranks; "
            "choose a multiple"
        )
    layers = decoder_layers(student)
    student.requires_grad_(False)
    trained = {place.layer: layers[place.layer].requires_grad_(True) for place in places}
    keep_zeros(student)
    optimizer = torch.optim.AdamW(
        [p for layer in trained.values() for p in layer.parameters()],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    num_steps = min(num_steps, len(rows) // settings.batch_size)
    if num_steps == 0:
        raise UserError(
            f"distill.local.batch_size: {settings.batch_size} rows are more than the {len(rows)} that there are; lower "
            "it or raise distill.num_tokens"
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, num_steps, final=FINAL_RATE)
    )
    errors: list[list[float]] = []
    progress = _Progress(folder / STATE_FILE, inputs, trained, optimizer, schedule, errors)
    start = progress.restore()
    was_training = student.training
    student.eval()  # the target has no dropout
    began = time.monotonic()
    for step in each(range(start, num_steps), "local", unit="steps"):
        errors.append(_step(student, teacher, rows, places, step, settings, autocast=autocast))
        if not all(map(math.isfinite, errors[-1])):
            raise UserError(
                f"distill.local: step {step + 1}: the states are not finite any more; lower distill.local.learning_rate"
            )
        for layer in trained.values():  # each gap is a problem of its own, so each has a norm of its own
            nn.utils.clip_grad_norm_(layer.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, num_steps // SAVES) == 0 and step + 1 < num_steps:
            progress.save(step + 1)
        if is_main() and (step + 1) % max(1, num_steps // 10) == 0:
            speed = (step + 1 - start) * settings.batch_size * rows.input_ids_NS.shape[1] / (time.monotonic() - began)
            told = ", ".join(f"{place.layer}: {e:.4f}" for place, e in zip(places, errors[-1], strict=True))
            log.info("local: step %d of %d, error by layer %s, %.0f tokens/s", step + 1, num_steps, told, speed)
    student.train(was_training)
    tenth = max(1, len(errors) // 10)
    return LocalResult(
        *({p.layer: e for p, e in zip(places, _mean(part), strict=True)} for part in (errors[:tenth], errors[-tenth:]))
    )


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
    mine = range(step * settings.batch_size + rank(), (step + 1) * settings.batch_size, world_size())
    sums = torch.zeros(len(places) + 1, dtype=torch.float64, device=device())
    for first in range(0, len(mine), settings.rows_at_once):
        batch = [rows[index] for index in mine[first : first + settings.rows_at_once]]
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
    gradients = [p.grad for place in places for p in decoder_layers(student)[place.layer].parameters()]
    if dist.is_initialized():
        dist.all_reduce(sums)
        for gradient in gradients:
            if gradient is not None:
                dist.all_reduce(gradient)
    num_tokens = sums[-1].clamp_min(1)  # rows may hold nothing to learn but what follows a document's first token
    for gradient in gradients:
        if gradient is not None:
            gradient.div_(num_tokens.to(gradient.dtype))
    return (sums[:-1] / num_tokens).tolist()


@contextmanager
def _learning(
    student: PreTrainedModel, places: Sequence[Gap], targets: dict[int, Tensor], tokens: Tokens, sums: Tensor
) -> Iterator[None]:
    """While the student runs, forward and backward of every trained layer happen where it is called."""
    layers = decoder_layers(student)
    wrapped = []
    try:
        for index, place in enumerate(places):
            layer = layers[place.layer]
            layer.forward = _learner(layer.forward, targets[place.target], tokens, sums, index)
            wrapped.append(layer)
        yield
    finally:
        for layer in wrapped:
            del layer.forward


def _learner(
    forward: Callable[..., Any], target_BSD: Tensor, tokens: Tokens, sums: Tensor, index: int
) -> Callable[..., Any]:
    def learn(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            output = forward(*args, **kwargs)
            state_BSD = state_of(output)
            ours_ND, theirs_ND = tokens.of_states(state_BSD).float(), tokens.of_states(target_BSD).float()
            error = distances(ours_ND, theirs_ND, "mse").sum()
        error.backward()
        sums[index] += error.detach()
        return with_state(output, state_BSD.detach())

    return learn


class _Progress:
    """Weights, optimizer, schedule and errors on disk, written by rank 0 under a temporary name."""

    def __init__(
        self,
        file: Path,
        inputs: dict[str, Any],
        trained: dict[int, nn.Module],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        errors: list[list[float]],
    ) -> None:
        self._file, self._inputs = file, inputs
        self._trained, self._optimizer, self._schedule, self._errors = trained, optimizer, schedule, errors

    def save(self, step: int) -> None:
        if not is_main():
            return
        state = {
            "inputs": self._inputs,
            "step": step,
            "layers": {layer: module.state_dict() for layer, module in self._trained.items()},
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "errors": self._errors,
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
        if found := differences(self._inputs, state["inputs"]):
            log.warning("local: starts again, because %s", found[0])
            return 0
        for layer, module in self._trained.items():
            module.load_state_dict(state["layers"][layer])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._errors.extend(state["errors"])
        log.info("local: going on from step %d", state["step"])
        return state["step"]


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def copy_all_but_weights(source: Path, folder: Path) -> None:
    """Tokenizer, chat templates, licence and notices as they came with the model, byte for byte."""
    for beside in source.iterdir():
        ours = beside.suffix in (".safetensors", ".py") or beside.name in ("config.json", "generation_config.json")
        if beside.is_dir():
            shutil.copytree(beside, folder / beside.name, dirs_exist_ok=True)
        elif not ours and not beside.name.endswith(".index.json"):
            shutil.copy2(beside, folder / beside.name)
