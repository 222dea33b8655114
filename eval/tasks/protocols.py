"""One data set as lm-eval tasks: under lettered options, option text, written text, worked answers, as running text.

All tasks of a part read the same documents (documents.py): protocols differ in how they ask and in nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shoal.abilities import matching
from shoal.abilities.checks import fits
from shoal.abilities.words import NAMES, PLACES

from .data_sets import DataSet, TaskProtocol
from .documents import has_examples, read_splits

Config = dict[str, Any]
MEAN = {"aggregation": "mean", "higher_is_better": True}


def task_config(data: DataSet, protocol: TaskProtocol, data_dir: Path | None, num_fewshot: int | None = None) -> Config:
    """What lm-eval makes the task of; ``num_fewshot`` None = as many examples as the description says.

    Without examples to show none are read, so that nobody needs a training split for them.
    """
    family = data.family_under(protocol)
    shots = data.shots_under(protocol) if num_fewshot is None else num_fewshot
    metadata: Config = {"version": "1.0", "ability": data.ability, "protocol": protocol, "column": data.column or ""}
    if family is not None:
        metadata |= {"family": family, "level": data.level}
    if reworded_of := data.reworded_under(protocol):
        metadata["reworded_of"] = reworded_of
    shown = shots > 0 and has_examples(data, data_dir)
    form = FORMS[protocol](data)
    return {
        "task": f"{data.dataset}_{protocol}",
        "custom_dataset": partial(read_splits, data, data_dir, with_examples=shown),
        "test_split": "items",
        "target_delimiter": " ",
        "num_fewshot": shots if shown else 0,
        **({"fewshot_split": "examples"} if shown else {}),
        **form,
        "fewshot_config": {"sampler": "first_n", **form.get("fewshot_config", {})},
        "metadata": {**metadata, **form["metadata"]},
    }


def _loglikelihood(data: DataSet) -> Config:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": matching.lettered_prompt,
        "doc_to_choice": matching.letters_of,
        "doc_to_target": "answer",
        **_chosen("acc"),
    }


def _chosen(metric: str) -> Config:
    """What counts where an option is chosen by its likelihood: that it is the right one."""
    metrics = ("acc",) if metric == "acc" else ("acc", "acc_norm")
    return {"metric_list": [{"metric": name, **MEAN} for name in metrics], "metadata": {"metric": metric}}


def _continuation(data: DataSet) -> Config:
    if data.options is None and data.bundled is None:  # an open question: is its answer what the model would write?
        return {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": first_answer,
            "fewshot_config": {"doc_to_target": shown_answer},
            "metric_list": [{"metric": "acc", **MEAN}],
            "metadata": {"metric": "acc", "chance": 0.0},
        }
    if data.beginnings is not None:
        fields = {"doc_to_text": "answer", "doc_to_choice": "beginnings", "doc_to_target": "ending"}
    else:
        fields = {"doc_to_text": "context", "doc_to_choice": "options", "doc_to_target": "answer"}
    return {"output_type": "multiple_choice", **fields, **_chosen(data.metric)}


def _generation(data: DataSet) -> Config:
    chooses = data.lettered and (data.options is not None or data.bundled is not None)
    chance = {} if chooses and data.chance is None else {"chance": data.chance or 0.0}  # else by options, see samples
    open_answer = "worked" if data.expects_work else shown_answer
    return {
        "output_type": "generate_until",
        "doc_to_text": matching.lettered_prompt if chooses else "context",
        "doc_to_target": right_letter if chooses else open_answer,
        "process_results": letter_match if chooses else TEXT_MATCHES[data.match],
        "generation_kwargs": {"until": list(data.stop), "max_gen_toks": data.max_new_tokens, "do_sample": False},
        "metric_list": [{"metric": "match", **MEAN}],
        "fewshot_config": {"doc_to_target": "worked"} if data.shows_work else {},
        "metadata": {"metric": "match", **chance},
    }


def _worked(data: DataSet) -> Config:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": worked_answer,
        "fewshot_config": {"doc_to_target": "worked"},
        "process_results": nats,
        "metric_list": [{"metric": "nats", "aggregation": "mean", "higher_is_better": False}],
        "metadata": {"metric": "nats_per_token", "chance": 0.0},
    }


def _rolling(data: DataSet) -> Config:
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "page",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        "metadata": {"metric": "bits_per_byte", "chance": 0.0},
    }


FORMS: dict[TaskProtocol, Callable[[DataSet], Config]] = {
    "loglikelihood": _loglikelihood,
    "continuation": _continuation,
    "generation": _generation,
    "worked": _worked,
    "rolling": _rolling,
}


def first_answer(doc: Mapping[str, Any]) -> str:
    """The first accepted answer, as it follows the context."""
    return f" {doc['answers'][0]}"


def shown_answer(doc: Mapping[str, Any]) -> str:
    """The first accepted answer."""
    return doc["answers"][0]


def worked_answer(doc: Mapping[str, Any]) -> str:
    """The worked answer, as it follows the context."""
    return f" {doc['worked']}"


def right_letter(doc: Mapping[str, Any]) -> str:
    """The letter of the right option."""
    return matching.LETTERS[doc["answer"]]


def letter_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the written text chooses the right option."""
    return {"match": float(matching.chosen_option(results[0], doc["options"]) == doc["answer"])}


def _match(name: str, is_right: Callable[[str, Sequence[str]], bool]) -> Callable[..., dict[str, float]]:
    """1 where written text ``is_right`` by the accepted answers; scores record the rule by its ``name``."""

    def match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {"match": float(is_right(results[0], doc["answers"]))}

    match.__name__ = name
    return match


match_start = _match("match_start", matching.starts)
match_stated = _match("match_stated", matching.stated)


def match_last(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the last of the first line's numbers, names or places, whichever the answer is, is the right one."""
    line, answer = matching.first_line(results[0]), doc["answers"][0]
    for words in (NAMES, PLACES):
        if answer in words:
            named = [word for word in re.findall(r"\w+", line) if word in words]
            return {"match": float(named[-1:] == [answer])}
    last = matching.value((matching.amounts(line) or [""])[-1])
    return {"match": float(last is not None and last == matching.value(answer))}


def match_rule(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the written text keeps the rule of its item."""
    return {"match": float(fits(results[0], json.loads(doc["rule"])))}


TEXT_MATCHES = {
    "starts": match_start,
    "contains": _match("match_inside", matching.contains),
    "exact": _match("match_exactly", matching.exact),
    "number": _match("match_number", matching.number),
    "last": match_last,
    "stated": match_stated,
    "rule": match_rule,
}


def nats(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Nats of the whole worked answer; samples.py divides them by its tokens."""
    return {"nats": -results[0][0]}
