"""Requests to a tiny model whose answers are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from tiny import tiny_model, tiny_tokenizer

from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.item_cache import ItemCache

BATCH_SIZE = 4


CHOICES: list[tuple[Any, ...]] = [
    (f"{number}. question", option) for number in range(12) for option in (" a b", " c d")
]


PROMPTS: list[tuple[Any, ...]] = [(f"{number}. prompt", {"until": [], "max_gen_toks": 3}) for number in range(10)]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]  # pyright: ignore[reportArgumentType]


def asked(folder: Path | None, *, rank: int = 0, part: slice = slice(None), kind: str = "llama") -> tuple[Any, Any]:
    """Likelihoods and texts of the toy requests, answers kept in ``folder``."""
    lm = CausalLM(
        tiny_model(kind), tiny_tokenizer(), BATCH_SIZE, items=ItemCache(folder, kind, rank=rank) if folder else None
    )
    scores = lm.loglikelihood(instances("loglikelihood", CHOICES[part]))
    return scores, lm.generate_until(instances("generate_until", PROMPTS[part]))
