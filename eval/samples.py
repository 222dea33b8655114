"""From lm-eval's logged samples to scores per item that two roles can be paired by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.artifact import ItemScore, TaskScore
from shoal.errors import UserError

from .statistics import interval

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match", "f1")
"""Which of a task's metrics stands for it, if neither its metadata nor this list says: its first one."""
ROLLING_METRICS = {
    "bits_per_byte": ("bits_per_byte", math.log(2)),
    "byte_perplexity": ("nats_per_byte", 1.0),
    "word_perplexity": ("nats_per_word", 1.0),
}
"""lm-eval's metric -> ours, whose mean over items is meaningful, and its unit in nats."""

Sample = dict[str, Any]
CountTokens = Callable[[str, str], int]


def task_score(
    name: str, task: Any, samples: Sequence[Sample], *, num_fewshot: int, count_tokens: CountTokens
) -> TaskScore:
    """The score of one task with its items, in the order of its data.

    Raises:
        UserError: an answer that is none of the options, or a metric that has no value per item.
    """
    described: dict[str, Any] = task.config.metadata or {}
    chosen = _one_filter(samples)
    _check_answers(name, task, chosen)
    wanted = described.get("metric") or _main_metric(chosen[0]["metrics"])
    metric, scored = _item_scores(name, task, chosen, wanted, count_tokens)
    higher_is_better = bool(task.higher_is_better().get(wanted, not metric.startswith(("nats", "bits"))))
    if chosen[0]["filter"] != "none":
        metric = f"{metric} ({chosen[0]['filter']})"
    score = TaskScore(
        task=name,
        ability=str(described.get("ability") or name),
        protocol=str(described.get("protocol") or protocol_of(task, chosen)),
        metric=metric,
        score=float(np.average([item.score for item in scored], weights=[item.weight for item in scored])),
        ci_low=0.0,
        ci_high=0.0,
        n=len(scored),
        chance=float(described["chance"]) if "chance" in described else _chance(task, chosen),
        higher_is_better=higher_is_better,
        version=str(task.VERSION),
        num_fewshot=num_fewshot,
        items=tuple(scored),
    )
    return with_interval(score)


def with_interval(score: TaskScore) -> TaskScore:
    """The same score with its 95 % interval."""
    low, high = interval(score)
    return replace(score, ci_low=low, ci_high=high)


def item_ids(samples: Sequence[Sample]) -> list[str]:
    """The data's own ids where every document has one and they differ, else position and content hash."""
    own = [sample["doc"].get("id") if isinstance(sample["doc"], dict) else None for sample in samples]
    if all(isinstance(value, str | int) for value in own) and max(Counter(own).values()) == 1:
        return [str(value) for value in own]
    return [f"{sample['doc_id']}-{sample['doc_hash'][:8]}" for sample in samples]


def _one_filter(samples: Sequence[Sample]) -> list[Sample]:
    """The samples under the task's first filter, by document: ranks hand theirs in one after the other."""
    first = samples[0]["filter"]
    return sorted((sample for sample in samples if sample["filter"] == first), key=lambda sample: sample["doc_id"])


def _main_metric(available: Sequence[str]) -> str:
    return next((metric for metric in PREFERRED_METRICS if metric in available), available[0])


def _item_scores(
    name: str, task: Any, samples: Sequence[Sample], wanted: str, count_tokens: CountTokens
) -> tuple[str, list[ItemScore]]:
    """The metric's name as reported, and every item's value under it."""
    metric, items = wanted, []
    for identity, sample in zip(item_ids(samples), samples, strict=True):
        weight = 1.0
        if wanted == "nats_per_token":
            value = sample["nats"] / count_tokens(*sample["arguments"][0])
        elif wanted in ROLLING_METRICS:
            metric, unit = ROLLING_METRICS[wanted]
            log_prob, weight = sample[wanted]
            value = -log_prob / weight / unit
        else:
            value = sample.get(wanted)
        if isinstance(value, bool | np.generic):
            value = float(value)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"eval.tasks: {name!r} has no value of {wanted!r} for single items (got {value!r}); name one of "
                f"{', '.join(sample['metrics'])} as metadata.metric in a task file of your own, or leave the task out"
            )
        prediction, target = _prediction(task, sample, wanted), _target(task, sample)
        items.append(ItemScore(identity, float(value), prediction, target, float(weight)))
    return metric, items


def _prediction(task: Any, sample: Sample, metric: str) -> str:
    """What the model chose or wrote; nothing for a likelihood, which is no answer."""
    if task.OUTPUT_TYPE == "generate_until":
        return str(sample["resps"][0][0])
    if task.OUTPUT_TYPE != "multiple_choice":
        return ""
    choices = task.doc_to_choice(sample["doc"])
    log_probs = [log_prob for log_prob, _ in sample["filtered_resps"][: len(choices)]]
    if metric == "acc_norm":
        log_probs = [log_prob / len(choice) for log_prob, choice in zip(log_probs, choices, strict=True)]
    return choices[int(np.argmax(log_probs))].strip()


def _target(task: Any, sample: Sample) -> str:
    gold = sample["target"]
    if task.OUTPUT_TYPE == "multiple_choice":
        if task.multiple_input:
            gold = task.doc_to_text(sample["doc"])
        if isinstance(gold, int):
            gold = task.doc_to_choice(sample["doc"])[gold]
    return str(gold).strip()


def _check_answers(name: str, task: Any, samples: Sequence[Sample]) -> None:
    """Refuse a right answer that is not among the options: lm-eval counts every model wrong there and goes on."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        for answer in gold if isinstance(gold, list) else [gold]:
            inside = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
            if not inside:
                raise UserError(
                    f"eval.tasks: {name!r}, document {sample['doc_id']}: the answer {answer!r} is none of its "
                    f"{len(choices)} options; correct its data or its doc_to_target"
                )


def protocol_of(task: Any, samples: Sequence[Sample]) -> str:
    """The protocol of a task that does not say it, by how it asks: of options the first sample's are looked at."""
    if task.OUTPUT_TYPE == "generate_until":
        return "generation"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "rolling"
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(samples[0]["doc"])
        if all(len(choice.strip()) == 1 and choice.strip().isalnum() for choice in choices):
            return "loglikelihood"
    return "continuation"


def _chance(task: Any, samples: Sequence[Sample]) -> float:
    """What guessing reaches: one over the number of options, on average over the items; 0 for written text."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    return float(np.mean([1 / len(task.doc_to_choice(sample["doc"])) for sample in samples]))
