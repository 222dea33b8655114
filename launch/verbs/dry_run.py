"""`--dry-run` of every verb: what would be done, what would come of it, and what it takes here.

Nothing is written and nothing is trained. Code of a stage is imported where it is used, so that a verb loads only what
it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from shoal.artifacts.evaluation import CONTROL
from shoal.artifacts.plan import Plan
from shoal.formatting import aligned, bytes_text, count_text, duration_text, layers_text
from shoal.machine import data_sheet, flops_per_second, free_disk, ranks_to_start, refuse_crowd
from shoal.models.anatomy import text_config
from shoal.models.cost import Cost, decode_bytes, model_cost
from shoal.models.load import loaded_dtype, num_parameters, without_data
from shoal.progress import doing
from shoal.recipe.measure import Measure

from .distill import check_training_settings, images_of, what_is_trained
from .evaluate import eval_inputs, require_models_of_this_run, roles, scores_of
from .measure import check_measure, importance_of
from .pace import eval_seconds, eval_work, measure_seconds, training_specs
from .pipeline import preflight
from .prune import (
    expected_plan,
    read_importance,
    read_plan,
    refuse_impossible_changes,
    refuse_impossible_plan,
    sacrifice,
    what_is_cut,
)
from .report import require_distilled, require_results
from .run import Run, check_length

if TYPE_CHECKING:
    from shoal.compress.changes.change import Change
    from shoal.compress.surgery.teacher import Teacher
    from shoal.train.preflight.fit import Free
    from shoal.train.preflight.memory import Job
    from shoal.train.preflight.throughput import Pace
    from shoal.train.student.spec import TrainSpec

NOTHING_WRITTEN = "dry run: nothing is written and nothing is trained"
TEACHERS = {
    "none": "not loaded, these losses do not ask it",
    "live": "live",
    "offloaded": "live, its weights on the host",
    "recorded": "recorded before, and not loaded",
}


@dataclass(frozen=True)
class Stage:
    """What a stage would do."""

    name: str
    state: str
    """`done`, `to do` or `made again`."""
    why: str = ""
    """What would be made, and what is out of date."""
    seconds: float | None = None
    """None = no estimate."""
    num_bytes: int | None = None
    """Bytes that are still to be written at the worst moment; None = no estimate."""
    told: str = ""
    """All that is known of it, for a reader."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be done."""
        return self.state == "done"

    @property
    def row(self) -> tuple[str, ...]:
        """Its line of the table of stages."""
        if self.is_done:
            return self.name, self.state, "", "", ""
        time = "no estimate" if self.seconds is None else f"about {duration_text(self.seconds)}"
        disk = "no estimate" if self.num_bytes is None else bytes_text(self.num_bytes)
        return self.name, self.state, time, disk, self.why


def dry_run(verb: str, run: Run) -> list[Stage]:
    """What ``verb`` would do, stage by stage.

    Raises:
        UserError: what the verb would refuse, and for `distill` a family whose memory cannot be told without running
            it.
    """
    return DRY_RUNS[verb](run)


def dry_run_text(stages: Sequence[Stage], folder: Path) -> str:
    """The same for a reader; ``folder`` is the run directory."""
    if len(stages) == 1:
        (stage,) = stages
        return f"{NOTHING_WRITTEN}\n\n{stage.told or '; '.join(filter(None, [stage.state, stage.why]))}"
    rows = [("stage", "", "time here", "disk", ""), *(stage.row for stage in stages)]
    disk = disk_line(sum(stage.num_bytes or 0 for stage in stages), folder)
    told = [stage for stage in stages if stage.told and not stage.is_done]
    parts = [[NOTHING_WRITTEN], aligned(rows, left=(0, 1, 4)), [disk]]
    return _text([*parts, *([f"--- {stage.name} ---", stage.told] for stage in told)])


def _all(run: Run) -> list[Stage]:
    preflight(run)
    with doing("prune --dry-run"):
        cut = _prune(run)
    with doing("distill --dry-run"):
        healed = _distill(run, cut=cut)
    final = {"teacher": True, "pruned": cut.is_done, CONTROL: healed.is_done, "distilled": healed.is_done}
    wanted = [role for role in final if role != CONTROL or run.recipe.eval.control]
    # the report is written whatever is there
    return [_measure(run), cut, healed, _eval(run, wanted, final), Stage("report", "to do")]


def _checked_measure(run: Run) -> list[Stage]:
    check_measure(run)
    return [_measure(run)]


def _pruning(run: Run) -> list[Stage]:
    read_importance(run)  # refuses another run's
    return [_prune(run)]


def _training(run: Run) -> list[Stage]:
    refuse_crowd(ranks_to_start(run.recipe.num_processes))
    check_training_settings(run.recipe)
    check_length(run, run.recipe.distill.sequence_length, "distill.sequence_length")
    images_of(run)
    has_plan = (run.dir / Plan.FILE).is_file()
    return [training_estimate(run, read_plan(run) if has_plan else expected_plan(run))]


def _record(run: Run) -> list[Stage]:
    settings = run.recipe.distill
    check_training_settings(run.recipe)
    check_length(run, settings.sequence_length, "distill.sequence_length")
    return [Stage("record", "to do", f"{settings.num_tokens:,} tokens in rows of {settings.sequence_length:,}")]


def _scores(run: Run) -> list[Stage]:
    require_models_of_this_run(run, there := roles(run))
    return [_eval(run, list(there), dict.fromkeys(there, True))]


def _report(run: Run) -> list[Stage]:
    require_results(run)
    settings = run.recipe.export
    gguf = "one GGUF file" if settings.gguf else ""
    pushed = f"a push to {settings.hub_repo}" if settings.hub_repo else ""
    return [Stage("report", "to do", ", ".join(filter(None, ["report.html, report.md", gguf, pushed])))]


def _push(run: Run) -> list[Stage]:
    require_distilled(run)
    return [Stage("push", "to do", f"{run.dir / 'distilled'} to {run.recipe.export.hub_repo}")]


DRY_RUNS: dict[str, Callable[[Run], list[Stage]]] = {
    "run": _all,
    "measure": _checked_measure,
    "prune": _pruning,
    "record": _record,
    "distill": _training,
    "eval": _scores,
    "report": _report,
    "push": _push,
}
"""Verb -> what it would do, stage by stage."""


def _measure(run: Run) -> Stage:
    state, why = _state(importance_of(run).changed())
    settings = run.recipe.measure
    work = f"{', '.join(settings.metrics)} over {settings.num_tokens:,} tokens"
    if settings.sweep is not None:
        work += f", sweeps of {', '.join(settings.sweep.operators)}"
    return Stage(
        "measure", state, "; ".join(filter(None, [why, work])), None if state == "done" else measure_seconds(run)
    )


def _text(parts: Sequence[Sequence[str]]) -> str:
    return "\n\n".join("\n".join(part) for part in parts if part)


def disk_line(needed: int, folder: Path) -> str:
    """Whether there is room in ``folder`` for so many more bytes, in words."""
    free = free_disk(folder)
    line = f"disk: {bytes_text(needed)} needed under {folder}, {bytes_text(free)} free there"
    return line if needed <= free else f"{line}: NOT ENOUGH, free some space or set run_dir to another disk"


def _state(changed: Sequence[str] | None) -> tuple[str, str]:
    """State and reason by what out_of_date gives."""
    if changed is None:
        return "to do", ""
    return ("made again", "; ".join(changed)) if changed else ("done", "")


def _prune(run: Run) -> Stage:
    state, why = _state(what_is_cut(run))
    is_done = state == "done"
    if not is_done:
        refuse_impossible_plan(run)
    plan = read_plan(run) if is_done else expected_plan(run)
    told, num_bytes = _cut(run, plan)
    told = "\n".join([told, *sacrifice(run, None, plan)])
    return Stage("prune", state, "; ".join(filter(None, [why, plan.reason])), None, 0 if is_done else num_bytes, told)


def _cut(run: Run, plan: Plan) -> tuple[str, int]:
    """cut_estimate of this run."""
    from shoal.compress.apply import changes_of

    refuse_impossible_changes(run, plan)
    recipe, out = run.recipe, run.dir / "student"
    told = {"dtype": recipe.dtype, "trust_remote_code": recipe.trust_remote_code}
    return cut_estimate(run.teacher, plan, out, changes=changes_of(recipe.prune), text=recipe.measure, **told)


def _distill(run: Run, *, cut: Stage) -> Stage:
    from shoal.train.preflight.memory import NotEstimated

    state, why = _state(what_is_trained(run)) if cut.is_done else ("to do", "the student of the new cut")
    if state == "done":
        return Stage("distill", state)
    if run.recipe.eval.control:
        why = "; ".join(filter(None, [why, "the control too"]))
    try:
        found = training_estimate(run, read_plan(run) if cut.is_done else expected_plan(run))
    except NotEstimated as error:
        return Stage("distill", state, why, told=str(error))
    return replace(found, state=state, why=why)


def _eval(run: Run, wanted: Sequence[str], final: Mapping[str, bool]) -> Stage:
    """Scores of the roles ``wanted``, as far as they are ``final`` and stay."""
    settings, scored_roles = run.recipe.eval, roles(run)
    scored = {
        role for role in wanted if final[role] and scores_of(run, role, eval_inputs(run, scored_roles[role])).is_there()
    }
    due = [role for role in wanted if role not in scored]
    if not due:
        return Stage("eval", "done")
    work = eval_work(run)
    speed = "; how fast they are is measured on top" if settings.speed else ""
    seconds = eval_seconds(run, work, len(due))
    return Stage("eval", "to do", f"{', '.join(due)}, each: {work}{speed}", seconds)


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
    from shoal.compress.apply import num_tokens_of
    from shoal.compress.gguf import misreading
    from shoal.compress.layer_sizes import usual_length
    from shoal.compress.surgery.narrow_config import student_config
    from shoal.compress.surgery.proof import memory_shortage, why_not_run
    from shoal.compress.surgery.quantised import without_quantization
    from shoal.compress.surgery.teacher import read_teacher

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
        f"proof: by its files, and the kind and settings of every layer; {not_run or 'and by running both models'}",
    ]
    width = stored[0] / costs[0].num_parameters if is_quantised else runs_in.itemsize
    return _text([about, *_sizes(costs, stored, width, usual_length(teacher.config)), further]), stored[1]


def _stored_bytes(
    teacher: Teacher, sized: Teacher, models: tuple[PreTrainedModel, PreTrainedModel], plan: Plan
) -> tuple[int, int]:
    """Bytes of the tensors in the files of teacher and student; ``sized`` is the teacher with its changes.

    Raises:
        UserError: layers that the cut would change.
    """
    from shoal.compress.layer_sizes import stored_bytes
    from shoal.compress.surgery.cut_model import refuse_changed_layers
    from shoal.compress.surgery.quantised import without_quantization

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
        f"  decode  {read[0] / read[1]:.2f} x as fast, one sequence behind {length:,} tokens, if {reads} "
        f"takes all the time ({bytes_text(read[0])} a token, then {bytes_text(read[1])})",
        *([] if is_known else ["  the cache of this family cannot be told without running it, so it is left out"]),
    ]


def training_estimate(run: Run, plan: Plan) -> Stage:
    """What training the student of ``plan`` takes on this machine, with its control.

    Raises:
        UserError: what training would refuse; NotEstimated, as job.
    """
    spec, *control = training_specs(run, plan)
    return estimate(spec, run.dir, control=control[0] if control else None)


def estimate(spec: TrainSpec, run_dir: Path, *, control: TrainSpec | None = None) -> Stage:
    """What training will take: memory by ZeRO stage, time, disk, and the cheapest setting that fits.

    ``control`` is the training of the uncut teacher that comes after it; None = there is none. A micro-batch of the
    real objective is run where one rank's models fit here; else the time is worked out from operations and a measured
    matrix product.

    Raises:
        UserError: what the configuration contradicts; NotEstimated, a family whose memory cannot be told so.
    """
    from shoal.train.preflight.fit import MARGIN, Free, missing_bytes
    from shoal.train.preflight.memory import job
    from shoal.train.preflight.throughput import flops_per_token, probe, probe_bytes

    with doing("working out memory"):
        size = job(spec)
        uncut = None if control is None else job(control)
    free = Free.here(spec.ranks.device)
    can_be_tried = size.setting.teacher != "recorded" and MARGIN * probe_bytes(size) <= free.device
    time, seconds = _time(size, probe(size) if can_be_tried else None)
    needed, beside = missing_bytes(size, run_dir), []
    if uncut is not None:
        times = flops_per_token(uncut) / flops_per_token(size)
        seconds *= 1 + times
        needed += missing_bytes(uncut, run_dir / CONTROL)
        beside = [
            f"control: after the student the uncut teacher is trained on the same rows, {len(uncut.student.layers)} "
            f"layers, {count_text(uncut.student.trained)} weights trained: {times:.2f} times the student's time, "
            f"{uncut.memory.peak / 1e9:.2f} GB at the peak of a rank ({free.verdict(uncut)})"
        ]
    disk = [disk_line(needed, run_dir)]
    told = _text([_about(size), _memory_table(size, free), time, beside, disk, _proposal(size, free)])
    return Stage("distill", "to do", "", seconds, needed, told)


def _about(job: Job) -> list[str]:
    spec, student, teacher, setting = job.spec, job.student, job.teacher, job.setting
    precision = str(spec.deepspeed.product_dtype).removeprefix("torch.")
    precision += f" {'autocast' if job.is_autocast else 'products'}"
    lines = [
        f"student: {len(student.layers)} layers, {count_text(student.parameters)} weights, "
        f"{count_text(student.trained)} of them trained; {job.width} bytes a weight, {precision}",
        f"teacher: {len(teacher.layers)} layers, {count_text(teacher.parameters)} weights, "
        f"{TEACHERS[setting.teacher]}, {spec.teacher_dtype.itemsize} bytes a weight",
        f"step:    {spec.ranks.count} rank(s) x {setting.accumulation} micro-batch(es) x {setting.rows} row(s) x "
        f"{spec.settings.sequence_length:,} tokens = {spec.tokens_per_step:,} tokens; {spec.num_steps:,} steps",
    ]
    if weights := job.shared_weights:
        lines.append(f"shared:  {count_text(weights)} frozen weights are held once for both models")
    if shared := spec.shared_layers:
        how = "not run, the state above is recorded" if setting.teacher == "recorded" else "run once for both"
        lines.append(f"shared:  the lowest {shared} layer(s) are {how}")
    return lines


def _memory_table(job: Job, free: Free) -> list[str]:
    from shoal.train.preflight.memory import Memory

    now = job.setting
    plain = replace(now, offload_optimizer=False, offload_parameters=False)
    rows = [(f"ZeRO {stage}", replace(plain, stage=stage)) for stage in (0, 1, 2, 3)]
    if not job.on_cpu:
        rows.append(("ZeRO 3, all on host", replace(plain, stage=3, offload_optimizer=True, offload_parameters=True)))
    rows.append(("this recipe", now))
    other = "without" if now.checkpointing else "with"
    rows.append((f"  {other} checkpointing", replace(now, checkpointing=not now.checkpointing)))
    if now.teacher == "live" and job.spec.is_recordable:
        rows.append(("  teacher recorded", replace(now, teacher="recorded")))
    columns = [field.name for field in fields(Memory)]
    cells: list[tuple[str, ...]] = [(f"memory of one rank, GB ({job.spec.ranks.count} in all)", *columns, "")]
    for title, setting in rows:
        row = replace(job, setting=setting)
        needed = row.memory
        cells.append((title, *(f"{getattr(needed, name) / 1e9:.2f}" for name in columns), free.verdict(row)))
    on_device = "" if job.on_cpu else f"{bytes_text(free.device)} on the device, "
    return [
        *aligned(cells, left=(0, len(cells[0]) - 1)),
        "the peak is no sum: gradients come as activations go; `host` is per node, `fixed` the process itself",
        f"free now: {on_device}{bytes_text(free.host)} on this node",
    ]


def _time(job: Job, pace: Pace | None) -> tuple[list[str], float]:
    """Lines on the time of all steps, and its seconds."""
    from shoal.train.preflight.throughput import assumed_rate, expected, flops_per_token

    setting, spec, flops = job.setting, job.spec, flops_per_token(job)
    with doing("timing a matrix product"):
        peak = flops_per_second(spec.ranks.device, spec.deepspeed.product_dtype)
    source = "of its data sheet" if data_sheet(spec.ranks.device) else "of a matrix product measured here"
    peak_text, left = f"{peak / 1e12:.3g} TFLOP/s {source}", "communication between ranks, "
    own_tokens = spec.tokens_per_step // spec.ranks.machines
    if pace is None and (told := expected(job)):
        (step, how), left = told, "what moves to the host and back, " if setting.offload_optimizer else ""
    elif pace is None:
        assumed = assumed_rate(spec.ranks.device, spec.deepspeed.product_dtype)
        step, how = own_tokens * flops / assumed, f"assuming {assumed / peak:.0%} of {peak_text}"
    else:
        # ranks on one CPU share its cores, which a probe has had to itself
        step = own_tokens / pace.tokens_per_s + pace.optimizer_s
        how = (
            f"measured here on {pace.num_tokens:,} of the {setting.rows * spec.settings.sequence_length:,} tokens of a "
            f"micro-batch of the real objective: {pace.tokens_per_s * flops / peak:.0%} of {peak_text}"
        )
    lines = [
        f"time: {spec.tokens_per_step / step:,.0f} tokens/s, {step:.3g} s a step, "
        f"{duration_text(spec.num_steps * step)} for {spec.num_steps * spec.tokens_per_step:,} tokens "
        f"({flops / 1e9:.3g} GFLOP a token)",
        f"  {how}",
        f"  {left}recording, scoring, sampling and checkpoints come on top",
    ]
    return lines, spec.num_steps * step


def _proposal(job: Job, free: Free) -> list[str]:
    from shoal.train.preflight.fit import overrides

    with doing("looking for the cheapest setting that fits"):
        setting = free.cheapest(job)
    if setting is None:
        return [
            "no setting fits with a margin of a tenth: more ranks, shorter rows (distill.sequence_length), or "
            "distill.trainable: from_first_cut take less"
        ]
    if not (lines := overrides(job, setting)):
        return ["cheapest setting that fits: this recipe's"]
    peak = replace(job, setting=setting).memory.peak
    return [f"cheapest setting that fits ({bytes_text(peak)} at the peak):", *(f"  {line}" for line in lines)]
