"""What `shoal prune` would do and what would come of it, in words and numbers, within seconds and without weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from shoal.artifacts.plan import PruningPlan
from shoal.formatting import aligned, bytes_text, layers_text
from shoal.machine import free_disk
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import Shard
from shoal.models.cost import Cost, decode_bytes, model_cost, prefill_flops
from shoal.models.load import loaded_dtype, without_data

from .changes.change import Change
from .gguf.patterns import misreading
from .layer_sizes import stored_bytes, usual_length
from .surgery.cut_model import refuse_changed_layers
from .surgery.narrow_config import student_config
from .surgery.proof import memory_shortage, why_not_run
from .surgery.quantised import without_quantization
from .surgery.teacher import Teacher, read_teacher


@dataclass(frozen=True)
class _Side:
    """Teacher or student."""

    cost: Cost
    stored_bytes: int
    """Of the tensors in its files."""
    bytes_per_parameter: float
    """In memory when it runs; of quantised weights as they are stored, on average."""


def estimate(
    teacher_folder: Path,
    plan: PruningPlan,
    out: Path,
    *,
    dtype: str = "stored",
    changes: Sequence[Change] = (),
    trust_remote_code: bool = False,
) -> tuple[str, int]:
    """What apply_plan would write to ``out``, for a reader, and the bytes of it. Nothing is written and no weight is
    read.

    Raises:
        UserError: what apply_plan would refuse by configuration and headers.
    """
    teacher = sized = read_teacher(teacher_folder, trust_remote_code=trust_remote_code)
    for change in changes:
        sized = change.sizes(sized, plan)
    config, shards = teacher.config, teacher.shards
    runs_in = loaded_dtype(config, dtype, shards)
    student = student_config(sized.config, plan.keep)
    teacher_model = without_data(without_quantization(config)[0], dtype=runs_in)
    models = teacher_model, without_data(student, dtype=runs_in)
    sides = _sides(teacher, sized, plan, models, bytes_per_weight=runs_in.itemsize)
    length = usual_length(config)
    parts = (
        ["dry run: nothing is written"],
        _about(teacher_folder, config, plan, runs_in),
        _table(sides, length),
        _expectation(sides, length),
        [
            *([f"llama.cpp: would run another model: {problem}"] if (problem := misreading(student)) else []),
            _space(out, sides[1].stored_bytes),
            *(change.words(teacher_model, plan) for change in changes),
            f"proof: {_proof(config, shards, in_float32=any(change.IS_ROUNDED for change in changes))}",
        ],
    )
    return "\n\n".join("\n".join(part) for part in parts), sides[1].stored_bytes


def _sides(
    teacher: Teacher,
    sized: Teacher,
    plan: PruningPlan,
    models: tuple[PreTrainedModel, PreTrainedModel],
    *,
    bytes_per_weight: int,
) -> tuple[_Side, _Side]:
    """Teacher and student, whose ``models`` hold no data; ``sized`` is the teacher with its changes, and
    ``bytes_per_weight`` what a weight takes that is not quantised.

    Raises:
        UserError: layers that the cut would change.
    """
    stored, costs = _num_bytes(teacher.shards), (model_cost(models[0]), model_cost(models[1]))
    changed = models[0] if sized is teacher else without_data(without_quantization(sized.config)[0])
    refuse_changed_layers(changed, models[1], plan.keep)
    by_layer = stored_bytes(sized.shards, changed)
    if by_layer is None:  # then the student is saved as transformers names and merges its tensors
        written = stored * costs[1].num_parameters // costs[0].num_parameters
    else:
        written = by_layer.of(plan.keep)
    is_quantised = without_quantization(teacher.config)[1]
    each = stored / costs[0].num_parameters if is_quantised else bytes_per_weight
    return _Side(costs[0], stored, each), _Side(costs[1], written, each)


def _num_bytes(shards: Sequence[Shard]) -> int:
    return sum(tensor.end - tensor.start for shard in shards for tensor in shard.tensors.values())


def _about(folder: Path, config: Any, plan: PruningPlan, dtype: torch.dtype) -> list[str]:
    name = str(dtype).removeprefix("torch.")
    return [
        f"teacher: {folder} ({text_config(config).model_type}, {plan.num_layers} layers, {name})",
        f"drops:   {layers_text(plan.drop) or 'none'}",
        f"keeps:   {layers_text(plan.keep)}",
        f"why:     {plan.reason}",
        *(f"changes: {change.words}" for change in plan.changes),
    ]


def _table(sides: tuple[_Side, _Side], length: int) -> list[str]:
    rows = list(_rows(sides, length))
    cells = [("", "before", "after", "ratio")]
    for title, values, text in rows:
        before, after = values
        cells.append((title, text(before), text(after), f"{after / before:.3f}" if before else ""))
    return aligned(cells)


def _rows(sides: tuple[_Side, _Side], length: int) -> Iterator[tuple[str, tuple[float, float], Any]]:
    """(title, before and after, how a value is written)."""
    costs = (sides[0].cost, sides[1].cost)
    for title, field in (
        ("layers", "num_layers"),
        ("parameters", "num_parameters"),
        ("parameters read per token", "active_parameters"),
    ):
        yield title, (getattr(costs[0], field), getattr(costs[1], field)), "{:,}".format
    yield "weights on disk", (sides[0].stored_bytes, sides[1].stored_bytes), bytes_text
    if costs[0].cache is None or costs[1].cache is None:
        return
    for window in sorted({slot.max_tokens or 0 for slot in costs[0].cache if slot.token_bytes}):
        title = f"cache per token, up to {window:,} tokens" if window else "cache per token"
        yield (
            title,
            _per_side(costs, lambda slot, kept=window: slot.token_bytes * ((slot.max_tokens or 0) == kept)),
            bytes_text,
        )
    if any(slot.state_bytes for slot in costs[0].cache):
        yield "states per sequence, any length", _per_side(costs, lambda slot: slot.state_bytes), bytes_text
    yield f"cache of {length:,} tokens", (costs[0].cache_bytes(length), costs[1].cache_bytes(length)), bytes_text


def _per_side(costs: tuple[Cost, Cost], value: Any) -> tuple[int, int]:
    before, after = (sum(value(slot) for slot in cost.cache or ()) for cost in costs)
    return before, after


def _expectation(sides: tuple[_Side, _Side], length: int) -> list[str]:
    read = [decode_bytes(side.cost, bytes_per_parameter=side.bytes_per_parameter, num_tokens=length) for side in sides]
    work = [prefill_flops(side.cost, length) for side in sides]
    unknown = any(side.cost.cache is None for side in sides)
    reads = "reading weights" if unknown else "reading weights and cache"
    return [
        "expected, not measured:",
        f"  decode  {read[0] / read[1]:.2f} x as fast, one sequence behind {length:,} tokens, if {reads} "
        f"takes all the time ({bytes_text(read[0])} a token, then {bytes_text(read[1])})",
        f"  prefill {work[0] / work[1]:.2f} x as fast, {length:,} tokens, if multiplications take all the time "
        f"({work[0] / 1e12:.4g} TFLOP, then {work[1] / 1e12:.4g})",
        *(["  the cache of this family cannot be told without running it, so it is left out"] if unknown else []),
    ]


def _space(out: Path, needed: int) -> str:
    free = free_disk(out)
    line = f"disk: {bytes_text(needed)} needed for {out}, {bytes_text(free)} free there"
    return line if needed <= free else f"{line}: NOT ENOUGH, free some space or set run_dir to another disk"


def _proof(config: Any, shards: Sequence[Shard], *, in_float32: bool) -> str:
    by_files = "by its files, and the kind and settings of every layer"
    if reason := why_not_run(config, shards):
        return f"{by_files}; it cannot be run here: {reason}"
    if shortage := memory_shortage(shards, in_float32=in_float32):
        return f"{by_files}; {shortage}"
    return f"{by_files}, and by running teacher and student on the same input"
