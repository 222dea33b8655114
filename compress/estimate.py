"""What a cut would make of a teacher, by its configuration and the headers of its files; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shoal.artifacts.plan import Plan
from shoal.formatting import aligned, bytes_text, layers_text, paragraphs
from shoal.machine import disk_line
from shoal.models.anatomy import text_config
from shoal.models.cost import Cost, decode_bytes, model_cost
from shoal.models.load import loaded_dtype, num_parameters, without_data
from shoal.recipe.measure import Measure

from .apply import num_tokens_of
from .changes.change import Change
from .gguf import misreading
from .layer_sizes import stored_bytes, usual_length
from .surgery.cut_model import refuse_changed_layers
from .surgery.narrow_config import student_config
from .surgery.proof import memory_shortage, why_not_run
from .surgery.quantised import without_quantization
from .surgery.teacher import Teacher, read_teacher


def cut_estimate(
    folder: Path,
    plan: Plan,
    out: Path,
    *,
    dtype: str = "stored",
    changes: Sequence[Change] = (),
    text: Measure | None = None,
    trust_remote_code: bool = False,
) -> tuple[str, int]:
    """What apply_plan would make of the teacher in ``folder`` and write to ``out``, for a reader, and the bytes of it;
    no weight is read. ``text``: what changes are decided on.

    Raises:
        UserError: what apply_plan would refuse by configuration and headers.
    """
    teacher = sized = read_teacher(folder, trust_remote_code=trust_remote_code)
    for change in changes:
        sized = change.sizes(sized, plan)
    plain, is_quantised = without_quantization(teacher.config)
    runs_in = loaded_dtype(teacher.config, dtype, teacher.shards)
    config = student_config(sized.config, plan.keep)
    models = without_data(plain, dtype=runs_in), without_data(config, dtype=runs_in)
    costs = model_cost(models[0]), model_cost(models[1])
    stored = _stored_bytes(teacher, sized, models, plan)
    about = [
        f"teacher: {folder} ({text_config(plain).model_type}, {plan.num_layers} layers, "
        f"{str(runs_in).removeprefix('torch.')})",
        f"drops:   {layers_text(plan.drop) or 'none'}",
        f"keeps:   {layers_text(plan.keep)}",
        f"why:     {plan.reason}",
        *(f"changes: {change.words}" for change in plan.changes),
    ]
    num_tokens = num_tokens_of(changes, models[0], plan, text or Measure())
    in_float32 = any(change.IS_ROUNDED for change in changes)
    not_run = why_not_run(teacher.config, teacher.shards) or memory_shortage(teacher.shards, in_float32=in_float32)
    further = [
        *([f"llama.cpp: would run another model: {problem}"] if (problem := misreading(config)) else []),
        disk_line(stored[1], out),
        *(change.words(models[0], plan, num_tokens) for change in changes),
        f"check:   files, kind and settings of layers, {f'not the output: {not_run}' if not_run else 'output'}",
    ]
    width = stored[0] / costs[0].num_parameters if is_quantised else runs_in.itemsize
    return paragraphs([about, *_sizes(costs, stored, width, usual_length(teacher.config)), further]), stored[1]


def _stored_bytes(
    teacher: Teacher, sized: Teacher, models: tuple[PreTrainedModel, PreTrainedModel], plan: Plan
) -> tuple[int, int]:
    """Bytes of the tensors in the files of teacher and student; ``sized`` is the teacher with its changes."""
    stored = sum(tensor.end - tensor.start for shard in teacher.shards for tensor in shard.tensors.values())
    changed = models[0] if sized is teacher else without_data(without_quantization(sized.config)[0])
    refuse_changed_layers(changed, models[1], plan.keep)
    if (by_layer := stored_bytes(sized.shards, changed)) is not None:
        return stored, by_layer.of(plan.keep)
    # then the student is saved as transformers names and merges its tensors
    return stored, stored * num_parameters(models[1]) // num_parameters(models[0])


def _sizes(costs: tuple[Cost, Cost], stored: tuple[int, int], width: float, length: int) -> tuple[list[str], list[str]]:
    """Lines on teacher and student side by side, and on the speed to expect; ``width`` is bytes of a weight."""
    before, after = costs
    rows: list[tuple[str, tuple[float, float], Callable[[Any], str]]] = [
        ("layers", (before.num_layers, after.num_layers), "{:,}".format),
        ("parameters", (before.num_parameters, after.num_parameters), "{:,}".format),
        ("parameters read per token", (before.active_parameters, after.active_parameters), "{:,}".format),
        ("weights on disk", stored, bytes_text),
    ]
    is_known = before.cache is not None and after.cache is not None
    if is_known:
        rows.append(
            (f"cache of {length:,} tokens", (before.cache_bytes(length), after.cache_bytes(length)), bytes_text)
        )
    cells = [(title, text(a), text(b), f"{b / a:.3f}" if a else "") for title, (a, b), text in rows]
    read = [decode_bytes(cost, bytes_per_parameter=width, num_tokens=length) for cost in costs]
    reads = "reading weights and cache" if is_known else "reading weights"
    return aligned([("", "before", "after", "ratio"), *cells]), [
        "expected, not measured:",
        f"  decode  {read[0] / read[1]:.2f} x as fast (one sequence after {length:,} tokens), if all time goes "
        f"into {reads} ({bytes_text(read[0])} a token, then {bytes_text(read[1])})",
        *([] if is_known else ["  not counted: the cache, which for this family is only known by running it"]),
    ]
