"""The chunked head against the whole, for a live teacher and for stored top-k signals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shoal.recipe.losses import (
    JSD,
    TAID,
    CrossEntropy,
    ForwardKL,
    LogitTerm,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from shoal.train.objective import chunked_loss as head_module
from shoal.train.objective.chunked_loss import Dense, TermInput, TopK, chunked_head_loss
from shoal.train.objective.divergences import softened, token_losses

N, V, D = 19, 23, 5
LABELS = torch.arange(N) * 3 % V
TERMS = (ForwardKL(weight=0.7, temperature=2.0), CrossEntropy(weight=0.3), JSD(weight=2.0), TAID())
SHARES = (1.0, 1.0, 1.0, 0.6)
INPUTS = tuple(TermInput(share) for share in SHARES)
COARSE: list[LogitTerm] = [ForwardKL(), ReverseKL(), JSD(beta=0.3), SkewedForwardKL(), SkewedReverseKL()]


def kind(term: LogitTerm) -> str:
    return term.kind


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(hidden, weight, bias)


def capped(hidden: Tensor, weight: Tensor) -> Tensor:
    """A head with a logit scale and a soft-cap, both strong enough to matter."""
    return 2.0 * torch.tanh(0.8 * functional.linear(hidden, weight) / 2.0)


def setting(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (N, D), "teacher_hidden": (N, D), "weight": (V, D), "bias": (V,), "teacher_weight": (V, D)}
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def live(given: dict[str, Tensor], way: Callable[..., Tensor] = head) -> Dense:
    return Dense(given["teacher_hidden"], lambda hidden: way(hidden, given["teacher_weight"]))


def stored(given: dict[str, Tensor], k: int, temperature: float = 1.0) -> TopK:
    logits = head(given["teacher_hidden"], given["teacher_weight"])
    log_probs = torch.log_softmax(logits / temperature, -1)
    found = log_probs.topk(k, dim=-1)
    # summed and not taken from 1, a difference of nearly equal numbers
    tail = log_probs.double().exp().scatter(-1, found.indices, 0.0).sum(-1)
    return TopK(found.indices, found.values, temperature, tail)


def chunked(
    given: dict[str, Tensor], targets: Dense | TopK | None, terms: Any = TERMS, **settings: Any
) -> tuple[Tensor, Tensor]:
    settings = {"student_head": head, "student_parameters": (given["weight"],), "chunk": 4} | settings
    return chunked_head_loss(given["hidden"], settings.pop("labels", LABELS), targets, terms=terms, **settings)


def whole(terms: Any, student: Tensor, teacher: Tensor, shares: Any) -> tuple[Tensor, Tensor]:
    """All tokens at once: each term's sum, and a number whose gradient by autograd is that of the weighted sum."""
    sums, surrogate = [], student.new_zeros(())
    for term, share in zip(terms, shares, strict=True):
        temperature = getattr(term, "temperature", 1.0)
        p, q = softened(teacher, temperature), softened(student.detach(), temperature)
        values, gradient = token_losses(term, p, q, LABELS, share=share)
        sums.append(values.sum() * temperature**2)
        surrogate = surrogate + term.weight * temperature * (gradient * student).sum()
    return torch.stack(sums), surrogate


def leaves(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return given | {name: given[name].clone().requires_grad_() for name in names}


@pytest.mark.parametrize("chunk", [1, 2, 3, N, 100])
@pytest.mark.parametrize("block", [1, 3 * V, 2**17])
def test_chunked_loss_equals_the_whole_in_value_and_every_gradient(
    chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "BLOCK", block)
    given = leaves(setting(dtype=torch.float64), "hidden", "weight", "bias")
    loss, sums = chunked(
        given, live(given), student_parameters=(given["weight"], given["bias"]), chunk=chunk, inputs=INPUTS
    )
    (3.0 * loss).backward()  # a factor, because the trainer divides by the step's token count
    plain = leaves(setting(dtype=torch.float64), "hidden", "weight", "bias")
    logits = head(plain["hidden"], plain["weight"], plain["bias"])
    teacher_logits = head(plain["teacher_hidden"], plain["teacher_weight"])
    expected, surrogate = whole(TERMS, logits, teacher_logits, SHARES)
    (3.0 * surrogate).backward()
    torch.testing.assert_close(sums, expected)
    weighted = sum(term.weight * value for term, value in zip(TERMS, expected.tolist(), strict=True))
    assert loss.item() == pytest.approx(weighted, rel=1e-6)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(given[name].grad, plain[name].grad, msg=name)


@pytest.mark.parametrize("terms", [(ForwardKL(),), (ReverseKL(temperature=2.0),), (JSD(), CrossEntropy(weight=0.1))])
@pytest.mark.parametrize("k", [None, 6])
def test_gradient_through_scale_and_soft_cap_is_that_of_the_loss_itself(terms: Any, k: int | None) -> None:
    """Finite differences in float64, so that nothing of the implementation is trusted."""
    given = leaves(setting(3, torch.float64), "hidden", "weight")
    targets = live(given, capped) if k is None else stored(given, k, getattr(terms[0], "temperature", 1.0))

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        changed = given | {"hidden": hidden, "weight": weight}
        sums = chunked(changed, targets, terms, student_head=capped, student_parameters=(weight,))[1]
        return sum((term.weight * one for term, one in zip(terms, sums, strict=True)), sums.new_zeros(()))

    chunked(given, targets, terms, student_head=capped)[0].backward()
    generator = torch.Generator().manual_seed(1)
    for name in ("hidden", "weight"):
        step = 1e-6 * torch.randn(given[name].shape, generator=generator, dtype=torch.float64)
        inputs = {one: given[one].detach() for one in ("hidden", "weight")}
        up, down = (value(**inputs | {name: inputs[name] + sign * step}) for sign in (1, -1))
        grad = given[name].grad
        assert grad is not None
        assert ((up - down) / 2).item() == pytest.approx((grad * step).sum().item(), rel=1e-5)


def test_frozen_head_and_frozen_hidden_states_are_left_alone() -> None:
    for trained in ("hidden", "weight"):
        given = leaves(setting(), trained)
        chunked(given, live(given))[0].backward()
        both = leaves(setting(), "hidden", "weight")
        chunked(both, live(both))[0].backward()
        torch.testing.assert_close(given[trained].grad, both[trained].grad)
        assert given["weight" if trained == "hidden" else "hidden"].grad is None


def test_an_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    given = leaves(setting(), "hidden", "weight")
    with torch.no_grad():
        monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient that nobody asks for"))
        value, _ = chunked(given, live(given))
    monkeypatch.undo()
    assert value == chunked(given, live(given))[0]


def test_logits_of_all_tokens_are_never_held() -> None:
    seen = []

    def watching(hidden: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(hidden))
        return head(hidden, weight)

    given = leaves(setting(), "hidden")
    chunked(given, live(given, watching), student_head=watching, chunk=5)
    assert sorted(seen) == [4, 4, 5, 5, 5, 5, 5, 5]


@pytest.mark.parametrize(("vocabularies", "most"), [(3.5, 3), (0.5, 1)])
def test_a_large_vocabulary_has_fewer_tokens_in_a_chunk(
    vocabularies: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watching(hidden: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(hidden))
        return head(hidden, weight)

    given = setting()
    _, expected = chunked(given, live(given))
    monkeypatch.setattr(head_module, "LOGITS", int(vocabularies * V))
    _, found = chunked(given, live(given), student_head=watching, chunk=5)
    assert max(seen) == most
    torch.testing.assert_close(found, expected)


def test_bf16_weights_get_gradients_added_up_in_fp32() -> None:
    """One large gradient and many small ones after it, each of which bf16 would round away."""
    hidden = torch.full((N, 1), 0.5, dtype=torch.bfloat16)
    hidden[0] = 256.0
    weight = torch.zeros(V, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = chunked({"hidden": hidden, "weight": weight}, None, (CrossEntropy(),), chunk=1, labels=0 * LABELS)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad[0].item() == pytest.approx((1 / V - 1) * (256.0 + 0.5 * (N - 1)), rel=0.005)


@pytest.mark.parametrize("term", COARSE, ids=kind)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_form_equals_the_divergence_of_the_coarsened_distributions(term: LogitTerm, temperature: float) -> None:
    """The reference sums probabilities into K words and one more, and differentiates that by autograd."""
    term = type(term)(**{**vars(term), "temperature": temperature, "weight": 0.7})
    for k, scale in itertools.product([1, 6, V - 1], [0.3, 1.0, 4.0]):
        given = setting(5, torch.float64)
        given["teacher_hidden"] *= scale
        given["hidden"] *= scale
        given = leaves(given, "hidden")
        targets = stored(given, k, temperature)
        loss, sums = chunked(given, targets, (term,))
        loss.backward()
        plain = leaves(given, "hidden")
        logits = head(plain["hidden"], plain["weight"]) / temperature
        rest = torch.ones(N, V, dtype=torch.float64).scatter(-1, targets.ids_NK, 0.0)
        p, q = (
            coarse(torch.softmax(x, -1), targets.ids_NK, rest) for x in (teacher_logits(given, temperature), logits)
        )
        p[:, -1].clamp_(min=head_module.SMALLEST_TAIL)
        expected = definition(term, p, q) * temperature**2
        (gradient,) = torch.autograd.grad(0.7 * expected, plain["hidden"])
        torch.testing.assert_close(sums[0], expected.detach(), rtol=1e-6, atol=1e-8, msg=f"{k=} {scale=}")
        torch.testing.assert_close(given["hidden"].grad, gradient, rtol=1e-6, atol=1e-8, msg=f"{k=} {scale=}")


def test_a_tail_below_float32_is_not_taken_for_more_than_it_can_be() -> None:
    """Reverse KL against a teacher that is sure by more nats than float32 has for a probability."""
    targets = TopK(torch.tensor([[0, 1]]), torch.tensor([[-1e-3, -7.0]]), 1.0, torch.tensor([0.0]))
    weight = torch.eye(3)
    hidden = torch.tensor([[0.0, 0.0, 0.0]])  # the student spreads evenly over two stored words and the tail
    _, sums = chunked({"hidden": hidden, "weight": weight}, targets, (ReverseKL(),), labels=torch.tensor([0]))
    third = 1 / 3
    expected = sum(third * (math.log(third) - said) for said in (-1e-3, -7.0, -149 * math.log(2)))
    assert float(sums[0]) == pytest.approx(expected, rel=1e-6)


def teacher_logits(given: dict[str, Tensor], temperature: float) -> Tensor:
    return head(given["teacher_hidden"], given["teacher_weight"]) / temperature


def coarse(probs: Tensor, ids: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([probs.gather(-1, ids), (probs * rest).sum(-1, keepdim=True)], -1)


def definition(term: LogitTerm, p: Tensor, q: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    match term:
        case ForwardKL():
            return kl(p, q)
        case ReverseKL():
            return kl(q, p)
        case JSD(beta=beta):
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case SkewedForwardKL(alpha=alpha):
            return kl(p, alpha * p + (1 - alpha) * q)
        case SkewedReverseKL(alpha=alpha):
            return kl(q, (1 - alpha) * p + alpha * q)
        case _:
            return 0.5 * (p - q).abs().sum()


def test_as_many_stored_tokens_as_words_are_refused() -> None:
    given = setting()
    with pytest.raises(ValueError, match="23 stored tokens of a vocabulary of 23"):
        chunked(given, stored(given, V), (ForwardKL(),))


MASKS = (torch.arange(N) % 3 > 0, torch.arange(N) < 8, torch.zeros(N, dtype=torch.bool), torch.arange(N) % 2 == 0)


@pytest.mark.parametrize("chunk", [4, N])
@pytest.mark.parametrize("k", [None, 6])
def test_each_term_learns_from_its_own_tokens(k: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked tokens, summed one by one: the loss of every token alone, with the terms that learn from it."""
    monkeypatch.setattr(head_module, "BLOCK", 3 * V)
    terms = TERMS if k is None else (JSD(weight=0.7), CrossEntropy(weight=0.3), ForwardKL(), ReverseKL())
    shares = SHARES if k is None else (1.0,) * 4
    given, single = (leaves(setting(dtype=torch.float64), "hidden", "weight") for _ in range(2))
    targets = live(given) if k is None else stored(given, k)
    inputs = [TermInput(share, mask) for share, mask in zip(shares, MASKS, strict=True)]
    loss, sums = chunked(given, targets, terms, chunk=chunk, inputs=inputs)
    loss.backward()
    expected = torch.zeros(4, dtype=torch.float64)
    for token in range(N):
        learning = [index for index in range(4) if MASKS[index][token]]
        at = slice(token, token + 1)
        if isinstance(targets, TopK):
            target = TopK(targets.ids_NK[at], targets.log_probs_NK[at], targets.temperature, targets.tail_N[at])
        else:
            target = replace(targets, hidden_ND=targets.hidden_ND[at])
        inputs = [TermInput(shares[index]) for index in learning]
        of_token = single | {"hidden": single["hidden"][at]}
        loss, own = chunked(of_token, target, [terms[index] for index in learning], inputs=inputs, labels=LABELS[at])
        loss.backward()
        expected[learning] += own
    torch.testing.assert_close(sums, expected)
    assert sums[2] == 0
    for name in ("hidden", "weight"):
        torch.testing.assert_close(given[name].grad, single[name].grad, msg=name)
