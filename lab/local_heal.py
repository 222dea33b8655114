"""Heal every gap on its own, on hidden states, before the student is trained: no graph from end to end.

B batch, S sequence, D hidden.

Teacher and student run side by side, without gradient. Only where the student comes to a gap is one layer run with
gradient: the last one before the gap, which learns to give the state that the teacher has behind it. Its input is the
student's own state, so that a layer also makes up for what the healed gaps below it have left. What is kept in memory
beside the two models is the gradient and Adam state of one layer per gap, and the activations of one layer.

This is the objective of LLM-Streamline (Chen et al. 2024, arXiv:2403.19135) for a layer that is already there, at every
gap in one pass over the text. The healed student is then trained as the recipe says, into lab/local_heal.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal import runtime
from shoal.artifacts.identity import Identity
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.launch.verbs.distill import training_inputs, training_spec
from shoal.launch.verbs.prune import read_plan
from shoal.launch.verbs.run import Run
from shoal.models.anatomy import decoder_layers, state_of, with_state
from shoal.models.load import Checkpoint
from shoal.progress import each
from shoal.recipe.section import Above0, Positive, Section
from shoal.runtime import device
from shoal.train.distill import distill, rows_of
from shoal.train.objective.host_batch import queued
from shoal.train.objective.layer_losses import Tokens, capturing, distances
from shoal.train.objective.objective import final_hidden
from shoal.train.student.frozen import write_student
from shoal.train.student.spec import Ranks, TrainSpec

log = logging.getLogger(__name__)

WARMUP_SHARE = 0.05
FINAL_RATE = 0.1
"""Share of the peak learning rate that is left at the end."""
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Settings(Section):
    """How gaps are healed."""

    num_tokens: Positive = 50_000
    """Tokens, of the rows that training starts with; rounded up to whole steps."""
    learning_rate: Above0 = 2e-4
    """Largest learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    """Weight decay of AdamW."""
    batch_size: Positive = 8
    """Rows per step."""
    rows_at_once: Positive = 4
    """Rows per forward."""


@dataclass(frozen=True)
class Gap:
    """One place where teacher layers are missing."""

    layer: int
    """Student layer that is trained to close it: the last before the gap, or the first where nothing is before it."""
    target: int
    """Teacher layer whose output the trained layer shall give."""
    scale: float = 1.0
    """How many times larger that output is than what the trained layer shall give: factors of compensation."""


def work(run: Run, settings: Settings) -> str:
    """Heal the gaps of the run's student, train it on, and say how far each gap has closed."""
    spec, inputs = described(run, "local_heal", settings)
    folder = run.dir / "lab" / "local_heal"
    places = gaps(spec.plan)
    told = []
    if not (folder / "distilled" / "config.json").is_file():
        errors = heal(spec, settings, run.dir / "text", inputs, folder / "student")
        lines = zip(places, errors, strict=True)
        told = [f"layer {gap.layer}: error {before:.4f} to {after:.4f}" for gap, (before, after) in lines]
    healed = Checkpoint.read(folder / "student", spec.teacher.load)
    # a healed layer is the teacher's no more, even where training freezes it
    shared = min(spec.shared_layers, places[0].layer)
    spec = dataclasses.replace(spec, student=healed, shared_layers=shared)
    return "\n".join([*told, train(run, spec, inputs, folder)])


def gaps(plan: Plan) -> tuple[Gap, ...]:
    """The gaps that ``plan`` leaves, from the bottom up.

    A gap at the very bottom has no layer before it: the first kept one learns to work on embeddings.
    """
    keep = plan.keep
    closed = [Gap(0, keep[0])] if keep[0] > 0 else []
    for layer, (kept, following) in enumerate(zip(keep, [*keep[1:], plan.num_layers], strict=True)):
        if following > kept + 1:
            if closed and closed[-1].layer == layer:
                closed.pop()
            closed.append(Gap(layer, following - 1))
    return tuple(dataclasses.replace(gap, scale=plan.state_scale(gap.target)) for gap in closed)


def heal(
    spec: TrainSpec, settings: Settings, text: Path, inputs: dict[str, Any], folder: Path
) -> list[tuple[float, float]]:
    """Write the student with healed gaps into ``folder``; relative squared errors of its state behind every gap, in the
    first and the last tenth of the steps. ``text`` is the folder of the rows.

    Raises:
        UserError: as heal_gaps does.
    """
    rows = rows_of(spec, spec.teacher.tokenizer(), text, inputs)
    # no loss scaling here, without which float16 loses small gradients: what trains in it later heals in float32
    autocast = spec.deepspeed.product_dtype == torch.bfloat16
    autocast = autocast or spec.teacher.load.attention == "flash"  # whose kernels take no float32
    student = spec.student.model(dtype="float32", device=device())
    teacher = spec.teacher.model(dtype=spec.live_dtype, device=device()).requires_grad_(False)
    errors = heal_gaps(student, teacher, rows, settings, gaps(spec.plan), autocast=autocast)
    state = {name: w for name, w in student.state_dict().items() if name not in student.all_tied_weights_keys}
    write_student(student, state, spec.student, folder)
    return errors


def heal_gaps(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: PackedRows,
    settings: Settings,
    places: Sequence[Gap],
    *,
    autocast: bool,
) -> list[tuple[float, float]]:
    """Train the layers before all gaps of ``student``, with float32 weights, in place; errors as ``heal`` gives them.

    Raises:
        UserError: no gap to heal, too few rows for a step, an error that is not finite.
    """
    if not places:
        raise UserError("shoal lab local_heal: this plan leaves no gap between layers")
    if settings.batch_size > len(rows):
        raise UserError(
            f"batch_size: {settings.batch_size} rows are more than the {len(rows)} that there are; lower it"
        )
    wanted = math.ceil(settings.num_tokens / (rows.input_ids_NS.shape[1] * settings.batch_size))
    num_steps = min(wanted, len(rows) // settings.batch_size)
    layers = decoder_layers(student)
    student.requires_grad_(False)
    trained = [layers[place.layer].requires_grad_(True) for place in places]
    optimizer = torch.optim.AdamW(
        [parameter for layer in trained for parameter in layer.parameters()],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, num_steps, final=FINAL_RATE)
    )
    was_training, history = student.training, list[list[float]]()
    student.eval()  # the target has no dropout
    for step in each(range(num_steps), "local", unit="steps"):
        history.append(_step(student, teacher, rows, places, step, settings, autocast))
        if not all(map(math.isfinite, history[-1])):
            raise UserError(f"step {step + 1}: the states are not finite any more; lower learning_rate")
        for layer in trained:  # each gap is a problem of its own, so each has a norm of its own
            nn.utils.clip_grad_norm_(layer.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    student.train(was_training)
    tenth = max(1, num_steps // 10)
    parts = (history[:tenth], history[-tenth:])
    means = ([sum(errors) / tenth for errors in zip(*part, strict=True)] for part in parts)
    return list(zip(*means, strict=True))


def _step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: PackedRows,
    places: Sequence[Gap],
    step: int,
    settings: Settings,
    autocast: bool,
) -> list[float]:
    """Gradients of one step, and the mean relative error behind every gap."""
    own_rows = range(step * settings.batch_size, (step + 1) * settings.batch_size)
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
    num_tokens = sums[-1].clamp_min(1)  # rows may hold nothing to learn but what follows a document's first token
    for place in places:
        for parameter in decoder_layers(student)[place.layer].parameters():
            if parameter.grad is not None:
                parameter.grad.div_(num_tokens.to(parameter.grad.dtype))
    return (sums[:-1] / num_tokens).tolist()


@contextmanager
def _learning(
    student: PreTrainedModel, places: Sequence[Gap], targets: dict[int, Tensor], tokens: Tokens, sums: Tensor
) -> Iterator[None]:
    """While the student runs, forward and backward of every trained layer happen where it is called."""

    def learn(forward: Callable[..., Any], place: Gap, total: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            output = forward(*args, **kwargs)
            state_BSD = state_of(output)
            ours_ND, theirs_ND = (tokens.of_states(state).float() for state in (state_BSD, targets[place.target]))
            error = distances(ours_ND * place.scale, theirs_ND, "mse").sum()
        error.backward()
        total.add_(error.detach())
        return with_state(output, state_BSD.detach())

    with ExitStack() as stack:
        for index, place in enumerate(places):
            layer = decoder_layers(student)[place.layer]
            layer.forward = partial(learn, layer.forward, place, sums[index])
            stack.callback(delattr, layer, "forward")
        yield


def described(run: Run, part: str, settings: Any) -> tuple[TrainSpec, dict[str, Any]]:
    """The training of the run's student, on this process alone, and its identity with the ``settings`` of ``part``."""
    plan = read_plan(run)
    runtime.set_up_distributed(run.recipe.distill.ddp_timeout)
    spec = training_spec(run, plan, Ranks.here())
    spec = dataclasses.replace(spec, settings=dataclasses.replace(spec.settings, watch=None))
    return spec, {**training_inputs(run, plan), f"lab.{part}": dataclasses.asdict(settings)}


def train(run: Run, spec: TrainSpec, inputs: dict[str, Any], folder: Path) -> str:
    """Train into ``folder``, unless that is done; what to say of it."""
    file = folder / Training.FILE
    if not Identity(Training, file, inputs, "lab").is_done():
        runtime.seed_everything(run.recipe.seed)
        distill(spec, run_dir=folder, home=run.dir, inputs=inputs, start_tracking=lambda: None)
    runtime.leave_distributed()
    training = Training.load(file)
    losses = [row["loss"] for row in training.history if "loss" in row]
    return (
        f"{folder / 'distilled'}: trained on {training.num_tokens:,} tokens, loss {losses[0]:.4f} to {losses[-1]:.4f}; "
        f"`shoal compare {run.dir} {folder / 'distilled'}` scores it beside the run"
    )


def warmup_cosine(step: int, num_steps: int, *, final: float) -> float:
    """Share of the peak rate at ``step``, from 0: a linear warm-up, then half a cosine down to the share ``final``."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
