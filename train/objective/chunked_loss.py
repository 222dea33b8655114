"""The loss at the output head, a chunk of tokens at a time. N tokens, C tokens of a chunk, R of a block, V vocabulary,
D hidden, K stored tokens.

The logits of a whole batch are the largest tensors of distillation: 2 x N x V floats and their gradients. Here the head
is applied to a chunk, and the chunk's gradient with respect to hidden states and head is taken at once, in the forward
pass, so that no logits outlive their chunk and none is computed twice (which checkpointing would do). What stays is one
gradient of the size of the hidden states and one of the head's weight.

What a chunk costs: the matrix products teacher logits, student logits and the two of the backward pass, 2 V D
operations per token each, and between them forward KL reads two logits, writes one gradient and takes four exponentials
per token and word. On CPU that happens in blocks small enough for the cache, so that fp32 copies never reach memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

from shoal.recipe import losses
from shoal.runtime import queued

from .divergences import Softmax, softened, temperature_of, token_losses

BLOCK = 2**17
"""Logits of one block on CPU for every thread: half a megabyte of fp32 per copy. Smaller ones would have threads wait
for each other at every operation."""
CHUNK = 256
"""Tokens whose logits exist at one time, unless they would be more than LOGITS."""
LOGITS = 2**26
"""Most logits of a chunk: of a larger vocabulary fewer tokens, so that memory does not grow. A quarter of that costs a
CPU an eighth of its speed at 262 thousand words: the head is read for every chunk."""
SMALLEST_TAIL = 2.0**-149
"""Probability of all other words together where float32 holds 0 for it: it is at most this, and has to have a
logarithm."""


@dataclass(frozen=True)
class Dense:
    """A teacher that is here: its final hidden states, and its way from them to logits."""

    hidden_ND: Tensor
    """Final hidden states of the tokens whose next one is learnt."""
    to_logits: Callable[[Tensor], Tensor]
    """Way from such states (C, D) to logits (C, V), scale and soft cap included."""


@dataclass(frozen=True)
class TopK:
    """What was recorded of a teacher: its most probable tokens, the first one the most, and their log-probabilities in
    its whole vocabulary at ``temperature``, not renormalised."""

    ids_NK: Tensor
    """Token ids, the most probable first."""
    log_probs_NK: Tensor
    """Log-probabilities of these tokens, in nats."""
    temperature: float
    """Temperature that logits were divided by when they were recorded."""
    tail_N: Tensor
    """Probability of all other tokens together; what the log-probabilities leave has no digits where the teacher is
    sure."""


@dataclass(frozen=True)
class TermInput:
    """What a term is given of a micro-batch besides its tokens' distributions."""

    share: float = 1.0
    """t of TAID's terms."""
    learns_N: Tensor | None = None
    """Mask, on the host, of the tokens that the term learns from; None = all. To it the others are worth 0."""


class How(TypedDict, total=False):
    """How the loss at the head is computed."""

    chunk: Required[int]
    """Tokens whose logits exist at one time."""
    inputs: Sequence[TermInput] | None
    """One entry per term; None = all learn from all tokens, and TAID's t is its start. Where a term learns from no
    token of a chunk (on CPU, of a block), it is not computed."""
    compiled: Callable[..., tuple[Tensor, Tensor | None]] | None
    """Runs ``block_loss``; None = nothing is compiled."""


def most_tokens(vocabulary: int) -> int:
    """Most tokens of a chunk whose logits are of so many words."""
    return max(1, LOGITS // vocabulary)


def chunked_head_loss(
    hidden_ND: Tensor,
    labels_N: Tensor,
    targets: Dense | TopK | None,
    *,
    student_head: Callable[..., Tensor],
    student_parameters: Sequence[Tensor],
    terms: Sequence[losses.LogitTerm],
    **how: Unpack[How],
) -> tuple[Tensor, Tensor]:
    """The weighted sum of all terms over all tokens, in nats, a differentiable scalar; and each term's own unweighted
    sum over tokens, (number of terms,), float64.

    ``targets`` stand for the first tokens, one for each; no term asks the teacher about those behind them, or with
    None about any. Of `TopK` every divergence is that of the distributions over K words and `another`, a lower bound of
    the whole one.
    ``student_head(hidden, *student_parameters)`` gives logits. The parameters are arguments because gradients flow to
    them: under ZeRO-3 they exist in full only while the head module is being called.

    Raises:
        ValueError: no tokens; an average over nothing would hide a broken label mask.
    """
    if len(labels_N) == 0:
        raise ValueError("no token of this batch is trained on: every label is ignored")
    if isinstance(targets, TopK):
        # other recipes are refused
        assert all(map(losses.from_top_k, terms))
        assert losses.temperatures(terms) <= {targets.temperature}
    if (inputs := how.get("inputs")) is None:
        inputs = [TermInput(term.start if isinstance(term, losses.TAID) else 1.0) for term in terms]
    compiled = how.get("compiled")
    own = block_loss if compiled is None else compiled
    how_run = {"is_compiled": compiled is not None, "has_gradient": torch.is_grad_enabled()}
    objective = _Objective(tuple(terms), tuple(inputs), targets, labels_N, own, **how_run)
    return _ChunkedHeadLoss.apply(hidden_ND, objective, student_head, how["chunk"], *student_parameters)


@dataclass(frozen=True)
class _Objective:
    """What a chunk's loss depends on besides the student's logits."""

    terms: tuple[losses.LogitTerm, ...]
    inputs: tuple[TermInput, ...]
    targets: Dense | TopK | None
    """Of the first `num_asked` tokens."""
    labels_N: Tensor
    block_loss: Callable[..., tuple[Tensor, Tensor | None]]
    """The function of this name below, or what runs it compiled."""
    is_compiled: bool
    has_gradient: bool
    """Whether anybody asks for it; within a torch.autograd.Function that can no longer be told."""

    @property
    def num_asked(self) -> int:
        """Number of the first tokens of which the teacher has said something."""
        if self.targets is None:
            return 0
        return len(self.targets.hidden_ND if isinstance(self.targets, Dense) else self.targets.ids_NK)

    def parts(self, chunk: int) -> Iterator[slice]:
        """Chunks of all tokens; the teacher has been asked of none or all of each."""
        ends = (0, self.num_asked, len(self.labels_N))
        return (
            slice(start, min(start + chunk, end))
            for begin, end in itertools.pairwise(ends)
            for start in range(begin, end, chunk)
        )

    def of_chunk(self, logits_CV: Tensor, part: slice, *, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The terms' sums over the chunk ``part``, (number of terms,), and the weighted gradient of its logits, (C, V),
        if wanted."""
        targets, labels_C = self.targets if part.start < self.num_asked else None, self.labels_N[part]
        said: Tensor | Coarse | None = None
        if isinstance(targets, Dense):
            said = targets.to_logits(targets.hidden_ND[part])
        elif targets is not None:
            if (num_stored := targets.ids_NK.shape[-1]) >= logits_CV.shape[-1]:
                raise ValueError(f"{num_stored} stored tokens of a vocabulary of {logits_CV.shape[-1]}; store fewer")
            said = _with_tail(targets, part)
        values_TC = logits_CV.new_zeros(len(self.terms), len(logits_CV), dtype=torch.float64)
        gradient_CV = torch.empty_like(logits_CV) if wanted else None
        # compiled, nothing of a block but its gradient reaches memory
        rows = len(logits_CV) if self.is_compiled else _block_rows(logits_CV)
        for start in range(0, len(logits_CV), rows):
            place = slice(start, start + rows)
            logits_RV, labels_R = logits_CV[place], labels_C[place]
            learns = self._learning(part, place, labels_C.device)
            teacher = said.of_rows(place) if isinstance(said, Coarse) else None if said is None else said[place]
            shares: list[float | Tensor] = [each.share for each in self.inputs]
            if self.is_compiled:
                _of_any_length(logits_RV, labels_R, teacher, learns.values())
                for index, term in enumerate(self.terms):
                    if isinstance(term, losses.TAID):  # moves with every step, and a number would be part of the graph
                        exact = torch.promote_types(logits_RV.dtype, torch.float32)
                        shares[index] = logits_RV.new_full((), self.inputs[index].share, dtype=exact)
            values_TC[:, place], block_gradient_RV = self.block_loss(
                self.terms, shares, logits_RV, teacher, labels_R, learns, self.is_compiled
            )
            if gradient_CV is not None:
                gradient_CV[place] = 0 if block_gradient_RV is None else block_gradient_RV
        return values_TC.sum(-1), gradient_CV

    def _learning(self, part: slice, place: slice, device: torch.device) -> dict[int, Tensor | None]:
        """The terms to compute at ``place`` in the chunk ``part``, each with the mask of what it learns from."""
        masks = {i: None if each.learns_N is None else each.learns_N[part][place] for i, each in enumerate(self.inputs)}
        return {
            index: None if mask_R is None or mask_R.all() else queued(mask_R, device)
            for index, mask_R in masks.items()
            if mask_R is None or mask_R.any()
        }


class Coarse(NamedTuple):
    """A teacher's distribution over stored words and, last, all others, at a temperature."""

    ids_RK: Tensor
    log_RK: Tensor
    prob_RK: Tensor
    temperature: float

    def of_rows(self, rows: slice) -> Coarse:
        """That of these rows alone."""
        return Coarse(self.ids_RK[rows], self.log_RK[rows], self.prob_RK[rows], self.temperature)


def block_loss(
    terms: Sequence[losses.LogitTerm],
    shares: Sequence[float | Tensor],
    logits_RV: Tensor,
    teacher: Tensor | Coarse | None,
    labels_R: Tensor,
    learns: Mapping[int, Tensor | None],
    rounded: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Values of all terms, (number of terms, R), 0 where none is computed, and the weighted gradient of the logits,
    (R, V), or None where no term is.

    ``teacher`` are its logits (R, V), or what was stored of it; ``learns`` has the terms to compute, with the mask of
    the tokens that each learns from, None = all; ``shares`` is TAID's t for every term. Pure, so that it can be
    compiled: then the gradient is ``rounded`` to the precision of the logits, and no other one reaches memory.
    """
    values_TR = logits_RV.new_zeros(len(terms), len(logits_RV), dtype=torch.float64)
    block = _Block(terms, shares, labels_R, learns, values_TR)
    if isinstance(teacher, Coarse):
        total_RV = _coarsened(block, logits_RV, teacher)
    else:
        total_RV = _whole(block, logits_RV, teacher)
    return values_TR, total_RV.to(logits_RV.dtype) if rounded and total_RV is not None else total_RV


def _whole(block: _Block, logits_RV: Tensor, teacher: Tensor | None) -> Tensor | None:
    """The gradient against whole distributions."""
    terms, total_RV = block.terms, None
    # terms of one temperature share its softmaxes, which are most of a block's work
    for temperature in dict.fromkeys(temperature_of(terms[index]) for index in block.learns):
        members = [index for index in block.learns if temperature_of(terms[index]) == temperature]
        q, p = softened(logits_RV, temperature), None
        if teacher is not None and losses.needs_teacher([terms[index] for index in members]):
            p = softened(teacher, temperature)
        total_RV = _sum(block, members, p, q, total_RV)
    return total_RV


def _coarsened(block: _Block, logits_RV: Tensor, teacher: Coarse) -> Tensor | None:
    """The gradient against stored words and `another`.

    The student's coarsened distribution is a softmax too, of the kept logits and the log-sum-exp of all others. So
    its gradient goes to the kept words as it is, and that of `another` is spread over the others by their share.
    """
    text = [index for index in block.learns if isinstance(block.terms[index], losses.CrossEntropy)]
    coarse = [index for index in block.learns if index not in text]
    total_RV = _sum(block, text, None, softened(logits_RV, 1.0), None) if text else None
    if not coarse:
        return total_RV
    p, ids_RK = Softmax(teacher.log_RK, teacher.prob_RK), teacher.ids_RK
    tempered_RV = logits_RV.to(p.log_NV.dtype, copy=True)
    if teacher.temperature != 1.0:
        tempered_RV.div_(teacher.temperature)
    kept_RK = tempered_RV.gather(-1, ids_RK)
    # log-sum-exp of all other words, about their largest so that nothing overflows; in place, a block is large
    others_RV = tempered_RV.scatter_(-1, ids_RK, -torch.inf)
    peak_R1 = others_RV.amax(-1, keepdim=True)
    sum_R1 = others_RV.sub_(peak_R1).exp_().sum(-1, keepdim=True)
    # `another` is the last of K + 1 outcomes
    q = softened(torch.cat([kept_RK, peak_R1 + sum_R1.log()], -1), 1.0)
    coarse_RK = _sum(block, coarse, p, q, None)
    # a word's share of `another` is exp(its logit - peak) / sum, which others_RV holds already but for the sum
    spread_RV = others_RV.mul_(coarse_RK[:, -1:] / sum_R1).scatter_(-1, ids_RK, coarse_RK[:, :-1])
    return spread_RV if total_RV is None else total_RV.add_(spread_RV)


class _Block(NamedTuple):
    """What all terms are computed of in a block, and where their values go."""

    terms: Sequence[losses.LogitTerm]
    shares: Sequence[float | Tensor]
    labels_R: Tensor
    learns: Mapping[int, Tensor | None]
    values_TR: Tensor


def _sum(block: _Block, members: Sequence[int], p: Softmax | None, q: Softmax, total: Tensor | None) -> Tensor:
    """Fill in the values of ``members``, terms of one temperature; ``total`` plus their weighted gradients."""
    terms, shares, labels_R, learns, values_TR = block
    for index in members:
        term = terms[index]
        temperature = temperature_of(term)
        values_R, gradient = token_losses(term, p, q, labels_R, share=shares[index])
        learns_R = learns[index]
        if learns_R is not None:
            values_R = values_R.masked_fill(~learns_R, 0.0)
        values_TR[index] = values_R if temperature == 1.0 else values_R * temperature**2
        # the square over the temperature by which the logits were divided
        factor = term.weight * temperature
        if learns_R is not None:
            # in the pass that weighs the gradient anyway
            factor_R1 = learns_R[:, None].to(gradient.dtype) * factor
            total = gradient.mul_(factor_R1) if total is None else total.addcmul_(gradient, factor_R1)
        elif total is None:
            total = gradient if factor == 1.0 else gradient.mul_(factor)
        elif factor != 0.0:
            total.add_(gradient, alpha=factor)
    assert total is not None
    return total


def _of_any_length(*values: Any) -> None:
    """Let one graph serve these tensors, and those in lists, whatever their number of rows."""
    for value in values:
        if isinstance(value, Tensor):
            maybe_mark_dynamic(value, 0)
        elif isinstance(value, Iterable):
            _of_any_length(*value)


def _with_tail(targets: TopK, part: slice) -> Coarse:
    """The teacher's distribution over the stored words of a chunk and, last, all others."""
    log_CK, tail_C1 = targets.log_probs_NK[part].double(), targets.tail_N[part, None].double()
    tail_C1 = torch.where(tail_C1 > 0, tail_C1, SMALLEST_TAIL)
    exact = torch.promote_types(targets.log_probs_NK.dtype, torch.float32)
    log_C = torch.cat([log_CK, tail_C1.log()], -1).to(exact)
    return Coarse(targets.ids_NK[part].long(), log_C, log_C.exp(), targets.temperature)


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, objective, head, chunk, *parameters):
        wanted = [hidden_ND.requires_grad, *(parameter.requires_grad for parameter in parameters)]
        trains = objective.has_gradient and any(wanted) and any(term.weight > 0 for term in objective.terms)
        term_sums = torch.zeros(len(objective.terms), dtype=torch.float64, device=hidden_ND.device)
        hidden_grad_ND = torch.zeros_like(hidden_ND) if wanted[0] else None
        parameter_grads: list[Tensor | None] = [None] * len(parameters)
        # cast once for all chunks, and gradients are taken with respect to the cast ones
        leaves = [_cast(p.detach()).requires_grad_(w) for p, w in zip(parameters, wanted[1:], strict=True)]
        if parameters:
            chunk = min(chunk, most_tokens(len(parameters[0])))
        for part in objective.parts(chunk):
            hidden_CD = hidden_ND[part].detach().requires_grad_(wanted[0])
            # the only graph there is: from this chunk's hidden states to its logits, gone with the next chunk
            with torch.enable_grad():
                logits_CV = head(hidden_CD, *leaves)
            sums, gradient_CV = objective.of_chunk(logits_CV.detach(), part, wanted=trains)
            term_sums += sums
            if gradient_CV is None:
                continue
            inputs = [leaf for leaf, w in zip([hidden_CD, *leaves], wanted, strict=True) if w]
            grads = iter(torch.autograd.grad(logits_CV, inputs, gradient_CV))
            if hidden_grad_ND is not None:
                hidden_grad_ND[part] = next(grads)
            for index, leaf in enumerate(leaves):
                if leaf.requires_grad:
                    parameter_grads[index] = _accumulated(parameter_grads[index], next(grads))
        grads_as_stored = [
            (torch.zeros_like(p) if grad is None else grad.to(p.dtype)) if w else None
            for grad, p, w in zip(parameter_grads, parameters, wanted[1:], strict=True)
        ]
        ctx.save_for_backward(hidden_grad_ND, *grads_as_stored)
        ctx.mark_non_differentiable(term_sums)
        # number by number: a list of them would be copied to the device, which waits for it
        weighted = [value * term.weight for value, term in zip(term_sums.unbind(), objective.terms, strict=True)]
        return sum(weighted, term_sums.new_zeros(())).float(), term_sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_others):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_grad_ND, *parameter_grads = ctx.saved_tensors  # taken in forward for a loss whose gradient is 1
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in (hidden_grad_ND, *parameter_grads)]
        return (scaled[0], None, None, None, *scaled[1:])


def _cast(parameter: Tensor) -> Tensor:
    """The parameter as autocast would give it to every chunk anew."""
    device = parameter.device.type
    if torch.is_autocast_enabled(device) and parameter.is_floating_point():
        return parameter.to(torch.get_autocast_dtype(device))
    return parameter


def _accumulated(sum_so_far: Tensor | None, gradient: Tensor) -> Tensor:
    """In fp32 or better: chunks added up in bf16 would lose what is small."""
    if sum_so_far is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    rows = _block_rows(gradient)
    for into, part in zip(sum_so_far.split(rows), gradient.split(rows), strict=True):
        into.add_(part)  # at once it would make an fp32 copy of a bf16 gradient, as large as the head
    return sum_so_far


def _block_rows(values: Tensor) -> int:
    """How many rows to work on at one time, so that what they need stays in the cache."""
    if values.device.type != "cpu":
        return max(1, len(values))
    return max(1, BLOCK * torch.get_num_threads() // max(1, values[0].numel()))
