"""The prune stage: plan.json and student/, chosen by a metric or named, refused early where they cannot work.

Room code is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from shoal.artifacts.artifact import Provenance, differences
from shoal.artifacts.heads import Heads
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import ROUND, PruningPlan
from shoal.artifacts.speed import Speed
from shoal.artifacts.width import KeptWidth
from shoal.data.sources import load_texts, sources_fingerprint
from shoal.errors import UserError
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_config, reads_images
from shoal.recipe.edits import Edit, Insert, Replace, in_words, removed_layers
from shoal.recipe.measure import METRICS
from shoal.recipe.prune import Calibration
from shoal.recipe.section import Shapes, as_dict, shaping
from shoal.recipe.track import is_gguf
from shoal.runtime import barrier, is_main
from shoal.stages.measure import heads_inputs, measure, measure_inputs, read_heads
from shoal.stages.overlap import search_of_rows
from shoal.stages.run import Run, check_length, is_done, out_of_date, require

if TYPE_CHECKING:
    from shoal.compress.goals import Goals, TeacherTime

log = logging.getLogger(__name__)

TIMES = "prune.target.ms_per_token (measured)"
"""Input of a plan: the times that its target was scaled from."""


def plan_inputs(run: Run) -> dict[str, Any]:
    """What identifies plan.json and student/: the importance layers were chosen by and what edits read included."""
    from shoal.compress.plan import is_automatic

    prune = run.recipe.prune
    inputs = {**run.base_identity, **shaping(prune, Shapes.PLAN, "prune.")}
    if prune.rounds > 1:
        inputs |= {"prune.rounds": prune.rounds, ROUND: run.round}
    if is_automatic(prune):
        inputs["importance"] = Provenance(measure_inputs(run)).fingerprint
    if prune.protect_heads is not None:
        inputs["prune.protect_heads"] = prune.protect_heads
        inputs["prune.protect_heads (heads)"] = Provenance(heads_inputs(run)).fingerprint
    if prune.vision_tower != "whole":
        inputs["prune.vision_tower"] = prune.vision_tower
    if prune.compensate is not None:
        inputs |= shaping(prune.compensate, Shapes.PLAN, "prune.compensate.") | shaping(run.recipe, Shapes.PLAN)
        inputs["prune.compensate.data"] = sources_fingerprint(prune.compensate.data)
    if prune.width is not None:
        inputs |= shaping(prune.width, Shapes.PLAN, "prune.width.") | shaping(run.recipe, Shapes.PLAN)
        inputs["prune.width.data"] = sources_fingerprint(prune.width.data)
    for index, edit in enumerate(prune.edits):
        inputs[f"prune.edits.{index}"] = as_dict(edit)
        if isinstance(edit, Replace):
            inputs[f"prune.edits.{index}.data"] = sources_fingerprint(edit.data)
            inputs |= shaping(run.recipe, Shapes.PLAN)
        elif isinstance(edit, Insert) and edit.init == "lesa":
            inputs |= shaping(run.recipe, Shapes.PLAN)
    last = _plan_to_the_same_target(run)
    if last is None or TIMES in last:  # one of before it was recorded stands
        inputs |= _times(run)
    donors = run.donor_fingerprints.items()
    return {**inputs, **{f"prune.edits.{index}.donor": donor for index, donor in donors}}


def read_goals(run: Run) -> Goals | None:
    """What prune.target asks of this run's teacher; None where it is not set.

    Raises:
        UserError: targets that say nothing about this model, or lack what they need.
    """
    from shoal.compress.goals import goals_of
    from shoal.compress.layer_sizes import layer_sizes

    target = run.recipe.prune.target
    if target is None:
        return None
    for name in ("memory_gb", "ms_per_token", "speedup"):
        if (serving := getattr(target, name)) is not None and serving.length is not None:
            check_length(run, serving.length, f"prune.target.{name}.length")
    sizes = layer_sizes(run.base, trust_remote_code=run.recipe.trust_remote_code)
    removed, measured = removed_layers(run.recipe.prune.edits), _teacher_time(run)
    return goals_of(target, sizes, removed=removed, teacher_time=measured)


def _times(run: Run) -> dict[str, Any]:
    """What a plan in milliseconds follows from beside the recipe."""
    measured = _teacher_time(run)
    return {} if measured is None else {TIMES: asdict(measured)}


def _plan_to_the_same_target(run: Run) -> dict[str, Any] | None:
    """What the plan that is there was made from, where the recipe still has its target."""
    path = run.dir / PruningPlan.FILE
    last = PruningPlan.read(path).provenance.inputs if path.is_file() else {}
    target = shaping(run.recipe.prune, Shapes.PLAN).get("target")
    return last if target is not None and target == last.get("prune.target") else None


def _teacher_time(run: Run) -> TeacherTime | None:
    """The teacher's time per token as the run directory has it, at the batch size measured that is nearest; None where
    no target needs it, and where it was not measured.

    A plan keeps the time that it was made by while cut models are measured beside the teacher: these follow from it.
    """
    from shoal.compress.goals import TeacherTime

    asked = getattr(run.recipe.prune.target, "ms_per_token", None)
    if asked is None or asked.teacher is not None:
        return None
    path = run.dir / Speed.FILE
    speed = Speed.read(path) if path.is_file() else None
    last = _plan_to_the_same_target(run)
    if last is not None and TIMES in last and (speed is None or len(speed.roles) > 1):
        return TeacherTime(**last[TIMES])
    if speed is None:
        return None
    if speed.provenance.inputs.get("teacher") != run.teacher_fingerprint:
        raise UserError(
            f"{path}: was measured with another teacher; delete it and run `shoal eval` again, or set "
            "prune.target.ms_per_token.teacher"
        )
    nearest = min(speed.roles["teacher"].batches, key=lambda batch: abs(batch.batch_size - asked.batch))
    shallower = [
        (score.num_layers, batch.step_ms)
        for score in (*speed.roles.values(), *([speed.half_depth] if speed.half_depth else []))
        if score.num_layers is not None and score.num_layers < run.num_layers
        for batch in score.batches
        if batch.batch_size == nearest.batch_size
    ]
    fewest = min((num_layers for num_layers, _ in shallower), default=None)
    times = [milliseconds for num_layers, milliseconds in shallower if num_layers == fewest]
    return TeacherTime(
        nearest.step_ms,
        nearest.batch_size,
        speed.prompt_tokens + speed.new_tokens // 2,
        f"{Speed.FILE} (batch size {nearest.batch_size})",
        None if fewest is None else (fewest, fmean(times)),
    )


def prune(run: Run) -> None:
    """plan.json and student/. Measures first where the layers are chosen by a metric."""
    if missing := [kind.FILE for kind, _ in _chosen_by(run) if not (run.dir / kind.FILE).is_file()]:
        refuse_impossible_plan(run)
        log.info("prune: needs %s, measuring first", " and ".join(missing))
        measure(run)
    importance = read_importance(run)
    path, student = run.dir / PruningPlan.FILE, run.dir / "student"
    inputs = plan_inputs(run)
    if (student / "config.json").is_file() and is_done(PruningPlan, path, inputs, "prune"):
        refuse_unfit_student(run, _plan_of_its_student(run))
        return
    plan = choose_plan(run, importance, inputs | _times(run))
    if _is_cut_already(run, plan):
        refuse_unfit_student(run, plan)
        log.info("prune: %s still says %s, so student/ and its training stay", Importance.FILE, plan.in_words())
        if is_main():
            last = PruningPlan.read(path)
            replace(plan, gaps=last.gaps, width=last.width, text=last.text, student=last.student).write(path)
        barrier()
        return
    _refuse_stale_training(run)
    _refuse_unreadable_data(plan.edits)
    _refuse_compensation(run, plan)
    refuse_unfit_student(run, plan)
    log.info("prune: %s", plan.in_words())
    for line in _sacrifice(run, importance, plan):
        log.info("prune: %s", line)
    if is_main():
        from shoal.compress.apply import apply_plan
        from shoal.compress.surgery.narrow_config import BLOCK
        from shoal.compress.targets.check import check_targets, log_verdicts

        text = _calibration_text(run)
        path.unlink(missing_ok=True)  # the plan is written last: a plan without its student is never seen
        applied = apply_plan(
            run.base,
            _in_base(run, plan),
            student,
            donors=run.donors,
            seed=run.recipe.seed,
            proof=run.recipe.prune.proof,
            compensate=run.recipe.prune.compensate,
            width=run.recipe.prune.width,
            trust_remote_code=run.recipe.trust_remote_code,
        )
        plan = replace(plan, gaps=applied.gaps, width=applied.width, text=text)
        replace(plan, student=plan.sealed(model_fingerprint(student))).write(path)
        log.info("prune: %s", student)
        if plan.width is not None and (plan.width.intermediate_size or 0) % BLOCK:
            log.warning(
                "prune: %s channels of an MLP are no multiple of %d: llama.cpp's K-quants keep the maps that read them "
                "in larger formats",
                *(f"{plan.width.intermediate_size:,}", BLOCK),
            )
        if not run.recipe.prune.targets:
            log_verdicts(check_targets(load_config(student)))
    barrier()


def prune_dry_run(run: Run, figure: Path | None = None) -> str:
    """What `shoal prune` would do and what would come of it, for a reader. Measures nothing and writes nothing but
    ``figure``, where that is given: the frontier of the metric.

    Of several rounds that is the first which is not healed yet.

    Raises:
        UserError: what pruning would refuse, and importance.json missing where layers are chosen by it.
    """
    run = run.first_open
    _refuse_unreadable_data(run.recipe.prune.edits)
    importance = read_importance(run)
    plan = choose_plan(run, importance, {})
    told, _ = student_estimate(run, plan)
    rounds = [f"rounds: this is {run.called}"] if run.recipe.prune.rounds > 1 else []
    return "\n".join([told, *_sacrifice(run, importance, plan), *rounds, *_frontier(run, importance, plan, figure)])


def student_estimate(run: Run, plan: PruningPlan) -> tuple[str, int]:
    """What would come of ``plan``, for a reader, and the bytes of student/.

    Raises:
        UserError: what pruning would refuse.
    """
    from shoal.compress.dry_run import estimate

    recipe = run.recipe
    _refuse_compensation(run, plan)
    return estimate(
        run.base,
        _in_base(run, plan),
        run.dir / "student",
        donors=run.donors,
        proof=recipe.prune.proof,
        targets=recipe.prune.targets,
        compensate=recipe.prune.compensate,
        width=recipe.prune.width,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
    )


def _frontier(run: Run, importance: Importance | None, plan: PruningPlan, figure: Path | None) -> Sequence[str]:
    """The cuts that the metric would make, where layers are chosen by one; several rounds have one for each, and of
    narrowed layers other sizes."""
    from shoal.compress.frontier import frontier, frontier_lines
    from shoal.compress.layer_sizes import layer_sizes

    if importance is None or run.recipe.prune.rounds > 1 or plan.width is not None:
        if figure is not None:
            raise UserError(
                f"--figure {figure}: draws what a metric would drop, and this recipe names layers, cuts in rounds or "
                "narrows layers too; leave it out"
            )
        return ()
    sizes = layer_sizes(run.base, trust_remote_code=run.recipe.trust_remote_code)
    heads = None if run.recipe.prune.protect_heads is None else read_heads(run)
    front = frontier(run.prune, importance, sizes, heads)
    if figure is not None:
        from shoal.figures.frontier import frontier_figure
        from shoal.figures.style import save_figure

        points = front.points
        kept = {name: [point.kept[name] for point in points] for name in points[0].kept}
        chosen = next(((point.num_bytes, point.speedup) for point in points if point.drop == plan.drop), None)
        own = frontier_figure(
            [point.num_bytes for point in points],
            [point.speedup for point in points],
            kept or {front.metric: [point.score for point in points]},
            kept=bool(kept),
            chosen=chosen,
        )
        save_figure(own, figure)
    return ("", *frontier_lines(front, plan.drop))


def expected_plan(run: Run) -> PruningPlan:
    """The plan that this run will make; before layers are measured, one that drops as many, whose reason says so.

    Raises:
        UserError: an impossible choice.
    """
    from shoal.compress.plan import round_of, stand_in

    if _is_settled(run):
        return choose_plan(run, read_importance(run), {})
    layers = run.base_layers
    prune = round_of(run.prune, run.round, num_layers=run.num_layers, kept=layers)
    choice = stand_in(prune, num_layers=len(layers), goals=read_goals(run))
    gone = {*range(run.num_layers)} - {*layers} | {layers[place] for place in choice.drop}
    drop, tower, keep_mtp = tuple(sorted(gone)), _vision_blocks(run), prune.mtp == "keep"
    return PruningPlan(
        Provenance({}),
        run.num_layers,
        drop,
        choice.reason,
        choice.edits,
        width=_width(run),
        vision_blocks=tower,
        mtp=keep_mtp,
    )


def _is_settled(run: Run) -> bool:
    """Whether all is there that layers are chosen by."""
    return all(out_of_date(kind, run.dir / kind.FILE, inputs) == [] for kind, inputs in _chosen_by(run))


def _chosen_by(run: Run) -> list[tuple[type[Importance | Heads], dict[str, Any]]]:
    """What layers are chosen by: the kind of each result, and what identifies it; nothing where they are named."""
    from shoal.compress.plan import is_automatic

    if not is_automatic(run.recipe.prune):
        return []
    heads = [] if run.recipe.prune.protect_heads is None else [(Heads, heads_inputs(run))]
    return [(Importance, measure_inputs(run)), *heads]


def what_is_cut(run: Run) -> list[str] | None:
    """What is out of date of plan.json and student/, in words: nothing where they stay; None where one is missing.

    Raises:
        UserError: a training of another cut lies there, which pruning would refuse.
    """
    path, student = run.dir / PruningPlan.FILE, run.dir / "student"
    inputs = plan_inputs(run)
    changed = out_of_date(PruningPlan, path, inputs)
    if changed is None or not (student / "config.json").is_file():
        return None
    if (
        changed
        and _is_settled(run)
        and _is_cut_already(run, replace(expected_plan(run), provenance=Provenance(inputs)))
    ):
        return []
    if changed:
        _refuse_stale_training(run)
    return changed


def read_plan(run: Run) -> PruningPlan:
    """plan.json of this run; made first where it is missing.

    Raises:
        UserError: it belongs to another model, to other settings, or to another student.
    """
    path = run.dir / PruningPlan.FILE
    if not path.is_file():
        log.info("needs %s, pruning first", PruningPlan.FILE)
        prune(run)
    else:
        require(PruningPlan, path, plan_inputs(run), "shoal prune")
    return _plan_of_its_student(run)


def _plan_of_its_student(run: Run) -> PruningPlan:
    """plan.json, as student/ was made by it.

    Raises:
        UserError: it is for a model of another number of layers, or one of the two was changed after the cut.
    """
    path, student = run.dir / PruningPlan.FILE, run.dir / "student"
    plan = PruningPlan.read(path)
    _refuse_other_depth(run, path, plan.num_layers, run.num_layers)
    is_there = plan.student and (student / "config.json").is_file()
    if is_there and plan.student != plan.sealed(model_fingerprint(student)):
        raise UserError(
            f"{path}: says {plan.in_words()!r}, and {student} was not made so: one of them was changed after the cut. "
            "Delete plan.json and run `shoal prune` again; to choose other layers, set prune.drop"
        )
    return plan


def _refuse_other_depth(run: Run, path: Path, num_layers: int, expected: int) -> None:
    if num_layers != expected:
        model = run.recipe.model if expected == run.num_layers else run.base
        raise UserError(
            f"{path}: num_layers: is {num_layers}, and {model} has {expected} layers; delete it and run its stage again"
        )


def read_importance(run: Run) -> Importance | None:
    """importance.json, where layers are chosen by it and it is there."""
    from shoal.compress.plan import is_automatic

    path = run.dir / Importance.FILE
    if not is_automatic(run.recipe.prune) or not path.is_file():
        return None
    require(Importance, path, measure_inputs(run), "shoal measure")
    importance = Importance.read(path)
    _refuse_other_depth(run, path, importance.num_layers, len(run.base_layers))
    return importance


def refuse_impossible_plan(run: Run) -> None:
    """Refuse what no measurement could make possible, before hours are spent on one.

    Raises:
        UserError: a choice of layers that cannot be made, changes that the model does not allow, unreadable data.
    """
    from shoal.compress.plan import check_choice, is_automatic

    check_choice(run.prune, num_layers=run.num_layers, goals=read_goals(run))
    refuse_unmeasured(run)
    refuse_impossible_changes(run)
    if not is_automatic(run.recipe.prune):
        plan = choose_plan(run, None, {})
        _refuse_compensation(run, plan)
        refuse_unfit_student(run, plan)


def refuse_unmeasured(run: Run) -> None:
    """Refuse to choose by what nothing in the recipe measures, or measures too short, before hours are spent on it.

    Where importance.json is there and belongs to this run, it tells. Of several rounds all are looked at.
    """
    from shoal.compress.metrics.images import COLUMNS
    from shoal.compress.plan import DEFAULT_METRIC, DEFAULT_RUN_METRIC, is_automatic

    prune, measure = run.recipe.prune, run.recipe.measure
    if not is_automatic(prune) or _is_measured(run):
        return
    if measure.sweep is None:
        for setting, asked in (("spare", prune.spare), ("protect: cornerstone", "cornerstone" in prune.protect)):
            if asked:
                raise UserError(
                    f"prune.{setting}: needs swept tasks, and nothing is swept; name some in measure.sweep.tasks, or "
                    "leave it out"
                )
    named = {f"prune.weights.{name}": name for name in prune.weights}
    default = DEFAULT_RUN_METRIC if prune.contiguous else DEFAULT_METRIC
    for setting, name in (named or {"prune.metric": prune.metric or default}).items():
        if name in measure.metrics or (measure.images is not None and name in COLUMNS):
            continue
        if name in METRICS:
            measured = ", ".join(measure.metrics)
            raise UserError(f"{setting}: {name} is not measured; add it to measure.metrics ({measured})")
        if measure.sweep is None:
            close = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "`shoal list metrics` has all."
            raise UserError(
                f"{setting}: {name} is no metric; {hint} To choose by a task, name it in measure.sweep.tasks too"
            )
    for own in (*run.rounds_before, run):
        _refuse_impossible_choice(own)


def _is_measured(run: Run) -> bool:
    """Whether importance.json is there and belongs to this run."""
    path = run.dir / Importance.FILE
    if run.previous is not None and not run.previous.is_healed:
        return False  # it is of a round that has to be made anew
    return path.is_file() and not differences(measure_inputs(run), Importance.read(path).provenance.inputs)


def _refuse_impossible_choice(run: Run) -> None:
    """Make the choice of one round among columns without scores, whose names and lengths are known beforehand."""
    from shoal.compress.metrics.greedy import TASK_ORDER
    from shoal.compress.plan import choose_changes, drops_by_round, free_layers, round_of
    from shoal.compress.sweeps.placeholder import placeholder_importance

    prune, measure, num_layers, goals = run.prune, run.recipe.measure, run.num_layers, read_goals(run)
    free = free_layers(prune, num_layers)
    if goals is not None:
        savings = {layer: goals.saving(layer) for layer in free}
        if len(goals.goals) > 1 and len(set(savings.values())) > 1:
            return  # which removals reach most is not known of several goals at once
        free.sort(key=lambda layer: savings[layer], reverse=True)
    # any layers may go in the rounds before: their number counts
    gone = sum(drops_by_round(prune, num_layers)[: run.round - 1]) if prune.rounds > 1 else 0
    kept = sorted({*range(num_layers)} - {*free[:gone]})
    chosen = replace(round_of(prune, run.round, num_layers=num_layers, kept=kept), protect_heads=None)
    tasks_choose = bool({prune.metric, *prune.weights} - {None, *METRICS, TASK_ORDER})
    with_tasks = tasks_choose or bool(prune.spare) or "cornerstone" in prune.protect
    go_first = [kept.index(layer) for layer in free[gone:]]
    to_come = placeholder_importance(measure, len(kept), go_first=go_first, with_tasks=with_tasks)
    choose_changes(chosen, num_layers=len(kept), importance=to_come, goals=goals)


def choose_plan(run: Run, importance: Importance | None, inputs: dict[str, Any]) -> PruningPlan:
    """The plan that the recipe asks for, with ``inputs`` as its provenance; nothing is written.

    It leads from the teacher to the student, over all rounds so far.

    Raises:
        UserError: an impossible choice, and halves of layers where there are several rounds.
    """
    from shoal.compress.plan import choose_changes, round_of

    if importance is None:
        refuse_unmeasured(run)
    layers, several = run.base_layers, run.recipe.prune.rounds > 1
    if several and importance is None:
        raise UserError(
            f"prune: choosing the layers of {run.called} needs {run.dir / Importance.FILE}; run "
            f"`shoal measure --round {run.round}` first"
        )
    prune = round_of(run.prune, run.round, num_layers=run.num_layers, kept=layers)
    heads = None if prune.protect_heads is None else read_heads(run)
    choice = choose_changes(prune, num_layers=len(layers), importance=importance, heads=heads, goals=read_goals(run))
    tower, width = _vision_blocks(run), _width(run)
    if not choice.drop and not choice.edits and tower is None and width is None:
        raise UserError(
            "prune.drop: is empty, and prune.vision_tower finds nothing to cut, so nothing would go; name layers"
        )
    if choice.edits and width is not None:
        raise UserError(
            f"prune.metric: {run.recipe.prune.metric} removes halves of layers, and prune.width narrows whole ones; "
            "choose a metric of layers, or leave prune.width out"
        )
    if not several:
        told = [f"what stays of each layer writes most, on {prune.width.num_tokens:,} tokens"] if prune.width else []
        return PruningPlan(
            Provenance(inputs),
            run.num_layers,
            choice.drop,
            "; ".join(filter(None, [choice.reason, *told])),
            choice.edits,
            width=width,
            vision_blocks=tower,
            mtp=prune.mtp == "keep",
        )
    if choice.edits:
        raise UserError(
            f"prune.metric: {run.recipe.prune.metric} removes halves of layers, and several rounds only drop layers; "
            "choose a metric of layers, or set prune.rounds: 1"
        )
    gone = {*range(run.num_layers)} - {*layers} | {layers[place] for place in choice.drop}
    provenance = Provenance({**inputs, ROUND: run.round})  # training reads it of a plan that is only told of, too
    reason = f"in {run.called}, {choice.reason}"
    drop, keep_mtp = tuple(sorted(gone)), prune.mtp == "keep"
    return PruningPlan(provenance, run.num_layers, drop, reason, vision_blocks=tower, mtp=keep_mtp)


def _width(run: Run) -> KeptWidth | None:
    """How wide the layers of the student are; what stays of each is chosen once it is cut."""
    from shoal.compress.surgery.narrow_config import kept_width

    return None if (settings := run.recipe.prune.width) is None else kept_width(run.config(), settings)


def _vision_blocks(run: Run) -> int | None:
    """Blocks of the vision tower that the plan leaves; None = all."""
    from shoal.compress.surgery.vision_tower import blocks_read

    if run.recipe.prune.vision_tower == "whole":
        return None
    blocks = blocks_read(run.config()) if reads_images(run.config()) else None
    if blocks is None:
        log.warning("prune.vision_tower: auto finds nothing to cut: no tower, or its last state is read")
    return blocks


def _in_base(run: Run, plan: PruningPlan) -> PruningPlan:
    """``plan`` as a cut of the model that this round cuts, whose layers have other numbers after an earlier round."""
    drop = tuple(place for place, layer in enumerate(run.base_layers) if layer in plan.drop)
    return replace(plan, num_layers=len(run.base_layers), drop=drop)


def _sacrifice(run: Run, importance: Importance | None, plan: PruningPlan) -> Sequence[str]:
    """What the plan is expected to cost, for a reader; nothing where no task was swept on this model."""
    from shoal.compress.sweeps.expected_loss import expected_sacrifice

    path = run.dir / Importance.FILE
    if importance is None and path.is_file():
        measured = Importance.read(path)
        importance = None if differences(measure_inputs(run), measured.provenance.inputs) else measured
    if importance is None or importance.atlas is None:
        return ()
    return expected_sacrifice(importance, plan.drop, plan.edits)


def refuse_impossible_changes(run: Run) -> None:
    """Refuse changes that apply_plan would refuse, as far as that shows without the model, and unreadable data."""
    from shoal.compress.compensation.check import refuse_impossible_compensation
    from shoal.compress.edits.apply import refuse_impossible_edits

    edits, trusted = run.recipe.prune.edits, run.recipe.trust_remote_code
    refuse_impossible_edits(run.teacher, edits, run.donors, trust_remote_code=trusted)
    if run.recipe.prune.mtp == "keep":
        from shoal.compress.apply import refuse_without_mtp

        refuse_without_mtp(run.teacher, trust_remote_code=trusted)
    _refuse_unreadable_data(edits)
    _refuse_calibration(run)
    if (settings := run.recipe.prune.compensate) is not None:
        refuse_impossible_compensation(run.teacher, settings, trust_remote_code=trusted)
    if (width := _width(run)) is not None:
        from shoal.compress.width.narrowing import narrowing

        narrowing(run.teacher, run.config(), width)


def _refuse_compensation(run: Run, plan: PruningPlan) -> None:
    """Refuse what cannot be made up for, and calibration text that cannot be read, before a model is loaded."""
    _refuse_calibration(run)
    if run.recipe.prune.compensate is None:
        return
    if plan.edits:
        raise UserError(
            f"prune.compensate: makes up for dropped layers alone, and this plan has {in_words(plan.edits[0])} too; "
            "leave one of them out"
        )
    if 0 in plan.drop:
        raise UserError(
            "prune.compensate: layer 0 is dropped, and no layer below it is left whose weights could make up for it; "
            "keep it, or leave prune.compensate out"
        )


def _calibration(run: Run) -> tuple[str, Calibration] | None:
    """The section of the recipe that decides by calibration text, and its name; there is one of them at most."""
    prune = run.recipe.prune
    named = {"prune.compensate": prune.compensate, "prune.width": prune.width}
    return next(((name, settings) for name, settings in named.items() if settings is not None), None)


def _refuse_calibration(run: Run) -> None:
    """Refuse rows that are too long for the model, and text that cannot be read."""
    if (calibration := _calibration(run)) is None:
        return
    name, settings = calibration
    check_length(run, settings.sequence_length, f"{name}.sequence_length")
    for source in settings.data:
        load_texts(source, max_characters=1)


def _calibration_text(run: Run) -> dict[str, Any]:
    """What prune.compensate is fitted to, or prune.width chosen on, and what of evaluation items and forms stands in
    it."""
    from shoal.compress.apply import calibration_rows

    if (calibration := _calibration(run)) is None:
        return {}
    tokenizer, (name, settings) = run.tokenizer(), calibration
    rows = calibration_rows(settings, tokenizer, seed=run.recipe.seed, section=name)
    search = search_of_rows(run, f"the text of {name}")
    return {"sources": rows.counts, **({} if search is None else search(rows, tokenizer))}


def _refuse_unreadable_data(edits: Sequence[Edit]) -> None:
    for source in {source for edit in edits if isinstance(edit, Replace) for source in edit.data}:
        load_texts(source, max_characters=1)


def refuse_unfit_student(run: Run, plan: PruningPlan) -> None:
    """Refuse a plan that no configuration can express, and one whose student a target or, as a GGUF file, llama.cpp
    would not take, or takes for another model."""
    from shoal.compress.targets.check import refuse_for_targets, student_config

    student, copies = student_config(run.config(), plan.keep, plan.width), run.recipe.quantize
    gguf = run.recipe.export.gguf or (copies is not None and is_gguf(copies.format))
    if targets := run.recipe.prune.targets:
        refuse_for_targets(student, targets)
    if gguf:
        from shoal.compress.targets.gguf import refuse_gguf

        refuse_gguf(student)


def _is_cut_already(run: Run, plan: PruningPlan) -> bool:
    """Whether student/ is what ``plan`` would make, because a new importance.json, or times measured anew, choose what
    the last ones chose.

    Sweeps are made again whenever the text of a task changes; a training must not be lost where that moves no layer.
    """
    path, student = run.dir / PruningPlan.FILE, run.dir / "student"
    if not path.is_file() or not (student / "config.json").is_file():
        return False
    last = PruningPlan.read(path)
    before, now = ({**made_by.provenance.inputs, "importance": "", TIMES: ""} for made_by in (last, plan))
    same = (last.drop, last.edits) == (plan.drop, plan.edits) and not differences(now, before)
    return same and last.student == last.sealed(model_fingerprint(student))


def _refuse_stale_training(run: Run) -> None:
    path = run.dir / PruningPlan.FILE
    if any((run.dir / "checkpoints").glob("checkpoint-*")) and path.is_file():
        changes = differences(plan_inputs(run), PruningPlan.read(path).provenance.inputs)
        raise UserError(
            f"{run.dir}: holds checkpoints trained on another cut "
            f"({'; '.join(changes) or 'student/ is gone'}). "
            "Set the recipe back, choose another run_dir, or delete its checkpoints folder"
        )
