"""Log-likelihoods of continuations, with no token computed twice.

What lm-eval's own transformers class does for a task with n options: every option is a row of its own that reads the
whole prompt again, examples included (options of one token share a row); the logits of every token over the whole
vocabulary are made, log-softmaxed in fp32 and thrown away but for those of the option; rows are padded to the longest
of their batch. What is needed at least: the states of the examples once, of the question once, of every option once;
the head at the tokens that are scored. With F examples, Q question and O option tokens for N questions that is
N (F + Q + n O) tokens against F + N (Q + n O), and logits at N (1 + n O) of them; so that is what happens here:

- prefix_sharing.py reads once what prompts of a task have in common;
- the options of a question go on from copies of its keys and values; where that would save little (one option, or only
  options of one token), question and option are one row;
- only the states before scored tokens meet the head, as many at a time as LOGIT_ELEMENTS allows;
- rows of a batch are about equally long; a batch large enough ends where padding would begin.

The price is copying keys and values: bytes per token and layer of 2 x key-value heads x head size, a hundredth of
reading the token again. Held at one time are those of at most 3 x batch size rows (beginnings, questions, options),
none longer than the longest request. An architecture whose cache cannot branch gets one row for every option.

B batch, S sequence, T tail (a continuation without its last token), D hidden, N scored positions, M scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from shoal.inference.decoder import Decoder, branched
from shoal.inference.prefix_sharing import Reader, Tokens, batches_by_beginning, common_beginnings, even_batches
from shoal.runtime import queued

Score = tuple[float, bool]
"""Sum of log-probabilities in nats, and whether every token is the model's first choice."""

WORTH_BRANCHING = 0.25
"""Share of the tokens that branching has to save: the windows of a rolling text share a context of only one token."""


@dataclass
class Question:
    """One context and the continuations asked for, each with the requests it answers."""

    context: Tokens
    requests: dict[Tokens, list[int]] = field(default_factory=dict)
    shared: int = 0
    """Tokens of the context that begin other contexts too and are read once for all."""

    @property
    def tails(self) -> list[Tokens]:
        """Continuations without their last token, which only has to be scored: longest first, each once."""
        return sorted({continuation[:-1] for continuation in self.requests}, key=lambda tail: (-len(tail), tail))

    @property
    def beginning(self) -> Tokens:
        """Tokens that other contexts begin with too."""
        return self.context[: self.shared]

    def is_worth_branching(self) -> bool:
        """Whether reading the context once for all tails saves a good share of the tokens that one row each takes."""
        tails, own = self.tails, len(self.context) - self.shared
        return (len(tails) - 1) * own > WORTH_BRANCHING * sum(own + len(tail) for tail in tails)


class Positions:
    """Hidden states whose next token is scored, and which requests each scored token belongs to."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.count = 0
        self.wanted: list[tuple[int, int]] = []
        """Pairs (position, token), one for each scored token."""
        self.owners: list[list[int]] = []
        """Requests whose score the token is part of."""

    def add_hidden(self, hidden_ND: Tensor) -> int:
        """Add states (N, D); returns the position of the first."""
        self.hidden.append(hidden_ND)
        self.count += len(hidden_ND)
        return self.count - len(hidden_ND)

    def want(self, positions: Sequence[int], tokens: Tokens, owners: list[int]) -> None:
        """Ask for the score of each token at its position, on behalf of the requests ``owners``."""
        self.wanted += zip(positions, tokens, strict=True)
        self.owners += [owners] * len(tokens)


def score(
    decoder: Decoder, requests: Sequence[tuple[Tokens, Tokens]], *, batch_size: int, branch: bool = True
) -> list[Score]:
    """The score of every (context, continuation), in order."""
    scores: dict[int, Score] = {}
    for batch in scored(decoder, requests, batch_size=batch_size, branch=branch):
        scores |= batch
    return [scores[index] for index in range(len(requests))]


def scored(
    decoder: Decoder, requests: Sequence[tuple[Tokens, Tokens]], *, batch_size: int, branch: bool = True
) -> Iterator[dict[int, Score]]:
    """The scores of every (context, continuation) by its index, batch after batch.

    ``branch`` False gives every continuation a forward of its own, which a model whose cache cannot branch gets anyway:
    same values at another cost.
    """
    answers: list[Score] = [(0.0, True)] * len(requests)  # sums that grow token by token
    for layout in layouts(decoder, requests, batch_size=batch_size, branch=branch, share=branch):
        positions = layout.locate(hidden_of(decoder, layout.passes, layout.begun))
        settle(positions.owners, token_scores(decoder, positions).tolist(), answers)
        yield {index: answers[index] for owners in positions.owners for index in owners}


@dataclass(frozen=True)
class Pass:
    """One forward through the layers."""

    ids_BS: Tensor
    answer_BS: Tensor
    """True where an answer is predicted: from a context's last token on. What padding has there is never read."""
    mask: Tensor | None = None
    """Mask over what the cache holds and the new tokens; None = nothing is padded that a token could see."""
    positions_BS: Tensor | None = None
    rows: Tensor | None = None
    """Rows of the first pass that these rows go on from; None = none, as in the first pass itself."""


@dataclass(frozen=True)
class Layout:
    """The forwards that answer one batch of questions, and where in their hidden states the answers lie."""

    passes: tuple[Pass, ...]
    locate: Callable[[Sequence[Tensor]], Positions]
    begun: DynamicCache | None = None
    """Cache that the first pass goes on from, which uses it up; None = nothing is read yet."""


def hidden_of(decoder: Decoder, passes: Sequence[Pass], cache: DynamicCache | None = None) -> list[Tensor]:
    """Final hidden states of every one of ``passes``, of which the first goes on from ``cache``."""
    if cache is None and len(passes) > 1:
        cache = decoder.new_cache()
    states = []
    for forward in passes:
        pass_cache = cache if forward.rows is None or cache is None else branched(cache, forward.rows)
        states.append(
            decoder.hidden(
                forward.ids_BS,
                mask=forward.mask,
                position_ids_BS=forward.positions_BS,
                cache=pass_cache,
                answer_BS=forward.answer_BS,
            )
        )
    return states


def layouts(
    decoder: Decoder,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int,
    branch: bool = True,
    share: bool = False,
) -> Iterator[Layout]:
    """Layouts of all that has to run to score every (context, continuation), batch after batch.

    With ``share`` beginnings that contexts have in common are read once, for which the decoder is run in between.

    Raises:
        ValueError: an empty context; the first token's score would be taken from the states of another row.
    """
    questions: dict[Tokens, Question] = {}
    for index, (context, continuation) in enumerate(requests):
        if not context:
            raise ValueError(f"a continuation is scored after at least one token, but request {index} has no context")
        question = questions.setdefault(context, Question(context))
        question.requests.setdefault(continuation, []).append(index)
    if share and decoder.can_branch:
        for question, shared in zip(questions.values(), common_beginnings(list(questions)), strict=True):
            question.shared = shared
    branching = [q for q in questions.values() if branch and decoder.can_branch and q.is_worth_branching()]
    chosen = {question.context for question in branching}
    # all others: question and tail in one row, once for all continuations that differ in their last token only
    whole = [(q, tail) for q in questions.values() if q.context not in chosen for tail in q.tails]
    even = partial(batches_by_beginning, enough_tokens=decoder.enough_tokens)
    reader = Reader(decoder, [question.beginning for question in branching])
    for batch in even(branching, batch_size, lambda q: (q.beginning, len(q.context))):
        yield _branched_layout(decoder, reader, batch, batch_size)
    reader = Reader(decoder, [question.beginning for question, _ in whole])
    for batch in even(whole, batch_size, lambda pair: (pair[0].beginning, len(pair[0].context) + len(pair[1]))):
        yield _whole_layout(decoder, reader, batch)


def _whole_layout(decoder: Decoder, reader: Reader, batch: Sequence[tuple[Question, Tokens]]) -> Layout:
    """One forward over context and tail together; every continuation with this tail reads its scores from it."""
    rows = [(*question.context, *tail) for question, tail in batch]
    if any(question.shared for question, _ in batch):
        start = reader.start(rows, [question.shared for question, _ in batch])
        ids_BS, positions_BS, begun = start.ids_BS, start.positions_BS, start.cache
        mask = decoder.mask_behind(start.pads, start.width)
        ends = [ids_BS.shape[1]] * len(batch)
    else:
        ids_BS, mask, positions_BS, begun = decoder.right_padded(rows), None, None, None
        ends = list(map(len, rows))
    # from the context's last token, whose state predicts the first one of the continuation
    starts = [end - len(tail) - 1 for end, (_, tail) in zip(ends, batch, strict=True)]
    first = Pass(ids_BS, _from(starts, ids_BS), mask, positions_BS)

    def locate(hidden: Sequence[Tensor]) -> Positions:
        positions = Positions()
        for row, (question, tail) in enumerate(batch):
            start = positions.add_hidden(hidden[0][row, starts[row] : ends[row]])
            for continuation, owners in question.requests.items():
                if continuation[:-1] == tail:
                    positions.want(range(start, start + len(continuation)), continuation, owners)
        return positions

    return Layout((first,), locate, begun)


def _branched_layout(decoder: Decoder, reader: Reader, batch: Sequence[Question], batch_size: int) -> Layout:
    """One forward over the contexts, then one over every ``batch_size`` tails on copies of the contexts' cache rows."""
    start = reader.start([question.context for question in batch], [question.shared for question in batch])
    fed = sorted(
        ((row, tail) for row, question in enumerate(batch) for tail in question.tails if tail), key=lambda p: -len(p[1])
    )
    chunks = list(even_batches(fed, batch_size, length=lambda p: len(p[1]), enough_tokens=decoder.enough_tokens))
    last = [start.ids_BS.shape[1] - 1] * len(batch)
    mask = decoder.mask_behind(start.pads, start.width)
    passes = [Pass(start.ids_BS, _from(last, start.ids_BS), mask, start.positions_BS)]
    for chunk in chunks:
        rows = queued(torch.tensor([row for row, _ in chunk]), decoder.device)
        ids_BT = decoder.right_padded([tail for _, tail in chunk])
        # tails are padded on the right, so their positions count on from the context's length
        offsets = queued(torch.tensor([[len(batch[row].context)] for row, _ in chunk]), decoder.device)
        mask = decoder.mask_behind([start.pads[row] for row, _ in chunk], start.width + ids_BT.shape[1])
        positions_BT = offsets + torch.arange(ids_BT.shape[1], device=decoder.device)
        passes.append(Pass(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), mask, positions_BT, rows))

    def locate(hidden: Sequence[Tensor]) -> Positions:
        positions = Positions()
        positions.add_hidden(hidden[0][:, -1])  # contexts' last states are the first positions, in order of the rows
        starts: dict[tuple[int, Tokens], int] = {}
        for chunk, hidden_BTD in zip(chunks, hidden[1:], strict=True):
            for index, (row, tail) in enumerate(chunk):
                starts[row, tail] = positions.add_hidden(hidden_BTD[index, : len(tail)])
        for row, question in enumerate(batch):
            for continuation, owners in question.requests.items():
                start = starts.get((row, continuation[:-1]), 0)
                rest = range(start, start + len(continuation) - 1)
                positions.want((row, *rest), continuation, owners)
        return positions

    return Layout(tuple(passes), locate, start.cache)


def _from(starts: Sequence[int], ids_BS: Tensor) -> Tensor:
    """(B, S) True from each row's start on."""
    starts_B1 = queued(torch.tensor(starts), ids_BS.device).unsqueeze(1)
    return torch.arange(ids_BS.shape[1], device=ids_BS.device) >= starts_B1


def settle(owners: Sequence[list[int]], scores: Sequence[Sequence[float]], answers: list[Score]) -> None:
    """Add up the wanted tokens' ``scores`` (token_scores) into ``answers``, those of their owners."""
    for asking, (log_prob, is_first) in zip(owners, scores, strict=True):
        for owner in asking:
            total, greedy = answers[owner]
            answers[owner] = (total + log_prob, greedy and bool(is_first))


def token_scores(decoder: Decoder, positions: Positions) -> Tensor:
    """Log-probability in nats of every wanted (position, token), and 1 where it is the first choice there, (M, 2).

    In fp32, and never more logits at one time than LOGIT_ELEMENTS.
    """
    hidden_ND, wanted = torch.cat(positions.hidden), positions.wanted
    index_M, token_M = torch.tensor(wanted).T  # on the host, where each chunk of positions picks its own
    scores_M2 = torch.zeros(len(wanted), 2, dtype=torch.float32, device=decoder.device)
    size = decoder.positions_at_once()
    for start in range(0, len(hidden_ND), size):
        # `logit - logsumexp` is closer to float64, but over a long answer it is 4e-4 nats off lm-eval's value,
        # because the rounding of torch's log-softmax on CPU adds up to that
        log_probs_NV = decoder.logits(hidden_ND[start : start + size]).log_softmax(dim=-1)
        own = ((index_M >= start) & (index_M < start + size)).nonzero().squeeze(1)
        in_chunk, rows, tokens = queued(torch.stack([own, index_M[own] - start, token_M[own]]), decoder.device)
        scores_M2[in_chunk, 0] = log_probs_NV[rows, tokens]
        scores_M2[in_chunk, 1] = (log_probs_NV.argmax(dim=-1)[rows] == tokens).float()
    return scores_M2
