"""Divergences between teacher and student, value and gradient, one value per token, in nats. N tokens, V outcomes.

p = teacher's, q = student's distribution, softmax of logits over a temperature. Every function gives its values (N,)
and their gradient with respect to the student's tempered logits (N, V), both in closed form: without an autograd tape
a block of tokens needs two log-softmaxes and little more, and the same functions serve the whole vocabulary and a
coarsened one (top-k and everything else). Where a value is a function of log q with slope g, that gradient is
g - q sum(g); a slope of c q for every outcome therefore adds nothing and is left out below.

Values are per token, so that whoever sums them owns the normalisation: dividing by the token count of the whole
optimizer step, over all ranks and micro-batches, is what makes the loss independent of the split.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shoal.recipe import losses


class Softmax(NamedTuple):
    """A distribution and its logarithm."""

    log_NV: Tensor
    prob_NV: Tensor


class Values(NamedTuple):
    """A loss of every token, (N,), and its gradient with respect to the student's tempered logits, (N, V)."""

    values_N: Tensor
    gradient_NV: Tensor


def softened(logits_NV: Tensor, temperature: float) -> Softmax:
    """The softmax of logits / temperature, in fp32 or better whatever the logits' precision."""
    exact = torch.promote_types(logits_NV.dtype, torch.float32)
    if temperature != 1.0:
        logits_NV = logits_NV.to(exact) / temperature
    log_NV = torch.log_softmax(logits_NV, dim=-1, dtype=exact)
    return Softmax(log_NV, log_NV.exp())


def forward_kl(p: Softmax, q: Softmax) -> Values:
    """KL(p || q). The constant entropy of p is kept, so that a student equal to its teacher has a loss of 0."""
    return Values((p.log_NV - q.log_NV).mul_(p.prob_NV).sum(-1), q.prob_NV - p.prob_NV)


def reverse_kl(p: Softmax, q: Softmax) -> Values:
    """KL(q || p)."""
    # d/d log q of q (log q - log p) is this plus q, a slope of c q, which adds nothing (see above)
    slope_NV = q.prob_NV * (q.log_NV - p.log_NV)
    values_N = slope_NV.sum(-1)
    return Values(values_N, slope_NV - q.prob_NV * values_N[:, None])


def jsd(p: Softmax, q: Softmax, *, beta: float) -> Values:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al. 2023, arXiv:2306.13649).

    The slopes of both halves through m add up to a constant, only that of log q is left.
    """
    mixed_NV = _log_mixture(p, q, beta)
    slope_NV = (1 - beta) * q.prob_NV * (q.log_NV - mixed_NV)
    student_N = slope_NV.sum(-1)
    teacher_N = beta * (p.prob_NV * (p.log_NV - mixed_NV)).sum(-1)
    return Values(teacher_N + student_N, slope_NV - q.prob_NV * student_N[:, None])


def skewed_forward_kl(p: Softmax, q: Softmax, *, alpha: float) -> Values:
    """KL(p || alpha p + (1 - alpha) q) (Ko et al. 2024, arXiv:2402.03898)."""
    mixed_NV = _log_mixture(p, q, alpha)
    slope_NV = (alpha - 1) * p.prob_NV * (q.log_NV - mixed_NV).exp()
    return Values((p.prob_NV * (p.log_NV - mixed_NV)).sum(-1), _through_softmax(slope_NV, q))


def skewed_reverse_kl(p: Softmax, q: Softmax, *, alpha: float) -> Values:
    """KL(q || (1 - alpha) p + alpha q) (Ko et al. 2024)."""
    ratio_NV = q.log_NV - _log_mixture(p, q, 1 - alpha)
    slope_NV = q.prob_NV * (ratio_NV - alpha * ratio_NV.exp())
    return Values((q.prob_NV * ratio_NV).sum(-1), _through_softmax(slope_NV, q))


def taid(p: Softmax, q: Softmax, *, share: float | Tensor) -> Values:
    """KL(p_t || q) with p_t = softmax of (1 - t) times q's logits, as constants, plus t times p's, t = ``share`` (Shing
    et al. 2025, arXiv:2501.16937). Logarithms of probabilities mix like logits, they differ by constants."""
    return forward_kl(softened(torch.lerp(q.log_NV, p.log_NV, share), 1.0), q)


def cross_entropy(q: Softmax, labels_N: Tensor) -> Values:
    """-log q(label): learning from the text itself."""
    label_N1 = labels_N[:, None]
    # q - 1 at the label, q elsewhere; a scatter, which needs the whole of q in memory, would be all that is there of it
    if torch.compiler.is_compiling():
        gradient_NV = q.prob_NV - (torch.arange(q.prob_NV.shape[-1], device=label_N1.device) == label_N1).to(q.prob_NV)
    else:
        gradient_NV = q.prob_NV.scatter_add(-1, label_N1, torch.full_like(q.prob_NV[:, :1], -1.0))
    return Values(-q.log_NV.gather(-1, label_N1)[:, 0], gradient_NV)


def temperature_of(term: losses.LogitTerm) -> float:
    """The temperature of ``term``; cross-entropy looks at the model's own distribution."""
    return 1.0 if isinstance(term, losses.CrossEntropy) else term.temperature


def token_losses(
    term: losses.LogitTerm, p: Softmax | None, q: Softmax, labels_N: Tensor, *, share: float | Tensor
) -> Values:
    """What ``term`` gives for distributions at its temperature; not yet times temperature**2, see `scale_of`.

    ``share`` is TAID's present t; ``p`` may be None for cross-entropy. Labels number the outcomes.
    """
    if isinstance(term, losses.CrossEntropy):
        return cross_entropy(q, labels_N)
    assert p is not None, f"{term.kind} needs the teacher"
    match term:
        case losses.ForwardKL():
            return forward_kl(p, q)
        case losses.ReverseKL():
            return reverse_kl(p, q)
        case losses.JSD():
            return jsd(p, q, beta=term.beta)
        case losses.SkewedForwardKL():
            return skewed_forward_kl(p, q, alpha=term.alpha)
        case losses.SkewedReverseKL():
            return skewed_reverse_kl(p, q, alpha=term.alpha)
        case losses.TAID():
            return taid(p, q, share=share)


TAID_MOMENTUM, TAID_STEP = 0.99, 5e-4
"""The paper's: the share of its last value that stays in the mean of how fast the loss falls, and the most that t grows
in one step beyond its straight line."""


class TaidState:
    """t of one TAID term: how far its target has moved from the student to the teacher. Every rank holds the same.

    t never falls, keeps at least to a straight line from start to end, and runs ahead of it while the loss falls (Shing
    et al. 2025, arXiv:2501.16937, section 3).
    """

    def __init__(self, term: losses.TAID) -> None:
        self._term = term
        self.t = term.start
        self._momentum = 0.0
        self._previous: float | None = None

    def update(self, step_mean_loss: float | None, step: int, total: int) -> None:
        """After optimizer step number ``step`` of ``total``, with this term's mean over the tokens of all ranks that it
        learns from; None = there were none, and t keeps to its line."""
        term, t = self._term, self.t
        if self._previous is not None and step_mean_loss is not None:
            fall = (self._previous - step_mean_loss) / (self._previous + 1e-15)
            self._momentum = TAID_MOMENTUM * self._momentum + (1 - TAID_MOMENTUM) * fall
            t += TAID_STEP * (1 - t) * (1 + math.tanh(self._momentum / 2)) / 2  # the logistic, which overflows
        self._previous = self._previous if step_mean_loss is None else step_mean_loss
        # never behind the straight line, never beyond the end, never back
        line = term.start + (term.end - term.start) * step / total
        self.t = max(self.t, min(term.end, max(line, t)))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"t": self.t, "momentum": self._momentum, "previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.t, self._momentum, self._previous = state["t"], state["momentum"], state["previous"]


def _log_mixture(p: Softmax, q: Softmax, share: float) -> Tensor:
    """log(share p + (1 - share) q): a mixture of probabilities; mixing logarithms would be another distribution."""
    return torch.logaddexp(p.log_NV + math.log(share), q.log_NV + math.log1p(-share))


def _through_softmax(slope_NV: Tensor, q: Softmax) -> Tensor:
    return slope_NV - q.prob_NV * slope_NV.sum(-1, keepdim=True)
