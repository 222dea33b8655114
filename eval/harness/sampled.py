"""Further texts of generated tasks, drawn and matched as the greedy ones are, and pass@k over them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from shoal.artifacts.evaluation import TaskScore
from shoal.recipe.evaluate import Samples
from shoal.stats.paired import is_binary
from shoal.stats.pass_at import with_samples

from .engine import CausalLM
from .samples import metric_of

log = logging.getLogger(__name__)


def sampled(
    lm: CausalLM, tasks: dict[str, Any], scores: Sequence[TaskScore], samples: Samples, *, seed: int
) -> tuple[TaskScore, ...]:
    """``scores`` on rank 0, those of generated tasks with pass@k; all ranks call this with the scores of all.

    The tasks hold their requests since they were scored. What is right is decided by the filters and the metric of the
    task, one drawn text of every item at a time. A task whose items are not right or wrong has no pass@k.
    """
    asked = {score.task: tasks[score.task].instances for score in scores if _can_be_sampled(tasks, score)}
    if not asked:
        log.warning("eval.samples: nothing is drawn, no task is generated and right or wrong; name one in eval.tasks")
        return tuple(scores)
    requests = [request for instances in asked.values() for request in instances]
    texts = iter(lm.sample_until(requests, samples, seed=seed))
    right = {name: _num_right(tasks[name], [next(texts) for _ in instances]) for name, instances in asked.items()}
    gathered = lm.gather_object(right)
    if gathered is None:
        return tuple(scores)
    # every document is with one rank; items are in the order of the documents
    counts = {name: sorted(count for part in gathered for count in part[name].items()) for name in asked}
    return tuple(
        with_samples(score, samples, [count for _, count in counts[score.task]]) if score.task in asked else score
        for score in scores
    )


def _can_be_sampled(tasks: dict[str, Any], score: TaskScore) -> bool:
    task = tasks.get(score.task)
    if task is None or task.OUTPUT_TYPE != "generate_until":
        return False
    documents = {request.doc_id for request in task.instances if request.request_type == "generate_until"}
    if is_binary(score) and len(documents) == len(task.instances):
        return True
    log.warning(
        "eval.samples: nothing is drawn for %s: its items are not right or wrong by one text each (%s)",
        *(score.task, score.metric),
    )
    return False


def _num_right(task: Any, texts: Sequence[Sequence[str]]) -> dict[int, int]:
    """By document, how many of its ``texts`` the task counts as right; ``texts`` in the order of its requests."""
    counts = {request.doc_id: 0 for request in task.instances}
    filter_name = next(iter(task.instances[0].filtered_resps))
    for drawn in zip(*texts, strict=True):
        for request, text in zip(task.instances, drawn, strict=True):
            request.resps = [text]
        task.apply_filters()
        for request in task.instances:
            values = task.process_results(request.doc, [request.filtered_resps[filter_name]])
            counts[request.doc_id] += int(values[metric_of(task, list(values))] == 1)
    return counts
