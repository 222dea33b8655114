"""Nats per token of running text, window by window, so that two models can be paired on the same windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from shoal.artifacts.evaluation import NATS_PER_TOKEN, ItemScore, TaskScore
from shoal.data.sources import load_texts
from shoal.data.streams import first_tokens, start_token
from shoal.errors import UserError
from shoal.recipe.evaluate import Eval
from shoal.recipe.section import DataSource
from shoal.runtime import together

from .engine import CausalLM, prefix_token
from .samples import with_interval

CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer puts into a token on average; how much text is read to have enough of it."""

WINDOW = 512
"""Tokens of a window. All that is published of shoal was measured with it, and a longer one gives fewer windows, so
wider intervals, of the same text."""


class Window(NamedTuple):
    """A piece of a document."""

    id: str
    context: list[int]
    scored: list[int]
    weight: float
    """Number of scored tokens."""


def perplexity(lm: CausalLM, settings: Eval, *, all_windows: Sequence[Window] = ()) -> TaskScore:
    """Mean negative log-likelihood per token of ``settings.perplexity_data``; exp of it is the perplexity.

    A window never reaches over a document's end; every token is scored once, a window's first one after the start
    token, its predecessor, or both if the tokenizer begins texts with a start token. Items are windows, weighted by
    their tokens. Ranks share the windows. Who scores again and again gives ``all_windows``, so that the
    text is read once.

    Raises:
        UserError: text that cannot be read.
    """
    length = min(WINDOW, lm.max_length)
    all_windows = all_windows or windows(lm.tokenizer, settings, max_length=lm.max_length)
    own_windows = all_windows[lm.rank :: lm.world_size]
    scores = lm.log_likelihoods([(window.context, window.scored) for window in own_windows])
    own = {window.id: -log_prob for window, (log_prob, _) in zip(own_windows, scores, strict=True)}
    totals = {identity: total for part in together(lambda: own) for identity, total in part.items()}
    items = tuple(ItemScore(own.id, totals[own.id] / own.weight, weight=own.weight) for own in all_windows)
    mean = float(np.average([item.score for item in items], weights=[item.weight for item in items]))
    return with_interval(
        TaskScore(
            task="perplexity",
            ability="language",
            protocol="rolling",
            metric=NATS_PER_TOKEN,
            score=mean,
            ci_low=mean,
            ci_high=mean,
            n=len(all_windows),
            chance=0.0,
            higher_is_better=False,
            version=f"1.0, windows of {length} tokens",
            num_fewshot=0,
            items=items,
        )
    )


def windows(tokenizer: PreTrainedTokenizerBase, settings: Eval, *, max_length: int) -> list[Window]:
    """The first ``perplexity_tokens`` tokens, each source its share, for a model of ``max_length`` positions. Ids tell
    other text or tokens apart."""
    total_weight = sum(source.weight for source in settings.perplexity_data)
    all_windows: list[Window] = []
    for source in settings.perplexity_data:
        budget = round(settings.perplexity_tokens * source.weight / total_weight)
        all_windows += _source_windows(tokenizer, source, budget, min(WINDOW, max_length))
    if not all_windows:
        raise UserError("eval.perplexity_data: the text is empty after tokenisation; name a source with text")
    return all_windows


def _source_windows(
    tokenizer: PreTrainedTokenizerBase, source: DataSource, budget: int, length: int
) -> Iterator[Window]:
    prefix, start = prefix_token(tokenizer), start_token(tokenizer)
    length -= start is not None  # whose place in a window it takes
    texts: Sequence[str] = load_texts(source, max_characters=budget * CHARACTERS_PER_TOKEN)
    for number, text in enumerate(texts):
        ids = first_tokens(text, partial(tokenizer.encode, add_special_tokens=False), budget)
        budget -= len(ids)
        for index, pair in enumerate(get_rolling_token_windows(ids, prefix, length, context_len=1)):
            context, scored = make_disjoint_window(pair)
            if index and start is not None:
                context = [start, *context]
            digest = hashlib.sha256(repr((context, scored)).encode()).hexdigest()[:8]
            yield Window(f"{source.path}:{number}:{index}:{digest}", context, scored, float(len(scored)))
        if budget <= 0:
            break
