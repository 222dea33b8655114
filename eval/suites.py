"""What an evaluation costs: items, requests and tokens, estimated from the first items of every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from .harness.engine import NEW_TOKENS

SAMPLED = 24
"""Items of a task, its first ones, that stand for all of it."""
CHARACTERS_PER_TOKEN = 3


@dataclass(frozen=True)
class Work:
    """Work that one model has to do."""

    items: int
    """Items of all tasks."""
    requests: int
    """Number of prompts to continue and options to score."""
    read: int
    """Tokens of prompts and options to read."""
    written: int
    """Tokens to write at most."""

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.read + self.written


def work_of(tasks: Mapping[str, Any], counts: Mapping[str, int], *, perplexity_tokens: int = 0) -> Work:
    """Work of ``counts`` items of every task, and of ``perplexity_tokens`` tokens of running text.

    Tokens are characters divided by three (prose has more to a token, digits and UUIDs fewer), and written ones the
    most that a task allows. What a task's prompts begin with alike (few-shot examples), and the prompt that the options
    of one question share, counts once, as the engine reads it once.
    """
    items = requests = 0
    read, written = float(perplexity_tokens), 0.0
    for name, task in tasks.items():
        by_item = [_requests(task, doc) for doc in islice(task.eval_docs, min(SAMPLED, counts[name]))]
        # characters with which all prompts of the task begin: they are counted once, not once per item
        shared = _shared([of_item[0][0] for of_item in by_item]) if len(by_item) > 1 else 0
        scale = counts[name] / len(by_item)
        items += counts[name]
        requests += round(scale * sum(map(len, by_item)))
        rest = sum(_characters(of_item) - shared for of_item in by_item)
        read += (shared + scale * rest) / CHARACTERS_PER_TOKEN
        written += scale * sum(_new_tokens(args) for of_item in by_item for args in of_item)
    return Work(items, requests, round(read), round(written))


def in_words(work: Work) -> str:
    """One line of a log."""
    written = f", at most {work.written:,} to write" if work.written else ""
    return f"{work.items:,} items, {work.requests:,} requests, about {work.read:,} tokens to read{written}"


def _shared(prompts: list[str]) -> int:
    """Characters with which all of them begin: the two that are farthest apart in the alphabet decide."""
    first, last = min(prompts), max(prompts)
    return next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


def _requests(task: Any, doc: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The arguments of a document's requests, the prompt first."""
    prompt = task.fewshot_context(doc, int(task.config.num_fewshot or 0))
    requests = task.construct_requests(doc, prompt, metadata=(task.task_name, 0, 1))
    return [request.args for request in (requests if isinstance(requests, list) else [requests])]


def _characters(requests: list[tuple[Any, ...]]) -> int:
    prompts = dict.fromkeys(args[0] for args in requests)
    return sum(map(len, prompts)) + sum(len(args[1]) for args in requests if len(args) > 1 and isinstance(args[1], str))


def _new_tokens(args: tuple[Any, ...]) -> int:
    """Tokens that a request may write."""
    settings = args[1] if len(args) > 1 else None
    if not isinstance(settings, dict):
        return 0
    return normalize_gen_kwargs(settings, NEW_TOKENS).get("max_gen_toks", NEW_TOKENS)
