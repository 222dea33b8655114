"""Distillation losses, one value per token, in nats. N tokens, V vocabulary.

p = teacher, q = student, both softmax at the term's temperature. All arithmetic is fp32 from log-softmax, whatever the
logits' precision. A function returns per-token values, so that whoever sums them owns the normalisation: dividing by
the token count of the whole optimizer step, over all ranks and micro-batches, is what makes the loss independent of
the split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from shoal.terms import LossTerm


class TokenLoss(Protocol):
    """Student logits (N, V), teacher logits (N, V) or None, labels (N,) in; one value per token (N,) out."""

    def __call__(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor | None, labels_N: Tensor, *, temperature: float
    ) -> Tensor: ...


def forward_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor | None, labels_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of every token, (N,), in nats, times temperature**2.

    The square keeps the gradient's size as the targets soften (Hinton et al. 2015, arXiv:1503.02531, section 2). The
    constant entropy of the teacher is kept, so that a student equal to its teacher has a loss of 0.
    """
    assert teacher_logits_NV is not None
    teacher_NV = functional.log_softmax(teacher_logits_NV.float() / temperature, dim=-1)
    student_NV = functional.log_softmax(student_logits_NV.float() / temperature, dim=-1)
    # kl_div's own kernel saves one (N, V) tensor for backward where exp-subtract-multiply-sum would save three
    kl_NV = functional.kl_div(student_NV, teacher_NV, reduction="none", log_target=True)
    return kl_NV.sum(-1) * temperature**2


def cross_entropy(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor | None, labels_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """-log q(label) of every token, (N,), in nats: learning from the text itself. The teacher is not looked at."""
    return functional.cross_entropy(student_logits_NV.float(), labels_N, reduction="none")


LOSSES: dict[str, TokenLoss] = {"forward_kl": forward_kl, "cross_entropy": cross_entropy}


def chunked_head_loss(
    student_hidden_ND: Tensor,
    teacher_hidden_ND: Tensor | None,
    labels_N: Tensor,
    *,
    student_head: Callable[..., Tensor],
    student_parameters: tuple[Tensor, ...],
    teacher_head: Callable[[Tensor], Tensor],
    terms: tuple[LossTerm, ...],
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of all terms over all tokens (scalar, nats), and each term's own unweighted sum (one per term).

    The logits of a whole batch are the largest tensors of distillation: 2 x N x V floats and their gradients. Here the
    head is applied to ``chunk`` tokens at a time, and the chunk's gradient with respect to hidden states and head is
    taken at once, in the forward pass, so that no logits outlive their chunk and none is computed twice (which
    checkpointing would do). What stays is one gradient of the size of the hidden states and one of the head's weight.

    ``teacher_hidden_ND`` may be None where no term looks at the teacher.
    ``student_head(hidden, *student_parameters)`` gives logits. The parameters are arguments because gradients flow to
    them: under ZeRO-3 they exist in full only while the head module is being called.

    Raises:
        ValueError: no tokens; an average over nothing would hide a broken label mask.
    """
    if len(labels_N) == 0:
        raise ValueError("no supervised token in this batch: every label is ignored")
    loss, term_sums = _ChunkedHeadLoss.apply(
        student_hidden_ND, teacher_hidden_ND, labels_N, student_head, teacher_head, terms, chunk, *student_parameters
    )
    return loss, term_sums


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, teacher_hidden_ND, labels_N, head, teacher_head, terms, chunk, *parameters):
        wanted = [hidden_ND.requires_grad, *(parameter.requires_grad for parameter in parameters)]
        term_sums = torch.zeros(len(terms), dtype=torch.float64, device=hidden_ND.device)
        hidden_grad_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        parameter_grads = [torch.zeros_like(p) if w else None for p, w in zip(parameters, wanted[1:], strict=True)]
        # one leaf for all chunks: autocast then casts the weight once
        leaves = [p.detach().requires_grad_(w) for p, w in zip(parameters, wanted[1:], strict=True)]
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            hidden_CD = hidden_ND[part].detach().requires_grad_(wanted[0])
            teacher_logits_CV = None if teacher_hidden_ND is None else teacher_head(teacher_hidden_ND[part])
            with torch.enable_grad():
                logits_CV = head(hidden_CD, *leaves)
                sums = [
                    LOSSES[term.kind](
                        logits_CV, teacher_logits_CV, labels_N[part], temperature=getattr(term, "temperature", 1.0)
                    ).sum()
                    for term in terms
                ]
                total = torch.stack([term.weight * s for term, s in zip(terms, sums, strict=True)]).sum()
            term_sums += torch.stack([s.detach() for s in sums])
            targets = [leaf for leaf, w in zip([hidden_CD, *leaves], wanted, strict=True) if w]
            if not targets:
                continue
            grads = iter(torch.autograd.grad(total, targets))
            if hidden_grad_ND is not None:
                hidden_grad_ND[part] = next(grads)
            for grad in parameter_grads:
                if grad is not None:
                    grad += next(grads)
        ctx.save_for_backward(hidden_grad_ND, *parameter_grads)
        ctx.mark_non_differentiable(term_sums)
        weights = torch.tensor([term.weight for term in terms], dtype=torch.float64, device=term_sums.device)
        return (weights * term_sums).sum().float(), term_sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_terms):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_grad_ND, *parameter_grads = ctx.saved_tensors
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in (hidden_grad_ND, *parameter_grads)]
        return (scaled[0], None, None, None, None, None, None, *scaled[1:])
