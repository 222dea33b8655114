"""The beginnings that prompts have in common, each read once.

A few-shot prompt is the examples of a task and a question: hundreds of tokens that all questions share, and some tens
of its own. A beginning goes through the layers once; its keys and values are what every prompt after it goes on from,
and what the options of a question, or the text written after it, go on from in turn: a tree, of which every token is
computed once.

No padding may lie between the tokens of a row, because sliding windows and relative positions count cache slots. So
the rows of a batch end together and get equally many new tokens: where another row has more of its own, the last tokens
of the beginning are read again, in the place of padding.

B batch, S sequence of new tokens, P cached positions, H key-value heads, d size of a head.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from shoal.inference.decoder import Decoder, plain_cache
from shoal.runtime import queued

Tokens = tuple[int, ...]

T = TypeVar("T")

WORTH_SHARING = 0.125
"""Share of their tokens that prompts must save by a common beginning."""
EVEN = 0.85
"""Share of the longest row of a batch that the others have at least."""


@dataclass(frozen=True)
class Start:
    """Rows that end together, as the decoder takes them."""

    ids_BS: Tensor
    pads: tuple[int, ...]
    """Columns of padding before each row's first token."""
    width: int
    """P + S, columns cached and new."""
    positions_BS: Tensor
    cache: DynamicCache | None
    """Of what goes before the new tokens; None = nothing does."""


class Reader:
    """Begins rows where the beginnings they share with others end.

    A beginning is held from the first row that needs it to the last one.
    """

    def __init__(self, decoder: Decoder, beginnings: Sequence[Tokens]) -> None:
        """``beginnings`` of all the rows that will be started, one for each; () = none."""
        self._decoder = decoder
        self._rows_left = Counter(beginnings)
        self._slots: dict[Tokens, list[tuple[Tensor, Tensor] | None]] = {}
        """Keys and values (H, P, d) of every layer; None for a layer that reads those of another."""

    def start(self, rows: Sequence[Tokens], shared: Sequence[int]) -> Start:
        """``rows``, of which the first ``shared`` tokens are their beginnings."""
        beginnings = [row[:count] for row, count in zip(rows, shared, strict=True)]
        # all rows get as many new tokens as the one with the most of its own: the others read the end of their
        # beginning once more, because padding there would stand between a row's tokens
        num_new = max(len(row) - count for row, count in zip(rows, shared, strict=True))
        cached = [max(0, len(row) - num_new) for row in rows]
        self._read([beginning for beginning in dict.fromkeys(beginnings) if beginning and beginning not in self._slots])
        cache = self._resumed(beginnings, cached)
        self._rows_left.subtract(beginnings)
        self._slots = {beginning: slots for beginning, slots in self._slots.items() if self._rows_left[beginning] > 0}
        new = [row[skip:] for row, skip in zip(rows, cached, strict=True)]
        ids_BS, _, positions_BS = self._decoder.left_padded(new)
        cached_B1 = queued(torch.tensor(cached), ids_BS.device).unsqueeze(1)
        width = max(cached) + ids_BS.shape[1]
        return Start(ids_BS, tuple(width - len(row) for row in rows), width, cached_B1 + positions_BS, cache)

    def _read(self, beginnings: Sequence[Tokens]) -> None:
        """Keep the keys and values of ``beginnings``, read together."""
        if not beginnings:
            return
        # a sliding layer's own kind would forget what a row that goes on earlier still sees
        cache = plain_cache(len(self._decoder.new_cache().layers))
        ids_BS = self._decoder.right_padded(beginnings)
        # beginnings end before the last token of any prompt
        self._decoder.hidden(ids_BS, cache=cache, answer_BS=torch.zeros_like(ids_BS, dtype=torch.bool))
        layers: Any = cache.layers
        for row, beginning in enumerate(beginnings):
            slots = [(layer.keys, layer.values) if layer.is_initialized else None for layer in layers]
            self._slots[beginning] = [
                slot and (slot[0][row, :, : len(beginning)].clone(), slot[1][row, :, : len(beginning)].clone())
                for slot in slots
            ]

    def _resumed(self, beginnings: Sequence[Tokens], cached: Sequence[int]) -> DynamicCache | None:
        """A cache to write in with the first ``cached`` tokens of each beginning, ending together."""
        if not any(cached):
            return None
        cache = self._decoder.new_cache()
        for number in range(len(cache.layers)):
            slots = [self._slots[beginning][number] if beginning else None for beginning in beginnings]
            some = next((slot for slot in slots if slot is not None), None)
            if some is not None:
                keys = right_aligned([slot and slot[0] for slot in slots], cached, like=some[0])
                values = right_aligned([slot and slot[1] for slot in slots], cached, like=some[1])
                cache.update(keys, values, number)
        return cache


def right_aligned(states: Sequence[Tensor | None], counts: Sequence[int], *, like: Tensor) -> Tensor:
    """(B, H, P, d): the first ``counts`` positions of each of ``states`` (H, P, d), zeros before them."""
    heads, _, size = like.shape
    longest = max(counts)
    aligned = like.new_zeros(len(states), heads, longest, size)
    for row, (state, count) in enumerate(zip(states, counts, strict=True)):
        if state is not None:
            aligned[row, :, longest - count :] = state[:, :count]
    return aligned


def common_beginnings(prompts: Sequence[Tokens]) -> list[int]:
    """How many of its first tokens each prompt should share with others; 0 = none, and never all of them.

    The sorted prompts are the leaves of a tree whose nodes are the runs with a common beginning. From the leaves up,
    every node takes what saves more tokens: its own beginning for all of them, or what its parts have chosen.
    """
    order = sorted(range(len(prompts)), key=lambda index: prompts[index])
    tokens_before = [0, *itertools.accumulate(len(prompts[index]) for index in order)]
    # Nodes that still grow, from the root to the deepest; each one's beginning is longer than that of the one before.
    # In sorted order a prompt belongs to all nodes whose beginning it shares with its predecessor, so that one look at
    # every pair of neighbours builds the whole tree.
    path = [_Node(0, 0)]
    for end in range(1, len(order) + 1):
        common = in_common(prompts[order[end - 1]], prompts[order[end]]) if end < len(order) else 0
        branch = _Node(common, end - 1)
        while path[-1].length > common:  # the next prompt lies outside of these
            closed = path.pop()
            closed.choose(end, tokens_before[end] - tokens_before[closed.start])
            # a new node at this depth takes in all that has just been closed above it
            branch.start = closed.start
            (path[-1] if path[-1].length >= common else branch).take(closed)
        if path[-1].length < common:
            path.append(branch)
    shared = [0] * len(prompts)
    for length, start, end in path[0].chosen:
        for index in order[start:end]:
            shared[index] = length
    return shared


def batches_by_beginning(
    items: Sequence[T], size: int, described: Callable[[T], tuple[Tokens, int]], *, enough_tokens: int
) -> Iterator[list[T]]:
    """Batches of at most ``size`` that need no more than ``size`` beginnings at a time.

    ``described`` gives an item's beginning and length. Batches hold about equally many tokens of their rows' own; what
    has no beginning stays among itself, because others would have to read as much as the longest.
    """
    by_beginning: dict[Tokens, list[tuple[int, T]]] = {}
    for item in items:
        beginning, length = described(item)
        by_beginning.setdefault(beginning, []).append((length - len(beginning), item))
    named = sorted(filter(None, by_beginning), key=lambda beginning: (-len(beginning), beginning))
    for together in (*batches(named, size), [()]):
        rows = [row for beginning in together for row in by_beginning.get(beginning, ())]
        rows.sort(key=lambda row: -row[0])
        for batch in even_batches(rows, size, length=lambda row: row[0], enough_tokens=enough_tokens):
            yield [item for _, item in batch]


def even_batches(
    items: Sequence[T], size: int, *, length: Callable[[T], int], enough_tokens: int
) -> Iterator[Sequence[T]]:
    """Consecutive runs of at most ``size`` of ``items``, which come the longest first.

    A batch with ``enough_tokens`` ends before an item so much shorter than its longest that padding would cost more
    than EVEN allows.
    """
    start = 0
    for end in range(1, len(items) + 1):
        longest, count = length(items[start]), end - start
        if end < len(items) and count < size:
            is_enough = count * longest >= enough_tokens
            if not is_enough or length(items[end]) >= EVEN * longest:
                continue
        yield items[start:end]
        start = end


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive runs of at most ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass
class _Node:
    """Neighbouring sorted prompts with a common beginning, from ``start`` to where the node is closed."""

    length: int
    """Tokens of the common beginning."""
    start: int
    """First of its prompts, by their sorted order."""
    saved: int = 0
    """Tokens that ``chosen`` saves."""
    chosen: list[tuple[int, int, int]] = field(default_factory=list)
    """Beginnings to be shared: (tokens, first prompt, prompt behind the last)."""

    def choose(self, end: int, num_tokens: int) -> None:
        """Take the own beginning where that saves as much as what the parts have chosen, and is worth it.

        ``num_tokens`` are those of all its prompts, which end before ``end``.
        """
        # the beginning is read once for all instead of once for each
        saved = (end - self.start - 1) * self.length
        if saved >= max(self.saved, WORTH_SHARING * num_tokens):
            self.saved, self.chosen = saved, [(self.length, self.start, end)]

    def take(self, part: _Node) -> None:
        """Add what a node within this one has chosen."""
        self.saved += part.saved
        self.chosen += part.chosen


def in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning; at least one token of each is left, whose state is asked for."""
    longest = min(len(first), len(second)) - 1
    return next((index for index in range(longest) if first[index] != second[index]), longest)
