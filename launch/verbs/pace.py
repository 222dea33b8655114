"""How long the stages of a run take here: their operations over the rate of a matrix product, which is measured.

Nothing is tried, so that a busy machine comes to the same. Left out are the cut, sweeps, removals one by one, texts
that the teacher writes, recording, and loading models and libraries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.artifacts.plan import Plan
from shoal.machine import ranks_to_start
from shoal.models.cost import active_weights
from shoal.models.load import without_data
from shoal.recipe.evaluate import Eval
from shoal.runtime import device

from .distill import checkpoint_of, training_spec, watched_by
from .prune import expected_plan
from .run import Run

if TYPE_CHECKING:
    from shoal.eval.evaluate import Work
    from shoal.train.student.spec import TrainSpec

WRITTEN = 4
"""Tokens that are read in the time of one that is written, in batches of 16 on two cores (3.5 measured)."""
LEAST_ROWS = 16
"""A step that writes fewer rows takes as long on a CPU, for every weight is read."""


def run_seconds(*runs: Run) -> list[float]:
    """Seconds of measuring, training, scoring and timing of each run, whatever of it is done. A step of all takes as
    long as one of the first.

    Raises:
        UserError: what these stages would refuse; NotEstimated, a family that cannot be told without running it.
    """
    from shoal.train.preflight.memory import job
    from shoal.train.preflight.throughput import step_time

    plan = expected_plan(runs[0])
    steps = [step_time(job(spec)).seconds for spec in training_specs(runs[0], plan)]
    return [_seconds(run, training_specs(run, plan), steps) for run in runs]


def _seconds(run: Run, specs: Sequence[TrainSpec], steps: Sequence[float]) -> float:
    """Seconds of ``run``, whose trainings ``specs`` take so many a step."""
    trained = (
        spec.num_steps * each + watch_seconds(run, spec.num_steps) for spec, each in zip(specs, steps, strict=True)
    )
    scores = eval_seconds(run, eval_work(run, run.recipe.eval), 2 + len(specs))
    return measure_seconds(run) + sum(trained) + scores + speed_seconds(run)


def training_specs(run: Run, plan: Plan) -> list[TrainSpec]:
    """The training of the student of ``plan`` on this machine, and that of its control where the recipe has one."""
    from shoal.train.student.control import control_spec
    from shoal.train.student.spec import Ranks

    count = ranks_to_start(run.recipe.num_processes)
    ranks = Ranks(count, min(count, ranks_to_start(None)) if device().type != "cpu" else count, device())
    spec = training_spec(run, plan, ranks)
    return [spec, control_spec(spec)] if run.recipe.eval.control else [spec]


def measure_seconds(run: Run) -> float:
    """Seconds of the passes over the text: one, and one back and forth where a metric reads gradients."""
    from shoal.compress.metrics.registry import METRICS

    settings = run.recipe.measure
    needs = {METRICS[name].needs for name in settings.metrics}
    passes = len(needs & {"hidden"}) + 3 * len(needs & {"gradients"})
    return passes * settings.num_tokens * _token_seconds(run)


def watch_seconds(run: Run, num_steps: int) -> float:
    """Seconds of scoring the student while it trains."""
    watch, settings = run.recipe.distill.watch, watched_by(run)
    if watch is None or settings is None:
        return 0.0
    every = math.ceil(watch.eval_steps * (num_steps if watch.eval_steps < 1 else 1))
    return eval_seconds(run, eval_work(run, settings), 1 + math.ceil(num_steps / every))


def speed_seconds(run: Run) -> float:
    """Seconds of timing teacher, pruned and distilled model in turns, the first of which is not timed."""
    from shoal.eval.speed import NEW_TOKENS, PROMPT_TOKENS, rounds_of

    if not (speed := run.recipe.eval.speed):
        return 0.0
    rounds = rounds_of(None if isinstance(speed, bool) else speed, device().type)
    least = LEAST_ROWS if device().type == "cpu" else 1
    turns = ((1 + timed, size * PROMPT_TOKENS, max(size, least) * NEW_TOKENS) for size, timed in rounds.items())
    return 3 * sum(count * (read + WRITTEN * written) for count, read, written in turns) * _token_seconds(run)


def eval_work(run: Run, settings: Eval) -> Work:
    """What scoring by ``settings`` asks of one model."""
    from shoal.eval.evaluate import num_items, work_of
    from shoal.eval.tasks.load import tasks_of

    tasks = tasks_of(settings, seed=run.recipe.seed)
    return work_of(tasks, num_items(tasks, settings), perplexity_tokens=settings.perplexity_tokens)


def eval_seconds(run: Run, work: Work, num_models: int) -> float:
    """Seconds of scoring so many models, each as if nothing were cut from it."""
    return num_models * (work.read + WRITTEN * work.written) * _token_seconds(run)


def _token_seconds(run: Run) -> float:
    """Seconds in which the full model reads a token: two operations per weight that it goes through."""
    from shoal.compress.surgery.quantised import without_quantization
    from shoal.train.preflight.throughput import assumed_rate

    model = checkpoint_of(run)
    weights = active_weights(without_data(without_quantization(model.config)[0]))
    ranks = 1 if device().type == "cpu" else ranks_to_start(run.recipe.num_processes)  # cores are counted together
    return 2 * weights / assumed_rate(device(), model.loaded_dtype()) / ranks
