"""`--dry-run` of every verb: what would be done, what would come of it, and what it takes here.

Nothing is written and nothing is trained. Code of a stage is imported where it is used, so that a verb loads only what
it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.artifacts.evaluation import CONTROL
from shoal.artifacts.plan import Plan
from shoal.formatting import aligned, bytes_text, duration_text, paragraphs
from shoal.machine import disk_line
from shoal.progress import doing

from . import prune
from .distill import check_distill, trainings_due, what_is_trained
from .evaluate import eval_inputs, require_models_of_this_run, roles, scores_of
from .measure import check_measure, importance_of
from .pace import eval_seconds, eval_work, measure_seconds, training_specs
from .pipeline import preflight
from .run import Run

NOTHING_WRITTEN = "dry run: nothing is written and nothing is trained"


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
        return f"{NOTHING_WRITTEN}\n\n{stage.told or _joined(stage.state, stage.why)}"
    rows = [("stage", "", "time on this machine", "disk", ""), *(stage.row for stage in stages)]
    disk = disk_line(sum(stage.num_bytes or 0 for stage in stages), folder)
    told = [stage for stage in stages if stage.told and not stage.is_done]
    parts = [[NOTHING_WRITTEN], aligned(rows, left=(0, 1, 4)), [disk]]
    return paragraphs([*parts, *([f"--- {stage.name} ---", stage.told] for stage in told)])


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
    prune.read_importance(run)  # refuses another run's
    return [_prune(run)]


def _training(run: Run) -> list[Stage]:
    check_distill(run)
    plan = prune.read_plan(run) if (run.dir / Plan.FILE).is_file() else prune.expected_plan(run)
    stage = training_estimate(run, plan)
    return [replace(stage, told=f"drops:   {plan.reason}\n{stage.told}")]


def _record(run: Run) -> list[Stage]:
    settings = run.recipe.distill
    check_distill(run)
    return [Stage("record", "to do", f"{settings.budget:,} tokens in rows of {settings.sequence_length:,}")]


def _scores(run: Run) -> list[Stage]:
    require_models_of_this_run(run, there := roles(run))
    return [_eval(run, list(there), dict.fromkeys(there, True))]


def _report(run: Run) -> list[Stage]:
    settings = run.recipe.export
    gguf = "one GGUF file" if settings.gguf else ""
    pushed = f"a push to {settings.hub_repo}" if settings.hub_repo else ""
    return [Stage("report", "to do", ", ".join(filter(None, ["report.html, report.md", gguf, pushed])))]


DRY_RUNS: dict[str, Callable[[Run], list[Stage]]] = {
    "run": _all,
    "measure": _checked_measure,
    "prune": _pruning,
    "record": _record,
    "distill": _training,
    "eval": _scores,
    "report": _report,
    "push": lambda run: [Stage("push", "to do", f"{run.dir / 'distilled'} to {run.recipe.export.hub_repo}")],
}
"""Verb -> what it would do, stage by stage."""


def _measure(run: Run) -> Stage:
    state, why = _state(importance_of(run).changed())
    settings = run.recipe.measure
    work = f"{', '.join(settings.metrics)} over {settings.num_tokens:,} tokens"
    if settings.sweep is not None:
        work += f", ablation of {', '.join(settings.sweep.operators)}"
    return Stage("measure", state, _joined(why, work), None if state == "done" else measure_seconds(run))


def _joined(*words: str) -> str:
    return "; ".join(filter(None, words))


def _state(changed: Sequence[str] | None) -> tuple[str, str]:
    """State and reason by what out_of_date gives."""
    if changed is None:
        return "to do", ""
    return ("made again", "; ".join(changed)) if changed else ("done", "")


def _prune(run: Run) -> Stage:
    from shoal.compress.apply import changes_of
    from shoal.compress.estimate import cut_estimate

    has_student = (run.dir / "student" / "config.json").is_file()
    state, why = _state(prune.plan_of(run).changed() if has_student else None)
    is_done = state == "done"
    if not is_done:
        prune.refuse_impossible_plan(run)
    plan = prune.read_plan(run) if is_done else prune.expected_plan(run)
    prune.refuse_impossible_changes(run, plan)
    recipe, out = run.recipe, run.dir / "student"
    how = {"dtype": recipe.dtype, "trust_remote_code": recipe.trust_remote_code}
    told, num_bytes = cut_estimate(run.teacher, plan, out, changes=changes_of(recipe.prune), text=recipe.measure, **how)
    told = "\n".join([told, *prune.sacrifice(run, None, plan)])
    return Stage("prune", state, _joined(why, plan.reason), None, 0 if is_done else num_bytes, told)


def _distill(run: Run, *, cut: Stage) -> Stage:
    from shoal.train.preflight.memory import NotEstimated

    state, why = _state(what_is_trained(run)) if cut.is_done else ("to do", "the student of the new plan")
    if state == "done":
        return Stage("distill", state)
    if run.recipe.eval.control:
        why = _joined(why, "the control too")
    try:
        found = training_estimate(run, prune.read_plan(run) if cut.is_done else prune.expected_plan(run))
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
    work = eval_work(run, settings)
    speed = "; their speed is measured as well" if settings.speed else ""
    seconds = eval_seconds(run, work, len(due))
    return Stage("eval", "to do", f"{', '.join(due)}, each: {work}{speed}", seconds)


def training_estimate(run: Run, plan: Plan) -> Stage:
    """What training the student of ``plan`` takes on this machine, with its control."""
    from shoal.train.preflight.estimate import estimate

    spec, *control = training_specs(run, plan)
    if control and run.dir not in trainings_due(run, plan):
        told, seconds, num_bytes = estimate(control[0], run.dir / CONTROL)
        return Stage(
            "distill", "to do", "", seconds, num_bytes, f"the control alone, as the student is trained\n{told}"
        )
    told, seconds, num_bytes = estimate(spec, run.dir, control=control[0] if control else None)
    return Stage("distill", "to do", "", seconds, num_bytes, told)
