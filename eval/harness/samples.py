"""From lm-eval's logged samples to scores per item that two roles can be paired by."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from lm_eval.models.utils import normalize_gen_kwargs

from shoal.abilities.checks import JSON_RULES, read_object, refuses
from shoal.abilities.matching import MATCHING, chosen_option, lettered_prompt, states_an_answer
from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.atomic_files import fingerprint
from shoal.errors import UserError
from shoal.stats.paired import interval

from ..tasks.load import Sample, check_answers
from ..tasks.protocols import letter_match, match_rule, match_stated
from .engine import NEW_TOKENS, Ending, ending_key
from .rates import hold_answers, option_rates, text_rates, with_rates

log = logging.getLogger(__name__)

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match", "f1")
"""Which of a task's metrics stands for it, if neither its metadata nor this list says: its first one."""
ROLLING_METRICS = {
    "bits_per_byte": ("bits_per_byte", math.log(2)),
    "byte_perplexity": ("nats_per_byte", 1.0),
    "word_perplexity": ("nats_per_word", 1.0),
}
"""lm-eval's metric -> ours, whose mean over items is meaningful, and its unit in nats."""

QUESTION_CHARACTERS = 1500
"""Characters of a question that are kept, at most; the middle of a longer one is left out."""
MATCHING_RULES = (
    *("output_type", "process_docs", "process_results", "doc_to_target", "doc_to_choice", "filter_list"),
    *("metric_list", "generation_kwargs", "target_delimiter"),
)
"""Parts of a task's settings that decide what counts as right."""

CountTokens = Callable[[str, str], int]


def task_score(
    name: str,
    task: Any,
    samples: Sequence[Sample],
    *,
    num_fewshot: int,
    count_tokens: CountTokens,
    endings: Mapping[tuple[str, str], Ending] | None = None,
) -> TaskScore:
    """The score of one task with its items, in the order of its data.

    ``endings`` tells of written texts, by prompt and settings (ending_key), how they ended. Of a text that it does not
    hold the tokens are counted anew, which is not exact: a damaged model spells words in other tokens.

    Raises:
        UserError: an answer that is none of the options, or a metric that has no value per item.
    """
    metadata: dict[str, Any] = task.config.metadata or {}
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    under_filter = sorted(first, key=lambda sample: sample["doc_id"])  # ranks hand theirs in one after the other
    check_answers(name, task, under_filter)
    metric_key = metric_of(task, under_filter[0]["metrics"])
    metric, items = _item_scores(name, task, under_filter, metric_key, count_tokens)
    higher_is_better = rises(task, metric_key)
    if under_filter[0]["filter"] != "none":
        metric = f"{metric} ({under_filter[0]['filter']})"
    score = TaskScore(
        task=name,
        ability=str(metadata.get("ability") or name),
        protocol=str(metadata.get("protocol") or protocol_of(task, under_filter)),
        metric=metric,
        score=float(np.average([item.score for item in items], weights=[item.weight for item in items])),
        ci_low=0.0,
        ci_high=0.0,
        n=len(items),
        chance=float(metadata["chance"]) if "chance" in metadata else _chance(task, under_filter),
        higher_is_better=higher_is_better,
        version=str(task.VERSION),
        num_fewshot=num_fewshot,
        items=tuple(items),
        family=metadata.get("family"),
        level=float(metadata["level"]) if "level" in metadata else None,
        prompts=prompts_fingerprint(task, under_filter),
        column=metadata.get("column", "public"),
        reworded_of=metadata.get("reworded_of", ""),
    )
    if task.OUTPUT_TYPE == "generate_until":
        score = replace(score, matching=MATCHING)
        score = _with_text_rates(score, task, under_filter, count_tokens, endings or {})
    if task.OUTPUT_TYPE == "multiple_choice" and not callable(getattr(task.config, "process_results", None)):
        rates = [option_rates(_log_probs(task, sample), _golds(task, sample)) for sample in under_filter]
        items = [replace(item, rates=own) for item, own in zip(items, rates, strict=True)]
        score = with_rates(replace(score, items=tuple(items)))
    return with_interval(score)


def prompts_fingerprint(task: Any, samples: Sequence[Sample]) -> str:
    """A short hash of everything that is asked and of what counts as right; equal = the same test.

    A task file's own function counts by its source. shoal's count by name: what they do has versions, those of the task
    and of answer matching, which scores hold beside this.
    """
    settings: dict[str, Any] = task.config.to_dict()  # callables become their source
    rules = str({name: _name_of_ours(task, name) or settings[name] for name in MATCHING_RULES if name in settings})
    # of a callable without source only its name is told, and where it happens to lie in memory
    return fingerprint([[sample["arguments"] for sample in samples], re.sub(r" at 0x[0-9a-f]+", "", rules)])


def _name_of_ours(task: Any, setting: str) -> str:
    """The name of the function of shoal that ``setting`` is; empty where it is anything else."""
    value = getattr(task.config, setting, None)
    return value.__name__ if callable(value) and value.__module__.startswith("shoal.") else ""


def with_interval(score: TaskScore) -> TaskScore:
    """The same score with its 95 % interval."""
    low, high = interval(score)
    return replace(score, ci_low=low, ci_high=high)


def item_ids(samples: Sequence[Sample]) -> list[str]:
    """The data's own ids where every document has one and they differ, else position and content hash."""
    ids = [sample["doc"].get("id") if isinstance(sample["doc"], dict) else None for sample in samples]
    if all(isinstance(value, str | int) for value in ids) and max(Counter(ids).values()) == 1:
        return [str(value) for value in ids]
    return [f"{sample['doc_id']}-{sample['doc_hash'][:8]}" for sample in samples]


def metric_of(task: Any, available: Sequence[str]) -> str:
    """Which of the ``available`` metrics stands for the task."""
    named = (task.config.metadata or {}).get("metric")
    return named or next((metric for metric in PREFERRED_METRICS if metric in available), available[0])


def rises(task: Any, metric: str) -> bool:
    """Whether more of ``metric``, as metric_of names it, is better; False of nats and bits."""
    counts_text = metric in ROLLING_METRICS or metric.startswith(("nats", "bits"))
    return bool(task.higher_is_better().get(metric, not counts_text))


def _item_scores(
    name: str, task: Any, samples: Sequence[Sample], metric_key: str, count_tokens: CountTokens
) -> tuple[str, list[ItemScore]]:
    """The metric's name as reported, and every item's value under it."""
    metric, items = metric_key, []
    for identity, sample in zip(item_ids(samples), samples, strict=True):
        weight = 1.0
        if metric_key == "nats_per_token":
            value = sample["nats"] / count_tokens(*sample["arguments"][0])  # tokens of the answer, not of the prompt
        elif metric_key in ROLLING_METRICS:
            metric, unit = ROLLING_METRICS[metric_key]
            log_prob, weight = sample[metric_key]  # lm-eval weighs the mean by the words or bytes of each document
            value = -log_prob / weight / unit
        else:
            value = sample.get(metric_key)
        if isinstance(value, bool | np.generic):
            value = float(value)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"eval.tasks: {name!r} has no value of {metric_key!r} for single items (got {value!r}); name one of "
                f"{', '.join(sample['metrics'])} as metadata.metric in a task file of your own, or remove the task"
            )
        prediction, target = _prediction(task, sample, metric_key), _target(task, sample)
        question = _question(task, sample)
        items.append(ItemScore(identity, float(value), prediction, target, float(weight), question=question))
    return metric, items


def _with_text_rates(
    score: TaskScore,
    task: Any,
    samples: Sequence[Sample],
    count_tokens: CountTokens,
    endings: Mapping[tuple[str, str], Ending],
) -> TaskScore:
    """The score with what is known of every text besides its being right."""
    texts, lengths, cut = [item.prediction for item in score.items], [], []
    for text, sample in zip(texts, samples, strict=True):
        prompt, settings = sample["arguments"][0]
        ending = endings.get(ending_key(prompt, settings))
        counted = count_tokens("", text) if ending is None and text else 0
        lengths.append(counted if ending is None else ending.num_tokens)
        limit = normalize_gen_kwargs(settings, NEW_TOKENS).get("max_gen_toks", NEW_TOKENS)
        cut.append(counted >= limit if ending is None else not ending.finished)
    readable = _readable(task, samples, texts, [item.target for item in score.items])
    rates = text_rates(texts, readable, lengths, cut)
    if getattr(task.config, "process_results", None) is match_rule:
        for own, text, sample in zip(rates, texts, samples, strict=True):
            if "refused" in json.loads(sample["doc"]["rule"]):
                own["refused"] = float(refuses(text))
    items = (replace(item, rates=rates_of_item) for item, rates_of_item in zip(score.items, rates, strict=True))
    return with_rates(replace(score, items=tuple(items)))


def _readable(task: Any, samples: Sequence[Sample], texts: Sequence[str], targets: Sequence[str]) -> list[bool]:
    """Out of which texts an answer can be read, right or wrong; by our own rules where the task is matched by them."""
    filtered = [_first(sample["filtered_resps"]) for sample in samples]
    rule = getattr(task.config, "process_results", None)
    if rule is letter_match:
        pairs = zip(filtered, samples, strict=True)
        return [chosen_option(text, sample["doc"]["options"]) is not None for text, sample in pairs]
    readable = hold_answers(texts, filtered, targets)
    if rule is match_rule:  # JSON has to be read; of other rules any text can keep some
        pairs = zip(readable, filtered, samples, strict=True)
        return [
            holds_answer and (JSON_RULES.isdisjoint(json.loads(sample["doc"]["rule"])) or read_object(text) is not None)
            for holds_answer, text, sample in pairs
        ]
    if rule is match_stated:
        pairs = zip(readable, filtered, strict=True)
        return [holds_answer and states_an_answer(text) for holds_answer, text in pairs]
    return readable


def _first(responses: Any) -> str:
    """The first text in what a task's filters left, which may be in lists of lists."""
    while isinstance(responses, list | tuple):
        responses = responses[0] if responses else ""
    return str(responses)


def _question(task: Any, sample: Sample) -> str:
    """What the item asks, without few-shot examples; empty for running text."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return ""
    question = task.doc_to_text(sample["doc"])
    if not isinstance(question, str):  # several beginnings of one ending, of which the right one is to be found
        question = " / ".join(map(str, task.doc_to_choice(sample["doc"])))
    if len(question) <= QUESTION_CHARACTERS:
        return question
    half = QUESTION_CHARACTERS // 2
    return f"{question[:half]} […] {question[-half:]}"


def _prediction(task: Any, sample: Sample, metric: str) -> str:
    """What the model chose or wrote; nothing for a likelihood, which is no answer."""
    if task.OUTPUT_TYPE == "generate_until":
        return str(sample["resps"][0][0])
    if task.OUTPUT_TYPE != "multiple_choice":
        return ""
    choices, log_probs = task.doc_to_choice(sample["doc"]), _log_probs(task, sample)
    if metric.endswith("_norm"):  # per character, as lm-eval normalizes
        log_probs = [log_prob / len(choice) for log_prob, choice in zip(log_probs, choices, strict=True)]
    return choices[int(np.argmax(log_probs))].strip()


def _log_probs(task: Any, sample: Sample) -> list[float]:
    """Log-likelihoods of the options."""
    return [log_prob for log_prob, _ in sample["filtered_resps"][: len(task.doc_to_choice(sample["doc"]))]]


def _gold(task: Any, sample: Sample) -> Any:
    """The right answer, or the list of them, each an option's position or a text."""
    is_input = task.OUTPUT_TYPE == "multiple_choice" and task.multiple_input
    return task.doc_to_text(sample["doc"]) if is_input else sample["target"]


def _golds(task: Any, sample: Sample) -> set[int]:
    """The positions of the right options."""
    gold, choices = _gold(task, sample), task.doc_to_choice(sample["doc"])
    golds = gold if isinstance(gold, list) else [gold]
    return {own if isinstance(own, int) else choices.index(own) for own in golds}


def _target(task: Any, sample: Sample) -> str:
    gold = _gold(task, sample)
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(gold, int):
        gold = task.doc_to_choice(sample["doc"])[gold]
    return str(gold).strip()


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
    """Share that guessing reaches: of options the right ones, averaged over items; 0 for other written text."""
    if getattr(task.config, "process_results", None) is letter_match:
        return float(np.mean([1 / len(sample["doc"]["options"]) for sample in samples]))
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    if callable(getattr(task.config, "process_results", None)):
        log.warning(
            "%s: a function of its own decides what is right, so what guessing reaches is not known and shares kept "
            "mislead; set metadata.chance in a task file of your own",
            task.config.task,
        )
    return float(np.mean([len(_golds(task, s)) / len(task.doc_to_choice(s["doc"])) for s in samples]))


def item_texts(tasks: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[str]]:
    """Per lm-eval task the question with its right answer of the first ``counts`` items: those that are scored.

    Without few-shot examples, task description and wrong options, which are not what an item asks for.
    """
    return {name: [_text(task, doc) for doc in islice(task.eval_docs, counts[name])] for name, task in tasks.items()}


def _text(task: Any, doc: dict[str, Any]) -> str:
    if getattr(getattr(task, "config", None), "doc_to_text", None) is lettered_prompt:
        return f"{doc['question']} {doc['answers'][0]}"  # the prompt holds all options, and the answer is a letter
    question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
    if isinstance(question, int):  # the options are beginnings of one ending, as in WinoGrande
        return f"{task.doc_to_choice(doc)[question]} {answer}"
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    if isinstance(answer, int) and task.OUTPUT_TYPE == "multiple_choice":
        options = task.doc_to_choice(doc)
        answer = options[answer] if 0 <= answer < len(options) else ""
    return f"{question} {answer}"
