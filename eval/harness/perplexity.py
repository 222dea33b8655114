"""Nats per token of running text, window by window, so that two models can be paired on the same windows.

Models of two tokenizers are paired on the same windows too: those of the one, which the other reads in its own tokens.
There a token is not the same unit, so both count in bits per byte.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from shoal.artifacts.evaluation import BITS_PER_BYTE, NATS_PER_TOKEN, ItemScore, TaskScore
from shoal.data.sources import first_tokens, load_texts
from shoal.errors import UserError
from shoal.recipe.evaluate import Tasks
from shoal.recipe.section import DataSource
from shoal.runtime import together

from .engine import CausalLM, prefix_token
from .samples import likelihood_score

CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer puts into a token on average; how much text is read to have enough of it."""


class Window(NamedTuple):
    """A piece of a document."""

    id: str
    context: list[int]
    scored: list[int]
    weight: float
    """Scored tokens; of a window in the tokens of another tokenizer than the one that cut it, bytes."""


class Placed(NamedTuple):
    """A token and the characters of the text that it stands for."""

    id: int
    start: int
    end: int


def perplexity(
    lm: CausalLM,
    settings: Tasks,
    *,
    cut_by: PreTrainedTokenizerBase | None = None,
    all_windows: Sequence[Window] = (),
) -> TaskScore:
    """Mean negative log-likelihood per token of ``settings.perplexity_data``; exp of it is the perplexity.

    A window never reaches over a document's end; every token is scored once, a window's first one after the start token
    or its predecessor. Items are windows, weighted by their tokens. Ranks share the windows. With ``cut_by``, a
    tokenizer of other tokens, text and windows are what that one would take, as bits per byte. Who scores again and
    again gives ``all_windows``, so that the text is read once.

    Raises:
        UserError: a window longer than the model's positions, text that cannot be read, or a tokenizer that cannot say
            where in a text its tokens stand.
    """
    all_windows = all_windows or windows(cut_by or lm.tokenizer, settings, reader=lm.tokenizer if cut_by else None)
    longest = settings.sequence_length if cut_by is None else max(len(window.scored) for window in all_windows)
    if longest > lm.max_length:
        raise UserError(
            f"eval.sequence_length: {longest} {'of its own tokens ' if cut_by else ''}is more than the model's "
            f"{lm.max_length} positions; lower it"
        )
    own_windows = [window for window in all_windows[lm.rank :: lm.world_size] if window.scored]
    scores = lm.log_likelihoods([(window.context, window.scored) for window in own_windows])
    own = {window.id: -log_prob for window, (log_prob, _) in zip(own_windows, scores, strict=True)}
    totals = {identity: total for part in together(lambda: own) for identity, total in part.items()}
    unit = 1.0 if cut_by is None else math.log(2)
    items = tuple(
        ItemScore(window.id, totals.get(window.id, 0.0) / window.weight / unit, weight=window.weight)
        for window in all_windows
    )
    return likelihood_score(
        items,
        task="perplexity",
        ability="language",
        protocol="rolling",
        version=f"1.0, windows of {settings.sequence_length} tokens",
        metric=NATS_PER_TOKEN if cut_by is None else BITS_PER_BYTE,
    )


def windows(
    tokenizer: PreTrainedTokenizerBase, settings: Tasks, *, reader: PreTrainedTokenizerBase | None = None
) -> list[Window]:
    """The first ``perplexity_tokens`` tokens, each source its share. Ids tell other text or tokens apart.

    With ``reader`` the same pieces of text in its tokens, under the same ids.
    """
    total_weight = sum(source.weight for source in settings.perplexity_data)
    all_windows: list[Window] = []
    for source in settings.perplexity_data:
        budget = round(settings.perplexity_tokens * source.weight / total_weight)
        all_windows += _source_windows(tokenizer, source, budget, settings.sequence_length, reader)
    if not all_windows:
        raise UserError("eval.perplexity_data: the text tokenises to nothing; name a source that holds text")
    return all_windows


def _source_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: DataSource,
    budget: int,
    length: int,
    reader: PreTrainedTokenizerBase | None,
) -> list[Window]:
    source_windows: list[Window] = []
    prefix = prefix_token(tokenizer)
    texts: Sequence[str] = load_texts(source, max_characters=budget * CHARACTERS_PER_TOKEN)
    for number, text in enumerate(texts):
        placed = [] if reader is None else first_tokens(text, partial(_placed, tokenizer), budget)
        ids = [token.id for token in placed] or first_tokens(
            text, partial(tokenizer.encode, add_special_tokens=False), budget
        )
        budget -= len(ids)
        own_windows = []
        for index, pair in enumerate(get_rolling_token_windows(ids, prefix, length, context_len=1)):
            context, scored = make_disjoint_window(pair)
            digest = hashlib.sha256(repr((context, scored)).encode()).hexdigest()[:8]
            own_windows.append(Window(f"{source.path}:{number}:{index}:{digest}", context, scored, float(len(scored))))
        source_windows += own_windows if reader is None else _reread(own_windows, placed, text, reader)
        if budget <= 0:
            break
    return source_windows


def _reread(
    own_windows: Sequence[Window], placed: Sequence[Placed], text: str, reader: PreTrainedTokenizerBase
) -> Iterator[Window]:
    """The windows of one document, whose tokens are ``placed``, in the tokens of ``reader``.

    Its tokens belong to the window in which they begin: where one reaches over a window's end, a few bytes are counted
    in another window than they are paid for, and none of the document's are lost or counted twice. A window's context
    is the same text, and one token at least.
    """
    if not own_windows:
        return
    firsts = [0, *accumulate(len(window.scored) for window in own_windows)][:-1]
    starts = list(accumulate((token.start for token in placed), max))  # of some bytes a tokenizer may name the end
    begins, end = [0, *(starts[first] for first in firsts[1:])], placed[-1].end
    read = _placed(reader, text[:end])
    read_starts = list(accumulate((token.start for token in read), max))
    pieces = [0, *(bisect_left(read_starts, begin) for begin in begins[1:]), len(read)]
    for index, (window, (lower, upper)) in enumerate(zip(own_windows, pairwise(pieces), strict=True)):
        context = [Placed(prefix_token(reader), 0, 0)]
        if lower > 0:
            before = bisect_left(read_starts, starts[firsts[index] - len(window.context)])
            context = read[min(before, lower - 1) : lower]
        # a window of the end of a character, whose beginning was another's, has no byte of its own
        num_bytes = max(1, len(text[begins[index] : [*begins, end][index + 1]].encode()))
        scored = [token.id for token in read[lower:upper]]
        yield Window(window.id, [token.id for token in context], scored, float(num_bytes))


def _placed(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Placed]:
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer cannot say where in a text its tokens stand, so text that "
            "another one has cut cannot be scored with it; give a checkpoint with a tokenizer.json"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [Placed(token, start, end) for token, (start, end) in pairs]
