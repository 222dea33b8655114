"""`shoal run --dry-run`: stage by stage what would be done, how long it takes here, and how much disk.

Nothing is written. Figures are those of the stages' own dry runs. Code of a stage is imported where it is used, so that
a verb loads only what it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.artifacts.artifact import CONTROL, Evaluation
from shoal.formatting import aligned, bytes_text, duration_text
from shoal.machine import free_disk
from shoal.progress import doing
from shoal.stages.distill import training_estimate, what_is_trained
from shoal.stages.evaluate import eval_inputs, roles
from shoal.stages.measure import measured
from shoal.stages.preflight import preflight
from shoal.stages.prune import expected_plan, student_estimate, what_is_cut
from shoal.stages.run import Run, out_of_date

UNKNOWN = "no estimate"


@dataclass(frozen=True)
class Stage:
    """What `shoal run` would do in one stage."""

    name: str
    state: str
    """`done`, `to do` or `made again`."""
    why: str = ""
    """What would be made, and what is out of date."""
    time: str = ""
    disk: str = ""
    num_bytes: int = 0
    told: str = ""
    """The stage's own dry run; empty where it has none."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be done."""
        return self.state == "done"


def run_dry_run(run: Run) -> str:
    """What `shoal run` would do, for a reader. Of several rounds that is the first which is not healed yet.

    Raises:
        UserError: what `shoal run` would refuse, before it begins or in a stage that is out of date.
    """
    preflight(run)
    own = run.first_open
    stages = [_measure(own)]
    with doing("prune --dry-run"):
        stages.append(cut := _prune(own))
    with doing("distill --dry-run"):
        stages.append(healed := _distill(own, cut=cut))
    if own is run:
        stages.append(_eval(run, cut=cut, healed=healed))
    else:
        stages.append(Stage("eval", "to do", f"once {run.called} is healed", UNKNOWN, UNKNOWN))
    stages.append(Stage("report", "to do", time=UNKNOWN, disk=UNKNOWN))  # it is written whatever is there
    rows = [("stage", "", "time here", "disk", "")]
    rows += [(each.name, each.state, each.time, each.disk, each.why) for each in stages]
    parts = [["dry run: nothing is written"], aligned(rows, left=(0, 1, 4)), [_disk(own, stages)]]
    if run.recipe.prune.rounds > 1:
        parts.append([f"rounds: this is {own.called}; each that follows measures, cuts and heals again"])
    parts += [[f"--- {stage.name} ---", stage.told] for stage in stages if stage.told]
    return "\n\n".join("\n".join(part) for part in parts)


def _state(changed: Sequence[str] | None) -> tuple[str, str]:
    """State and reason by what out_of_date gives."""
    if changed is None:
        return "to do", ""
    return ("made again", "; ".join(changed)) if changed else ("done", "")


def _measure(run: Run) -> Stage:
    states = [_state(out_of_date(kind, run.dir / kind.FILE, own)) for kind, own in measured(run).values()]
    due = [state for state in states if state[0] != "done"]
    if not due:
        return Stage("measure", "done")
    settings = run.recipe.measure
    what = f"{', '.join(settings.metrics)} over {settings.num_tokens:,} tokens"
    if settings.sweep is not None:
        what += f", sweeps of {', '.join(settings.sweep.operators)}"
    what += ", retrieval heads" if settings.heads is not None else ""
    return Stage("measure", due[0][0], "; ".join(filter(None, [*(why for _, why in due), what])), UNKNOWN, UNKNOWN)


def _prune(run: Run) -> Stage:
    state, why = _state(what_is_cut(run))
    if state == "done":
        return Stage("prune", state)
    plan = expected_plan(run)
    told, num_bytes = student_estimate(run, plan)
    why = "; ".join(filter(None, [why, plan.reason]))
    return Stage("prune", state, why, UNKNOWN, bytes_text(num_bytes), num_bytes, told)


def _distill(run: Run, *, cut: Stage) -> Stage:
    from shoal.train.dry_run import NotEstimated

    state, why = _state(what_is_trained(run)) if cut.is_done else ("to do", "the student of the new cut")
    if state == "done":
        return Stage("distill", state)
    if run.recipe.eval.control:
        why = "; ".join(filter(None, [why, "the control too"]))
    try:
        size = training_estimate(run, expected_plan(run))
    except NotEstimated as error:
        return Stage("distill", state, why, UNKNOWN, UNKNOWN, told=str(error))
    time = f"about {duration_text(size.seconds)}"
    return Stage("distill", state, why, time, bytes_text(size.num_bytes), size.num_bytes, size.text)


def _eval(run: Run, *, cut: Stage, healed: Stage) -> Stage:
    from shoal.eval.evaluate import num_items
    from shoal.eval.suites import in_words, rest_in_words, work_of
    from shoal.eval.tasks.load import tasks_of

    settings = run.recipe.eval
    wanted = ["teacher", "pruned", *([CONTROL] if settings.control else []), "distilled"]
    there = roles(run)
    final = {"teacher": True, "pruned": cut.is_done, CONTROL: healed.is_done, "distilled": healed.is_done}
    files = {role: run.dir / "eval" / f"{role}.json" for role in wanted}
    scored = {
        role
        for role in wanted
        if final[role] and out_of_date(Evaluation, files[role], eval_inputs(run, there[role])) == []
    }
    due = [role for role in wanted if role not in scored]
    if not due:
        return Stage("eval", "done")
    tasks = tasks_of(settings, seed=run.recipe.seed)
    num_samples = settings.samples.n if settings.samples else 0
    work = work_of(
        tasks, num_items(tasks, settings), perplexity_tokens=settings.perplexity_tokens, num_samples=num_samples
    )
    known = (rest_in_words(Evaluation.read(files[role]), due) for role in wanted if role in scored)
    time = next(filter(None, known), None)
    why = f"{', '.join(due)}, each: {in_words(work)}" + (f"; {time}" if time else "; time is known once one is scored")
    return Stage("eval", "to do", why, UNKNOWN, UNKNOWN)


def _disk(run: Run, stages: Sequence[Stage]) -> str:
    needed, free = sum(stage.num_bytes for stage in stages), free_disk(run.root)
    line = f"disk: {bytes_text(needed)} needed under {run.root} as far as it is known, {bytes_text(free)} free there"
    return line if needed <= free else f"{line}: NOT ENOUGH, free some space or set run_dir to another disk"
