"""The text of evaluation items, to look for it in training text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from shoal.abilities.matching import lettered_prompt


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
