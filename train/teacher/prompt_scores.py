"""A teacher of which nothing is known but the log-probabilities that an engine tells of prompts.

Every document of a row is a prompt, since documents do not see each other. An engine tells of every token of a prompt
what it thought likely in its place, and that token: entries that stand one place behind the position that predicts
them. So a token that nobody reads is put behind every document, and the last position is told of like the others.

B rows, S sequence, K tokens told of a position, N rows of a sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from shoal.errors import UserError

T = TypeVar("T")
Answer = Sequence[Mapping[int, float] | None]
"""Of every token of a prompt the log-probabilities, in nats, of the likeliest tokens in its place and of itself; None
of the first."""
MOST_PROBABILITY = 1.01
"""Sum of the probabilities of a position's tokens above which numbers are none: some round them."""


class PromptEngine(Protocol):
    """Tells the log-probabilities of prompts."""

    place: str
    """Setting that it is known by, and what it is, for messages."""
    about: dict[str, Any]
    """What recording.json says of it."""

    def scored(self, prompts: Sequence[list[int]], read: Callable[[list[int], Answer], T]) -> Iterator[T]:
        """What ``read`` makes of every prompt and the answer to it, in their order.

        Raises:
            UserError: there is no answer, or it is none to the prompt.
        """
        ...


class PromptSignals(NamedTuple):
    """What an engine says of rows. On the CPU."""

    ids_BSK: Tensor
    """int64; most probable first."""
    log_probs_BSK: Tensor
    """fp32, under the full softmax."""
    tail_BS: Tensor
    """fp32; probability of all other tokens together. One minus the rest, so it has few digits where that is all."""
    token_log_probs_BS: Tensor
    """fp32; of the token that stands there, not a number at the beginning of a document."""


def prompt_signals(
    engine: PromptEngine,
    ids_BS: Tensor,
    positions_BS: Tensor,
    *,
    top_k: int,
    vocab_size: int,
    tell: Callable[[int], object] = lambda rows: None,
) -> PromptSignals:
    """What ``engine`` says of rows of packed documents; ``tell`` is told of every row that is done.

    Raises:
        UserError: as ``engine.scored`` does; too few tokens, ids beyond the vocabulary, or no log-probabilities.
    """
    rows, length = ids_BS.shape
    ids, log_probs = np.empty((rows, length, top_k), np.int64), np.empty((rows, length, top_k))
    own = np.full((rows, length), np.nan)
    places = [
        (row, start, stop)
        for row, positions in enumerate(positions_BS.numpy())
        for start, stop in pairwise([*(0, *(1 + np.flatnonzero(positions[1:] == 0))), length])
    ]
    prompts = [[*ids_BS[row, start:stop].tolist(), int(ids_BS[row, stop - 1])] for row, start, stop in places]

    def read(prompt: list[int], answer: Answer) -> tuple[np.ndarray, np.ndarray, list[float]]:
        return _read(prompt, answer, engine.place, top_k=top_k, vocab_size=vocab_size)

    for (row, start, stop), (own_ids, own_log_probs, of_tokens) in zip(
        places, engine.scored(prompts, read), strict=True
    ):
        ids[row, start:stop], log_probs[row, start:stop] = own_ids, own_log_probs
        own[row, start + 1 : stop] = of_tokens[:-1]
        tell(int(stop == length))
    tail = np.clip(1 - np.exp(log_probs).sum(-1), 0, None)
    return PromptSignals(torch.from_numpy(ids), *(torch.from_numpy(x).float() for x in (log_probs, tail, own)))


def _read(
    prompt: list[int], answer: Answer, place: str, *, top_k: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Ids (S, K) and log-probabilities (S, K) of the positions before the last, and (S,) of the tokens behind them.

    The token that stands there is told of even where it is not among the likeliest: then it is one entry more, the
    least.
    """
    if len(answer) != len(prompt):
        raise UserError(f"{place}: tells of {len(answer)} tokens of a prompt of {len(prompt)}: it cuts prompts short")
    ids, log_probs, of_tokens = np.empty((len(prompt) - 1, top_k), np.int64), np.empty((len(prompt) - 1, top_k)), []
    for position, (token, told) in enumerate(zip(prompt[1:], answer[1:], strict=True)):
        if told is None or token not in told or len(told) < top_k:
            count = 0 if told is None else len(told)
            raise UserError(
                f"{place}: tells of {count} tokens in place {position + 1} of a prompt where record.top_k asks for "
                f"{top_k} and the token that stands there; let it tell of more, or lower record.top_k"
            )
        best = sorted(told.items(), key=lambda entry: -entry[1])[:top_k]
        ids[position], log_probs[position] = zip(*best, strict=True)
        of_tokens.append(told[token])
    if ids.max() >= vocab_size or ids.min() < 0:
        raise UserError(
            f"{place}: tells of token {ids.max()}, and the teacher's vocabulary has {vocab_size:,}: it runs a model "
            "with another tokenizer; start it with the recipe's model"
        )
    most = np.exp(log_probs).sum(-1).max()  # not a number where one of them is none
    if not most < MOST_PROBABILITY:
        raise UserError(
            f"{place}: tells of probabilities that sum to {most:.4g}: these are no log-probabilities; vLLM tells them "
            "with --logprobs-mode raw_logprobs, its default"
        )
    return ids, log_probs, of_tokens


Reference = Callable[[Tensor, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]
"""Runs the teacher itself over ids and positions, (N, S): its final states (N, S, D), and the way from states to
logits, all on the CPU."""
HEAD_CHUNK = 256
"""Tokens whose full-vocabulary logits exist at one time."""
LEAST_REST = 1e-9
"""What is taken for the probability of the rest where an engine leaves none."""


@torch.no_grad()
def bucket_kl(said: PromptSignals, hidden_NSD: Tensor, to_logits: Callable[[Tensor], Tensor]) -> float:
    """Mean KL(teacher || engine) in nats per token, of the K tokens that the engine tells of and all others as one."""
    total, tail_N = 0.0, said.tail_BS.flatten().double().clamp(min=LEAST_REST)
    planes = (hidden_NSD.flatten(0, 1), said.ids_BSK.flatten(0, 1), said.log_probs_BSK.flatten(0, 1).double(), tail_N)
    for hidden, ids, log_q, tail in zip(*(plane.split(HEAD_CHUNK) for plane in planes), strict=True):
        log_p_all = to_logits(hidden).double().log_softmax(-1)
        log_p = log_p_all.gather(-1, ids)
        rest = log_p_all.scatter_(-1, ids, -math.inf).logsumexp(-1)
        inside = (log_p.exp() * (log_p - log_q)).sum(-1)
        total += float((inside + torch.where(rest.isinf(), 0.0, rest.exp() * (rest - tail.log()))).sum())
    return total / len(tail_N)
