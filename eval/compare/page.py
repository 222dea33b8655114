"""A comparison of runs: words and tables for the terminal, compare.md and compare.html, plain values for scripts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from shoal.artifacts.evaluation import FEW_ITEMS, MODEL, Interval, TaskScore
from shoal.atomic_files import make_folder, write_json, write_text
from shoal.figures.style import clean
from shoal.formatting import bytes_text, count_text, listed
from shoal.stats.paired import SIGNIFICANT, minimal_detectable_difference

from ..harness.rates import CALIBRATION_ERROR
from ..report import wording
from ..report.findings import FEW_CHANGED_MEAN, FEW_ITEMS_MEAN, SIGNAL_SIGMAS, Row, is_share, task_result
from ..report.page import DASH, Picture, Table, render
from .comparable import dtype_of
from .compare import COMPARED, Cell, Model, RunComparison, same_models
from .figure import draw, pareto_panels
from .standings import CONTROLLED, Groups, Standing, controls, standings, task_groups

log = logging.getLogger(__name__)

NAME = "compare"
COSTS = ("Model", "Parameters", "Layers", "On disk", "Decoding, tokens/s", "Training tokens", "Training hours")


def write_comparison(comparison: RunComparison, folder: Path) -> Path:
    """The path of compare.html in ``folder``, written with compare.md, compare.json and the figure as SVG and PNG.

    Raises:
        UserError: the folder cannot be written.
    """
    make_folder(folder, setting="--out")
    told = contents(comparison, draw(comparison, folder))
    write_json(folder / f"{NAME}.json", as_data(comparison), setting="--out")
    write_text(folder / f"{NAME}.md", render("compare", "md", **told))
    path = folder / f"{NAME}.html"
    write_text(path, render("compare", "html", **told))
    log.info("comparison is at %s", path)
    return path


def contents(comparison: RunComparison, figure: Picture | None = None) -> dict[str, Any]:
    """What the template of a comparison tells."""
    groups = task_groups(comparison)
    ranked = standings(comparison, groups) if groups.tasks else []
    kinds = "runs and models" if any(own.is_model for own in comparison.contenders) else "runs"
    names = listed(f"{own.letter} ({own.name})" for own in comparison.contenders)
    return {
        "title": f"{len(comparison.contenders)} {kinds} compared: {names}",
        "headline": list(verdicts(comparison)),
        "runs": _runs_table(comparison),
        "standings": _standing_table(comparison, ranked, groups),
        "ranked": groups.that_rank,
        "inside": _inside(groups.that_rank),
        "in_trained_form": groups.columns == {"in"},
        "outside": groups.outside,
        "controls": _control_table(comparison, groups),
        "costs": Table("Costs", COSTS, tuple(map(_cost_row, comparison.models))),
        "figure": figure,
        "panels": pareto_panels(comparison),
        "has_teacher": any(model.role == "teacher" for model in comparison.models),
        "known": _known(comparison),
        "first": comparison.contenders[0].letter,
        "has_checkpoint": any(own.is_model for own in comparison.contenders),
        "tasks": [_task_table(comparison, index) for index in range(len(comparison.tasks))],
        "versions": _versions_table(comparison),
    }


def comparison_text(comparison: RunComparison) -> str:
    """The page for a terminal, without its figure and the versions."""
    return clean(render("compare", "text", **contents(comparison)).rstrip())  # no name may steer the terminal


def as_data(comparison: RunComparison) -> dict[str, Any]:
    """compare.json: runs, models, tasks as results.json has them but of all these models, where they stand, notes."""
    groups = task_groups(comparison)
    return {
        "schema": "shoal/comparison/1",
        "runs": [
            {"letter": c.letter, "name": c.name, "folder": str(c.run.folder), "is_checkpoint": c.is_model}
            for c in comparison.contenders
        ],
        "tasks": [_task_data(comparison, index) for index in range(len(comparison.tasks))],
        "models": [_model_data(model) for model in comparison.models],
        "ranked_by": list(groups.that_rank),
        "standings": [
            {
                "run": own.model.contender.letter,
                "role": own.model.role,
                "mean": _fields(own.mean),
                "against": _fields(own.against),
                "kept": {title: _fields(value) for title, value in own.kept.items()},
                "wording_gap": _fields(own.form),
            }
            for own in standings(comparison, groups)
        ],
        "num_differences": comparison.num_differences,
        "left_out": list(comparison.left_out),
        "notes": list(comparison.notes),
    }


def _model_data(model: Model) -> dict[str, Any]:
    ratio = model.speed_ratio
    return {
        "run": model.contender.letter,
        "role": model.role,
        "name": f"{model.contender.letter} {model.role}",
        "dtype": dtype_of(model.contender, model.role),
        **_fields(model.evaluation, ("num_layers", "num_parameters", "num_bytes")),
        "decode_ratio": ratio and ratio.value,
        "decode_ratio_of_rounds": ratio and ratio.limits,
    }


def _task_data(comparison: RunComparison, index: int) -> dict[str, Any]:
    task, first = comparison.tasks[index], comparison.contenders[0].letter
    cells = [
        (f"{own.contender.letter} {own.role}", f"{first} {own.rival}", own.cells[index]) for own in comparison.models
    ]
    row = Row(
        task.key,
        task.ability,
        scores={name: cell.score for name, _, cell in cells},
        differences={(rival, name): cell.difference for name, rival, cell in cells if cell.difference},
        retained={name: cell.kept for name, _, cell in cells if cell.kept},
        teacher_sigmas=None,
        adjusted_p={(rival, name): cell.adjusted_p for name, rival, cell in cells if cell.adjusted_p is not None},
    )
    return task_result(row, has_signal=task.task not in comparison.silent)


def _fields(value: Any, names: Sequence[str] | None = None) -> Any:
    """All fields of a value, or those named, as JSON can hold them; None of none."""
    told = {name: getattr(value, name) for name in (names or vars(value))} if value else {}
    return {key: own if not isinstance(own, float) or math.isfinite(own) else None for key, own in told.items()} or None


def verdicts(comparison: RunComparison) -> Iterator[str]:
    """Every run against the first, sentence by sentence."""
    yield from _first(comparison)
    first = comparison.contenders[0].letter
    compared = [model for model in comparison.models if any(cell.difference for cell in model.cells)]
    for model in sorted(compared, key=lambda model: model.role != "distilled"):
        assert model.rival is not None
        dtypes = {dtype_of(model.contender, model.role), dtype_of(comparison.contenders[0], model.rival)}
        against = f"{model.contender.letter} {model.role} against {first} {model.rival}"
        against += ", in another precision" if len(dtypes) > 1 else ""
        cells = [cell for cell in model.cells if cell.score.task not in comparison.silent]
        trained = [cell for cell in cells if cell.score.column == "in"]
        for where, own in (("", [c for c in cells if c not in trained]), (", in the trained wording", trained)):
            if told := _told(own):
                yield f"{against}{where}: {told}."
    if comparison.num_differences:
        yield (
            f"A difference is “better” or “worse” only if p is below {SIGNIFICANT:g} after Holm's correction over all "
            f"{comparison.num_differences} differences. The intervals are not corrected, so an interval can exclude 0 "
            "without a verdict."
        )


def _told(cells: Sequence[Cell]) -> str:
    """`better on ...; no clear difference on 2 of 3 tasks`; empty where nothing is compared."""
    by_verdict = {verdict: [cell.score for cell in cells if cell.verdict == verdict] for verdict in ("better", "worse")}
    parts = [f"{verdict} on {wording.tasks_text(some)}" for verdict, some in by_verdict.items() if some]
    if unclear := sum(cell.verdict == "unclear" for cell in cells):
        parts.append(f"no clear difference on {unclear} of {len(cells)} {'task' if len(cells) == 1 else 'tasks'}")
    return "; ".join(parts)


def _first(comparison: RunComparison) -> Iterator[str]:
    """Which model ranks first, by which mean, and which models are above the teacher."""
    groups = task_groups(comparison)
    ranked = [standing for standing in standings(comparison, groups) if standing.model.role != "teacher"]
    if ranked and ranked[0].mean:
        of_several = "the mean of " if len(groups.that_rank) > 1 else ""
        best = [standing for standing in ranked if standing.mean and standing.mean.value == ranked[0].mean.value]
        shown = f"{wording.kept_text(ranked[0].mean)} in {of_several}{_inside(groups.that_rank)}."
        most = "reaches the most of the" if ranked[0].model.role == MODEL else "keeps the most of its"
        if len(best) > 1:
            yield f"No model is first: {listed([_model_name(standing.model) for standing in best])} have {shown}"
        else:
            yield f"{_model_name(ranked[0].model)} {most} teacher: {shown}"
    above = {
        title: [
            _model_name(standing.model)
            for standing in ranked
            if standing.model.role != MODEL and (kept := standing.kept[title]) and kept.ci_low > 1
        ]
        for title in groups.tasks
    }
    if told := "; ".join(f"in {_inside([title])} {listed(names)}" for title, names in above.items() if names):
        yield (
            f"Above the teacher: {told}. Pruning cannot cause that, so the surplus is learnt from the training text."
        )


def _runs_table(comparison: RunComparison) -> Table:
    rows = []
    for contender in comparison.contenders:
        run = contender.run
        cut = run.plan.in_words() if run.plan else "none" if contender.is_model else "no plan.json"
        how = run.plan.reason if run.plan else DASH
        rows.append((contender.letter, contender.name, run.model if run.recipe else DASH, cut, how))
    columns = ("Run", "Name", "Model", "Dropped", "How it was chosen")
    return Table("Runs", columns, tuple(rows), frozenset(range(len(columns))))


def _standing_table(comparison: RunComparison, ranked: Sequence[Standing], groups: Groups) -> Table:
    """What every model keeps by column."""
    columns = {"Model": [_model_name(standing.model) for standing in ranked]}
    if len(groups.that_rank) > 1:
        columns["Mean"] = [wording.kept_text(standing.mean) for standing in ranked]
    if any(standing.against for standing in ranked):
        against = [_change_text(standing.against) for standing in ranked]
        columns[f"Against {comparison.contenders[0].letter}"] = against
    columns |= {title: [wording.kept_text(standing.kept[title]) for standing in ranked] for title in groups.tasks}
    if any(standing.form for standing in ranked):
        columns["Wording gap"] = [_change_text(standing.form) for standing in ranked]
    rows = tuple(zip(*columns.values(), strict=True))
    return Table("Share kept, highest first", tuple(columns), rows)


def _control_table(comparison: RunComparison, groups: Groups) -> Table:
    rows = [
        (f"{letter}, {effect} ({after} − {before})", *map(_change_text, changes.values()))
        for (letter, effect), changes in controls(comparison, groups).items()
        for before, after in [CONTROLLED[effect]]
    ]
    caption = "Control: the teacher after the same training on the same text"
    return Table(caption, ("Change of the share kept", *groups.tasks), tuple(rows))


def _inside(titles: Sequence[str]) -> str:
    """Titles inside a sentence."""
    return listed(title[:1].lower() + title[1:] for title in titles)


def _change_text(change: Interval | None) -> str:
    return DASH if change is None else wording.points_text(astuple(change))


def _cost_row(model: Model) -> tuple[str, ...]:
    evaluation, run = model.evaluation, model.contender.run
    training = run.training if model.role == "distilled" else None
    speed = DASH
    if model.speed:
        ratio = "" if model.speed_ratio is None or model.role == "teacher" else f" ({model.speed_ratio.in_words()})"
        speed = f"{model.speed.decode_tokens_per_s:,.1f}{ratio}"
    cost = (f"{training.num_tokens:,}", f"{training.seconds / 3600:,.2f}") if training else (DASH, DASH)
    size = (count_text(evaluation.num_parameters), str(evaluation.num_layers), bytes_text(evaluation.num_bytes))
    return (_model_name(model), *size, speed, *cost)


def _model_name(model: Model) -> str:
    return model.role if model.role == "teacher" else f"{model.contender.letter} {model.role}"


def _task_table(comparison: RunComparison, index: int) -> Table:
    """One task: every model's score, what it keeps, and its difference to the first run with the test behind it."""
    task, first = comparison.tasks[index], comparison.contenders[0]
    columns = ("Model", "Score", "Kept", f"Against {first.letter}", "p (Holm)", "Would show from")
    rows = [_task_row(comparison, model, index) for model in comparison.models]
    if any(model.cells[index].score.rates.get(CALIBRATION_ERROR) is not None for model in comparison.models):
        errors = [wording.calibration_text(model.cells[index].score) for model in comparison.models]
        columns, rows = (*columns, "Calibration error"), [(*row, own) for row, own in zip(rows, errors, strict=True)]
    direction = "" if task.higher_is_better else ", lower is better"
    about = f"version {task.version}, {task.num_fewshot} shots"
    asked = ", ".join(
        filter(None, (f"{task.metric}{direction}", f"{task.n:,} items", wording.limits_text(task), about))
    )
    caption = f"{', '.join(wording.score_words(task))}: {asked}"
    return Table(caption, columns, tuple(rows), folded=len(comparison.tasks) > 12)


def _task_row(comparison: RunComparison, model: Model, index: int) -> tuple[str, ...]:
    cell = model.cells[index]
    row = (_model_name(model), wording.score_text(cell.score), wording.kept_text(cell.kept))
    if cell.difference is None:
        return (*row, _no_difference(comparison, model), DASH, DASH)
    first = next(
        other
        for other in comparison.models
        if other.role == model.rival and other.contender.letter == comparison.contenders[0].letter
    )
    change = wording.difference_text(cell.difference, cell.score)
    return (*row, change, wording.p_text(cell.adjusted_p), _least_text(first.cells[index].score, cell.score))


def _least_text(before: TaskScore, after: TaskScore) -> str:
    """The smallest true difference that these items would show four times out of five."""
    least, share = minimal_detectable_difference(before, after), is_share(after)
    if not math.isfinite(least) or (share and least >= 1):
        return "too few items"
    return f"{100 * least:.1f} points" if share else f"{least:.3f}"


def _no_difference(comparison: RunComparison, model: Model) -> str:
    first = comparison.contenders[0]
    if model.role not in COMPARED or model.contender.letter == first.letter:
        return DASH
    return "the same model" if model.rival else f"{first.letter} has none"


def _known(comparison: RunComparison) -> list[str]:
    """Notes that limit what the numbers show."""
    lines = [*([comparison.precision] if comparison.precision else []), *comparison.left_out]
    for group in same_models(comparison):
        letters = listed(model.contender.letter for model in group)
        lines.append(f"The {group[0].role} models of {letters} have equal weights.")
    if few := [task for task in comparison.tasks if task.n < FEW_ITEMS]:
        lines.append(f"Too few items: fewer than {FEW_ITEMS}, so {FEW_ITEMS_MEAN}: {wording.tasks_text(few)}.")
    if silent := [task for task in comparison.tasks if task.task in comparison.silent]:
        asked = wording.tasks_text(silent)
        lines.append(f"Near chance: on {asked}, the teacher is not {SIGNAL_SIGMAS:.0f} standard errors above chance.")
    if any(cell.difference and cell.difference.few_changed for model in comparison.models for cell in model.cells):
        lines.append(FEW_CHANGED_MEAN)
    return [*lines, *comparison.notes]


def _versions_table(comparison: RunComparison) -> Table:
    """Versions and settings of the evaluations, run by run."""
    provenances = [next(iter(c.run.evaluations.values())).provenance for c in comparison.contenders]
    fields = list(dict.fromkeys(field for provenance in provenances for field in provenance.environment))
    values = [(field, [str(p.environment.get(field, DASH)) for p in provenances]) for field in fields]
    values += [(field, [str(p.inputs.get(field, DASH)) for p in provenances]) for field in ("attention", "seed")]
    values.append(("dtype", [dtype_of(c, next(iter(c.run.evaluations))) for c in comparison.contenders]))
    columns = ("Setting", *(c.letter for c in comparison.contenders))
    rows = tuple((field.replace("_", " "), *row) for field, row in values)
    return Table("Versions and settings of the evaluations", columns, rows, frozenset(range(len(columns))), folded=True)
