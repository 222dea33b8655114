"""Losses against float64 references written from the definition, differentiated by autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from shoal.recipe.losses import (
    JSD,
    LOGIT_TERMS,
    TAID,
    CrossEntropy,
    ForwardKL,
    LogitTerm,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from shoal.train.objective import divergences
from shoal.train.objective.divergences import TaidState, softened, temperature_of, token_losses

N = 6
SHARE = 0.3
"""TAID's t in these tests."""
TERMS: list[LogitTerm] = [
    ForwardKL(),
    ReverseKL(),
    JSD(),
    JSD(beta=0.1),
    JSD(beta=0.9),
    SkewedForwardKL(),
    SkewedForwardKL(alpha=0.7),
    SkewedReverseKL(),
    SkewedReverseKL(alpha=0.7),
    TAID(),
    CrossEntropy(),
]
DIVERGENCES = [term for term in TERMS if not isinstance(term, CrossEntropy)]


def test_every_kind_of_the_head_is_tested() -> None:
    assert {type(term) for term in TERMS} == set(LOGIT_TERMS)


def name(term: object) -> str:
    return repr(term).split("'")[1] + repr(term).partition("weight=1.0")[2]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.log() - b.log())).sum()


def reference(term: LogitTerm, z_q: Tensor, z_p: Tensor, label: int) -> Tensor:
    """The value of one token from probabilities, term by term as the sources define it."""
    if isinstance(term, CrossEntropy):
        return -torch.softmax(z_q, 0)[label].log()
    q, p = torch.softmax(z_q / term.temperature, 0), torch.softmax(z_p / term.temperature, 0)
    match term:
        case ForwardKL():
            value = kl(p, q)
        case ReverseKL():
            value = kl(q, p)
        case JSD(beta=beta):
            m = beta * p + (1 - beta) * q
            value = beta * kl(p, m) + (1 - beta) * kl(q, m)
        case SkewedForwardKL(alpha=alpha):
            value = kl(p, alpha * p + (1 - alpha) * q)
        case SkewedReverseKL(alpha=alpha):
            value = kl(q, (1 - alpha) * p + alpha * q)
        case TAID():
            target = torch.softmax(((1 - SHARE) * z_q.detach() + SHARE * z_p) / term.temperature, 0)
            value = kl(target, q)
    return value * term.temperature**2


def logits(seed: int, words: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, words, generator=generator, dtype=torch.float64)


def labels(words: int) -> Tensor:
    return torch.arange(N) * 7 % words


def found(term: LogitTerm, student: Tensor, teacher: Tensor, share: float = SHARE) -> tuple[Tensor, Tensor]:
    """Values, and gradients with respect to the raw logits, with the temperature's factors."""
    temperature = temperature_of(term)
    p, q = softened(teacher, temperature), softened(student, temperature)
    values, gradient = token_losses(term, p, q, labels(student.shape[-1]), share=share)
    return values * temperature**2, gradient * temperature


def at(term: LogitTerm, temperature: float) -> LogitTerm:
    return term if isinstance(term, CrossEntropy) else type(term)(**{**vars(term), "temperature": temperature})


@pytest.mark.parametrize("term", TERMS, ids=name)
def test_loss_equals_its_definition_in_value_and_gradient(term: LogitTerm) -> None:
    for temperature, words, scale in itertools.product([0.5, 1.0, 2.0, 7.0], [2, 23, 301], [0.1, 2.0, 8.0]):
        tempered = at(term, temperature)
        student, teacher = logits(0, words, scale), logits(1, words, scale)
        leaf = student.clone().requires_grad_()
        values = [
            reference(tempered, z_q, z_p, int(y)) for z_q, z_p, y in zip(leaf, teacher, labels(words), strict=True)
        ]
        expected = torch.stack(values)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), leaf)
        rounding = 5e-6 * max(1.0, temperature**2)
        for dtype, rtol, atol in ((torch.float64, 1e-7, 1e-9), (torch.float32, 1e-4, rounding)):
            case = f"{temperature=} {words=} {scale=} {dtype=}"
            got, gradient = found(tempered, student.to(dtype), teacher.to(dtype))
            torch.testing.assert_close(got.double(), expected.detach(), rtol=rtol, atol=atol, msg=case)
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=atol, msg=case)


@pytest.mark.parametrize("term", DIVERGENCES, ids=name)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teacher_as_its_own_student_has_zero_loss_and_zero_gradient(term: LogitTerm, temperature: float) -> None:
    teacher = logits(2, 301, 4.0).float()
    values, gradient = found(at(term, temperature), teacher.clone(), teacher)
    assert values.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("term", TERMS, ids=name)
def test_loss_is_finite_where_one_excludes_what_the_other_is_sure_of(term: LogitTerm) -> None:
    teacher, student = torch.full((N, 23), -1e4), torch.zeros(N, 23)
    teacher[:, 3], student[:, 3] = 0.0, -1e4
    for pair in ((student, teacher), (teacher, student)):
        values, gradient = found(term, *pair)
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()


def test_half_precision_logits_are_taken_to_fp32_first() -> None:
    student, teacher = logits(5, 301, 3.0).bfloat16(), logits(6, 301, 3.0).bfloat16()
    for term in TERMS:
        for a, b in zip(found(term, student, teacher), found(term, student.double(), teacher.double()), strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


def test_bounded_divergences_keep_their_bounds() -> None:
    teacher, student = logits(9, 23, 60.0), logits(10, 23, 60.0)
    bounds = [(JSD(), math.log(2))]
    bounds += [(kind(alpha=a), -math.log(a)) for kind in (SkewedForwardKL, SkewedReverseKL) for a in (0.1, 0.5, 0.9)]
    for term, bound in bounds:
        values, _ = found(term, student, teacher)
        assert values.max() <= bound + 1e-9
        assert values.max() > 0.8 * bound, "the case must come near the bound, or it proves nothing"


def test_taid_moves_up_from_start_and_is_capped_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences, "TAID_STEP", 0.05)
    term = TAID(start=0.2, end=0.9)
    state, seen = TaidState(term), [0.2]
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 101):
        state.update(2.0 + torch.rand((), generator=generator).item() - 0.01 * step, step, 100)
        seen.append(state.t)
        assert state.t >= 0.2 + 0.7 * step / 100 - 1e-12, "never behind its straight line"
    assert all(later >= earlier for earlier, later in itertools.pairwise(seen))
    assert seen[50] > 0.2 + 0.7 * 0.5 + 0.05, "a falling loss lets it run ahead"
    assert seen[-1] == 0.9


def test_taid_update_follows_its_formula() -> None:
    state = TaidState(TAID(start=0.4, end=1.0))
    state.update(2.0, 1, 10_000)
    assert state.t == pytest.approx(0.4 + 0.6 / 10_000)
    state.update(1.0, 2, 10_000)
    momentum = 0.01 * (2.0 - 1.0) / 2.0
    t = 0.40006 + 5e-4 / (1 + math.exp(-momentum)) * (1 - 0.40006)
    assert state.t == pytest.approx(t, abs=1e-12)
    state.update(1.5, 3, 10_000)
    momentum = 0.99 * momentum + 0.01 * (1.0 - 1.5) / 1.0
    assert state.t == pytest.approx(t + 5e-4 / (1 + math.exp(-momentum)) * (1 - t), abs=1e-12)


def test_taid_goes_on_from_a_checkpoint() -> None:
    term = TAID()
    whole, first, second = TaidState(term), TaidState(term), TaidState(term)
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.0], 1):
        whole.update(loss, step, 50)
        (first if step <= 2 else second).update(loss, step, 50)
        if step == 2:
            second.load_state_dict(first.state_dict())
    assert second.t == whole.t
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(("first", "then"), [(1e-12, 1.0), (1.0, 1e-12), (-1e-9, 1.0)])
def test_taid_goes_on_where_the_first_loss_is_about_none(first, then):
    """A student that begins as its teacher: the relative fall of the loss has no bound."""
    state = TaidState(TAID())
    for step, loss in enumerate((first, then, then), 1):
        state.update(loss, step, 10)
    assert TAID().start <= state.t <= TAID().end
