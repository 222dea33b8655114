"""The search stage: several plans, each cut, scored, healed for the same few tokens and scored again.

Every plan is a run of its own under RUN_DIR/search, made from the same recipe, so the other stages do the work, with
their resuming and their refusals. What does not depend on the plan is made once: importance.json, the teacher's
scores, the text that it writes.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import Artifact, Provenance, differences
from shoal.artifacts.evaluation import Evaluation
from shoal.artifacts.heads import Heads
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PruningPlan
from shoal.artifacts.search import HealedPlan, SearchResult
from shoal.artifacts.speed import Speed
from shoal.artifacts.training import Training
from shoal.atomic_files import write_text
from shoal.errors import UserError
from shoal.progress import each
from shoal.recipe.prune import NOT_BESIDE_DROP, Prune
from shoal.recipe.recipe import Recipe, parse_recipe
from shoal.recipe.remembered import FILE as RECIPE
from shoal.recipe.remembered import memory_of
from shoal.recipe.search import Search, SearchPlan
from shoal.recipe.section import TEACHER_TEXT, Shapes, as_dict, shaping
from shoal.recipe.track import Export
from shoal.runtime import free_memory

from ..verbs import distill as distilling
from ..verbs import evaluate
from ..verbs import prune as pruning
from ..verbs.measure import heads_inputs, measure, measure_inputs
from ..verbs.plan_checks import refuse_impossible_plan
from ..verbs.run import Run, is_done, locked
from . import preflight

log = logging.getLogger(__name__)

FOLDER = "search"
NO_PLAN_READS: dict[str, Any] = {"diagnostics": False, "probes": (), "vision_states": None}
"""Settings of section `measure` without what no plan is chosen by."""
MEASURED, TEXT = "_measured", "_text"
"""Folders beside the plans', which begin with a letter or a digit."""

Launch = Callable[[Run, Path], None]
"""Runs the distill stage of a run whose recipe lies at that path, to its end."""


@dataclass(frozen=True)
class Candidate:
    """One plan as a run of its own."""

    name: str
    run: Run

    @property
    def recipe_file(self) -> Path:
        """The candidate's recipe, which every verb and the launcher take."""
        return self.run.dir / RECIPE

    @property
    def plan(self) -> PruningPlan:
        return PruningPlan.read(self.run.dir / PruningPlan.FILE)

    def evaluation(self, role: str) -> Evaluation:
        """The scores of teacher, pruned or distilled."""
        return Evaluation.read(self.run.dir / "eval" / f"{role}.json")


def search(run: Run, launch: Launch) -> str:
    """search.json and search.md; what they say for a reader. ``launch`` heals one candidate.

    A search that was killed goes on where it was. The parent's run directory is held all the time.

    Raises:
        UserError: what any stage refuses, fewer than two different plans, or columns that cannot rank them.
    """
    settings = run.recipe.search
    if settings is None:
        raise UserError(
            "search: the recipe does not say which plans to compare; add a section such as "
            "search: {plans: [{metric: block_influence, num_drop: 6}, {contiguous: true, num_drop: 6}]}"
        )
    with locked(run):
        candidates = _candidates(run, settings)
        preflight.preflight(candidates[0].run)
        _share_importance(run, candidates)
        for candidate in each(candidates, "search: plans cut", unit="plans"):
            _cut(candidate)
        same_as = _same_layers(candidates)
        distinct = [candidate for candidate in candidates if candidate.name not in same_as]
        _share_teacher(run, distinct, settings)
        for index, candidate in enumerate(each(distinct, "search: plans before their heal", unit="plans")):
            log.info("search: %s (%d of %d) before its heal", candidate.name, index + 1, len(distinct))
            _evaluate(candidate)
        for index, candidate in enumerate(each(distinct, "search: plans healed", unit="plans")):
            log.info("search: healing %s (%d of %d)", candidate.name, index + 1, len(distinct))
            _heal(candidate, launch)
        return _result(run, settings, candidates, same_as)


def _candidates(run: Run, settings: Search) -> list[Candidate]:
    """Every plan as a run, after what can be refused at once was."""
    from shoal.eval.compare.ranking import check_columns
    from shoal.eval.tasks.load import tasks_of

    recipe = run.recipe
    names = settings.tasks or recipe.eval.tasks
    tasks = tasks_of(replace(recipe.eval, tasks=names))
    check_columns(tasks, settings.rank_by)
    limits = {} if settings.limit else {name: n for name, n in recipe.eval.limits.items() if name in tasks}
    limit = settings.limit or recipe.eval.limit
    scored = replace(recipe.eval, tasks=names, suite=None, limit=limit, limits=limits, control=False, speed=False)
    prunes = [prune_of(plan, recipe.prune) for plan in settings.plans]
    measured = replace(recipe.measure, metrics=_metrics(recipe, prunes), **NO_PLAN_READS)
    distill = replace(recipe.distill, num_tokens=settings.num_tokens)
    if distill.writing.folder is None and any(source.path == TEACHER_TEXT for source in distill.data):
        distill = replace(distill, writing=replace(distill.writing, folder=str(run.dir / FOLDER / TEXT)))
    candidates = []
    for index, (plan, prune) in enumerate(zip(settings.plans, prunes, strict=True)):
        candidate = replace(
            recipe,
            run_dir=str(run.dir / FOLDER / plan.called),
            measure=measured,
            prune=prune,
            distill=distill,
            search=None,
            quantize=None,
            eval=scored,
            track=replace(recipe.track, name=f"{recipe.track.name or run.dir.name}-{plan.called}"),
            export=Export(gguf=recipe.export.gguf),
        )
        candidate = parse_recipe(as_dict(candidate), source=f"search.plans.{index} ({plan.called})")
        own = Run(candidate)
        _share_speed(run, own)
        try:
            refuse_impossible_plan(own)
        except UserError as error:
            raise UserError(f"search plan {plan.called}: {error}") from error
        candidates.append(Candidate(plan.called, own))
    return candidates


def _share_speed(run: Run, candidate: Run) -> None:
    """The teacher's time as `shoal eval` measured it in the run directory, where a plan has to keep to one."""
    target, measured = candidate.recipe.prune.target, run.dir / Speed.FILE
    if target is not None and target.ms_per_token is not None and measured.is_file():
        _copy(run.dir, candidate.dir, Speed.FILE)


def prune_of(plan: SearchPlan, prune: Prune) -> Prune:
    """The section prune that ``plan`` means beside the run's own.

    What the plan says pushes out what contradicts it: another way of choosing, another amount.
    """
    settings = plan.says
    if "drop" in settings:
        unset = Prune()
        cleared: dict[str, Any] = {name: getattr(unset, name) for name in NOT_BESIDE_DROP}
        cleared["protect"] = tuple(layer for layer in prune.protect if layer != "cornerstone")
        return replace(prune, **{**cleared, **settings})
    pushed: dict[str, Any] = {}
    if settings.keys() - {"edits"}:
        pushed["drop"] = None
        if prune.drop is not None and not settings.keys() & {"num_drop", "ratio"}:
            pushed["num_drop"] = len(prune.drop)
    if "num_drop" in settings:
        pushed["ratio"] = None
    if "ratio" in settings:
        pushed["num_drop"] = None
    if settings.keys() & {"num_drop", "ratio"}:
        pushed["target"] = None
    if "metric" in settings or "weights" in settings:
        pushed |= {"metric": None, "weights": {}}
    if "weights" in settings:
        pushed["contiguous"] = False
    if settings.get("contiguous", prune.contiguous) != prune.contiguous:
        pushed |= {"metric": None, "weights": {}}  # those of single layers do not score runs
    return replace(prune, **{**pushed, **settings})


def _metrics(recipe: Recipe, prunes: Sequence[Prune]) -> tuple[str, ...]:
    """measure.metrics with what plans choose by and the recipe does not measure yet."""
    from shoal.compress.metrics.registry import METRICS
    from shoal.compress.plan import DEFAULT_METRIC, DEFAULT_RUN_METRIC, is_automatic

    metrics = dict.fromkeys(recipe.measure.metrics)
    for prune in filter(is_automatic, prunes):
        usual = DEFAULT_RUN_METRIC if prune.contiguous else DEFAULT_METRIC
        for name in prune.weights or (prune.metric or usual,):
            if name in METRICS:
                metrics[name] = None
            elif recipe.measure.sweep is None:  # else it may be a swept column, which choosing layers finds out
                close = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(METRICS)}."
                raise UserError(
                    f"search.plans: {name!r} is no metric; {hint} To choose by a task, name it in measure.sweep.tasks"
                )
    return tuple(metrics)


def _share_importance(run: Run, candidates: Sequence[Candidate]) -> None:
    """One importance.json (and heads.json) for all plans, those of the run itself where it measures all they need."""
    from shoal.compress.plan import is_automatic

    automatic = [candidate for candidate in candidates if is_automatic(candidate.run.recipe.prune)]
    if not automatic:
        return
    measured = automatic[0].run.recipe.measure
    narrower = Run(replace(run.recipe, measure=replace(run.recipe.measure, **NO_PLAN_READS)))
    wider = Run(replace(run.recipe, measure=measured, run_dir=str(run.dir / FOLDER / MEASURED)))
    inputs = measure_inputs(wider)
    source = wider if differences(measure_inputs(narrower), inputs) else narrower
    measure(source)
    for candidate in automatic:
        _adopt(Importance, source.dir, candidate.run.dir, Importance.FILE, inputs)
        if measured.heads is not None:
            _adopt(Heads, source.dir, candidate.run.dir, Heads.FILE, heads_inputs(wider))


def _cut(candidate: Candidate) -> None:
    with locked(candidate.run):
        try:
            pruning.prune(candidate.run)
        except UserError as error:
            raise UserError(f"search plan {candidate.name}: {error}") from error
        _refuse_another_heal(candidate)
        write_text(candidate.recipe_file, memory_of(as_dict(candidate.run.recipe)))


def _refuse_another_heal(candidate: Candidate) -> None:
    """Refuse a candidate that was healed with other settings, before any other plan is."""
    path = candidate.run.dir / Training.FILE
    if not path.is_file():
        return
    inputs = distilling.training_inputs(candidate.run, candidate.plan)
    changed = differences(inputs, Training.read(path).provenance.inputs)
    if changed:
        raise UserError(
            f"search plan {candidate.name}: was healed with other settings ({'; '.join(changed)}). Set the recipe "
            f"back, delete {candidate.run.dir.parent} to heal all plans again, or choose another run_dir"
        )


def _same_layers(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Plan -> an earlier one that comes to the same layers.

    Raises:
        UserError: there is only one kind of plan.
    """
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for candidate in candidates:
        plan = candidate.plan
        name = first.setdefault((plan.drop, plan.edits), candidate.name)
        if name != candidate.name:
            same[candidate.name] = name
            log.info("search: %s comes to the same layers as %s, healed once", candidate.name, name)
    if len(first) < 2:
        raise UserError(
            f"search.plans: all {len(candidates)} come to the same plan ({candidates[0].plan.in_words()}), so there is "
            "nothing to choose; let them differ in metric, amount or layers"
        )
    return same


def _share_teacher(run: Run, candidates: Sequence[Candidate], settings: Search) -> None:
    """eval/teacher.json for all plans, scored once, and the refusal of columns on which it ranks nothing."""
    from shoal.eval.compare.ranking import measure_by

    name, first = "eval/teacher.json", candidates[0]
    inputs = evaluate.eval_inputs(first.run, first.run.teacher)
    _adopt(Evaluation, run.dir, first.run.dir, name, inputs)
    if not (first.run.dir / name).is_file() or differences(inputs, first.evaluation("teacher").provenance.inputs):
        log.info("search: the teacher, once for all plans")
        _evaluate(first)
    measure_by(first.evaluation("teacher"), settings.rank_by)
    for candidate in candidates[1:]:
        _adopt(Evaluation, first.run.dir, candidate.run.dir, name, inputs)


def _adopt(kind: type[Artifact], source: Path, target: Path, name: str, inputs: dict[str, Any]) -> None:
    """Copy an artifact into another run of the same identity, where it is not there yet."""
    if not (source / name).is_file() or differences(inputs, kind.read(source / name).provenance.inputs):
        return
    _copy(source, target, name)


def _copy(source: Path, target: Path, name: str) -> None:
    text = (source / name).read_text(encoding="utf-8")
    if not (target / name).is_file() or (target / name).read_text(encoding="utf-8") != text:
        write_text(target / name, text)


def _evaluate(candidate: Candidate) -> None:
    with locked(candidate.run):
        evaluate.evaluate(candidate.run)


def _heal(candidate: Candidate, launch: Launch) -> None:
    if not distilling.distill_is_done(candidate.run):
        free_memory()  # the ranks that are started need what this process still holds
        launch(candidate.run, candidate.recipe_file)
    _evaluate(candidate)


def _result(run: Run, settings: Search, candidates: Sequence[Candidate], same_as: dict[str, str]) -> str:
    from shoal.eval.compare.ranking import rank_plans
    from shoal.eval.report.search import search_text

    distinct = [candidate for candidate in candidates if candidate.name not in same_as]
    inputs = {
        **shaping(settings, Shapes.SEARCH, "search."),
        **{f"search.plans.{name}": value for plan in candidates for name, value in _identity(plan, same_as)},
    }
    path = run.dir / SearchResult.FILE
    if not is_done(SearchResult, path, inputs, "search"):
        ranking = rank_plans(
            distinct[0].evaluation("teacher"),
            {plan.name: (plan.evaluation("pruned"), plan.evaluation("distilled")) for plan in distinct},
            rank_by=settings.rank_by,
        )
        plans = tuple(_healed(candidate, same_as.get(candidate.name)) for candidate in candidates)
        trained = Training.read(distinct[0].run.dir / Training.FILE).num_tokens
        SearchResult(Provenance(inputs), trained, plans, ranking).write(path)
    result = SearchResult.read(path)
    write_text(path.with_suffix(".md"), search_text(result, every_score=True))
    winner = run.dir / FOLDER / result.winner.name
    log.info("search: %s, %s; the healed winner is %s", path, path.with_suffix(".md"), winner / "distilled")
    return search_text(result)


def _identity(candidate: Candidate, same_as: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """What identifies one plan's part of the result."""
    yield f"{candidate.name}.plan", candidate.plan.provenance.fingerprint
    if candidate.name not in same_as:
        for role in ("teacher", "pruned", "distilled"):
            yield f"{candidate.name}.{role}", candidate.evaluation(role).provenance.fingerprint


def _healed(candidate: Candidate, same_as: str | None) -> HealedPlan:
    plan, usual = candidate.plan, as_dict(Prune())
    section = {key: value for key, value in as_dict(candidate.run.recipe.prune).items() if value != usual[key]}
    return HealedPlan(candidate.name, section, plan.drop, plan.edits, plan.reason, len(plan.keep), same_as)
