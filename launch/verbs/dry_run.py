"""`shoal run --dry-run`: stage by stage what would be done, how long it takes here, and how much disk.

Nothing is written. Figures are those of the stages' own dry runs. Code of a stage is imported where it is used, so that
a verb loads only what it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.artifacts.evaluation import CONTROL
from shoal.errors import UserError
from shoal.formatting import aligned, bytes_text, duration_text
from shoal.machine import DTYPES, flops_per_second, free_disk
from shoal.models.cost import model_cost
from shoal.models.load import without_data
from shoal.progress import doing
from shoal.runtime import device

from .distill import training_estimate, what_is_trained
from .evaluate import eval_inputs, roles, scores_of
from .measure import importance_of
from .pipeline import preflight
from .plan import expected_plan
from .prune import student_estimate, what_is_cut
from .run import Run

UNKNOWN = "no estimate"
READING_SHARE = 0.8
"""Of a CPU's rate of matrix products that evaluation and measuring get by the tokens of work_of, which are more than
there are: the demo model's 27 tasks took 1.07 to 1.15 of it on a core of an EPYC."""
BACKWARD = 3
"""Forwards that one forward with its backward takes as long as."""


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
    """What `shoal run` would do, for a reader.

    Raises:
        UserError: what `shoal run` would refuse, before it begins or in a stage that is out of date.
    """
    preflight(run)
    stages = [_measure(run)]
    with doing("prune --dry-run"):
        stages.append(cut := _prune(run))
    with doing("distill --dry-run"):
        stages.append(healed := _distill(run, cut=cut))
    stages.append(_eval(run, cut=cut, healed=healed))
    stages.append(Stage("report", "to do", time=UNKNOWN, disk=UNKNOWN))  # it is written whatever is there
    rows = [("stage", "", "time here", "disk", "")]
    rows += [(each.name, each.state, each.time, each.disk, each.why) for each in stages]
    parts = [["dry run: nothing is written"], aligned(rows, left=(0, 1, 4)), [_disk(run, stages)]]
    parts += [[f"--- {stage.name} ---", stage.told] for stage in stages if stage.told]
    return "\n\n".join("\n".join(part) for part in parts)


def _state(changed: Sequence[str] | None) -> tuple[str, str]:
    """State and reason by what out_of_date gives."""
    if changed is None:
        return "to do", ""
    return ("made again", "; ".join(changed)) if changed else ("done", "")


def _measure(run: Run) -> Stage:
    state, why = _state(importance_of(run).changed())
    if state == "done":
        return Stage("measure", state)
    settings = run.recipe.measure
    work = f"{', '.join(settings.metrics)} over {settings.num_tokens:,} tokens"
    if settings.sweep is not None:
        work += f", sweeps of {', '.join(settings.sweep.operators)}"
    return Stage("measure", state, "; ".join(filter(None, [why, work])), _measuring_time(run), UNKNOWN)


def _measuring_time(run: Run) -> str:
    """Of metrics that a forward over the text gives, or one with its backward: what others take depends on what is not
    known before."""
    from shoal.compress.metrics.registry import METRICS

    settings = run.recipe.measure
    needs = {METRICS[name].needs for name in settings.metrics}
    if settings.sweep or needs & {"loss", "merges"}:
        return UNKNOWN
    return _reading_time(run, (("hidden" in needs) + BACKWARD * ("gradients" in needs)) * settings.num_tokens)


def _reading_time(run: Run, num_tokens: float) -> str:
    """How long the teacher reads so many tokens here; on an accelerator, whose share nobody has measured, unknown."""
    if device().type != "cpu" or run.recipe.dtype not in DTYPES:
        return UNKNOWN
    try:
        cost = model_cost(without_data(run.config(), trust_remote_code=run.recipe.trust_remote_code))
    except UserError:  # of a mixture of experts of which it is not known how many a token is sent to
        return UNKNOWN
    with doing("timing a matrix product"):
        rate = READING_SHARE * flops_per_second(device(), getattr(torch, run.recipe.dtype))
    return f"about {duration_text(2 * cost.active_parameters * num_tokens / rate)}"


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
    from shoal.eval.suites import in_words, work_of
    from shoal.eval.tasks.load import tasks_of

    settings = run.recipe.eval
    wanted = ["teacher", "pruned", *([CONTROL] if settings.control else []), "distilled"]
    scored_roles = roles(run)
    final = {"teacher": True, "pruned": cut.is_done, CONTROL: healed.is_done, "distilled": healed.is_done}
    scored = {
        role for role in wanted if final[role] and scores_of(run, role, eval_inputs(run, scored_roles[role])).is_there()
    }
    due = [role for role in wanted if role not in scored]
    if not due:
        return Stage("eval", "done")
    tasks = tasks_of(settings, seed=run.recipe.seed)
    work = work_of(tasks, num_items(tasks, settings), perplexity_tokens=settings.perplexity_tokens)
    why = f"{', '.join(due)}, each: {in_words(work)}"
    speed = "; how fast they are is measured on top" if settings.speed else ""
    return Stage("eval", "to do", why + speed, _reading_time(run, len(due) * work.tokens), UNKNOWN)


def _disk(run: Run, stages: Sequence[Stage]) -> str:
    needed, free = sum(stage.num_bytes for stage in stages), free_disk(run.dir)
    line = f"disk: {bytes_text(needed)} needed under {run.dir} as far as it is known, {bytes_text(free)} free there"
    return line if needed <= free else f"{line}: NOT ENOUGH, free some space or set run_dir to another disk"
