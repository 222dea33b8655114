"""What an evaluation costs: items, requests and tokens, estimated from the first items of every task."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from shoal.suites import Cost

SAMPLED = 24
"""Items of a task that stand for all of it."""
CHARACTERS_PER_TOKEN = 3


def cost_of(tasks: Mapping[str, Any], counts: Mapping[str, int], *, perplexity_tokens: int = 0) -> Cost:
    """The cost of ``counts`` items of every task, and of ``perplexity_tokens`` tokens of running text.

    Tokens are characters divided by three (prose has more to a token, digits and UUIDs fewer), and written ones the
    most that a task allows. What a task's prompts begin with alike (few-shot examples), and the prompt that the options
    of one question share, counts once, as the engine reads it once.
    """
    items = requests = 0
    tokens = float(perplexity_tokens)
    for name, task in tasks.items():
        asked = [_requests(task, doc) for doc in islice(task.eval_docs, min(SAMPLED, counts[name]))]
        shared = _shared([found[0][0] for found in asked]) if len(asked) > 1 else 0
        read = sum(_characters(found) - shared for found in asked) / CHARACTERS_PER_TOKEN
        written = (task.config.generation_kwargs or {}).get("max_gen_toks", 0) * len(asked)
        scale = counts[name] / len(asked)
        items += counts[name]
        requests += round(scale * sum(len(found) for found in asked))
        tokens += shared / CHARACTERS_PER_TOKEN + scale * (read + written)
    return Cost(items, requests, round(tokens))


def in_words(cost: Cost) -> str:
    """One line of a log."""
    return f"{cost.items:,} items, {cost.requests:,} requests, about {cost.tokens:,} tokens"


def _shared(prompts: list[str]) -> int:
    """How many characters they begin with alike: the two that are farthest apart in the alphabet decide."""
    first, last = min(prompts), max(prompts)
    return next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


def _requests(task: Any, doc: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The arguments of a document's requests, the prompt first."""
    prompt = task.fewshot_context(doc, int(task.config.num_fewshot or 0))
    made = task.construct_requests(doc, prompt, metadata=(task.task_name, 0, 1))
    return [one.args for one in (made if isinstance(made, list) else [made])]


def _characters(requests: list[tuple[Any, ...]]) -> int:
    prompts = dict.fromkeys(args[0] for args in requests)
    return sum(map(len, prompts)) + sum(len(args[1]) for args in requests if len(args) > 1 and isinstance(args[1], str))
