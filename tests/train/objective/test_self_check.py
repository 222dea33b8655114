"""Before every run: the objective leaves a perfect student alone, and one that does not is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tiny import tiny_model
from torch import Tensor

from shoal.artifacts.artifact import Provenance, PruningPlan
from shoal.data.packing import PackedRows
from shoal.recipe.distill import Distill, Record
from shoal.recipe.losses import (
    DKD,
    JSD,
    TAID,
    AdaptiveKL,
    AttentionRelation,
    CrossEntropy,
    ForwardKL,
    HiddenStates,
    LossTerm,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    TotalVariation,
    ValueRelation,
)
from shoal.train.objective import divergences, layer_losses
from shoal.train.objective.divergences import Values
from shoal.train.objective.layer_losses import StateLosses
from shoal.train.objective.self_check import check_objective

FROM_TOP_K = (ForwardKL(), ReverseKL(temperature=2.0), JSD(), SkewedForwardKL(), SkewedReverseKL(), TotalVariation())
LOGITS: tuple[LossTerm, ...] = (*FROM_TOP_K, AdaptiveKL(), TAID(), DKD(), CrossEntropy())
STATES = (HiddenStates(), HiddenStates(distance="cosine", multi_scale=True), AttentionRelation(), ValueRelation())


def rows() -> PackedRows:
    ids = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return PackedRows(ids, torch.cat([torch.arange(30), torch.arange(70)]).int()[None])


def check(*terms: LossTerm, recorded: int | None = None, precision: Any = "float32", offload: bool = False) -> None:
    """``recorded`` = only so many of the teacher's words are at hand, and the model is the student."""
    model, student = tiny_model("llama"), tiny_model("llama", num_hidden_layers=4)
    plan = PruningPlan(Provenance({}), num_layers=6, drop=(2, 3), reason="")
    wanted = [term for term in terms if term in STATES]
    seen = StateLosses(wanted, plan, student, model) if wanted else None
    if offload:
        cpu_offload(model, execution_device=torch.device("cpu"))
    settings = Distill(losses=terms, precision=precision)
    record = Record(top_k=recorded or 32)
    check_objective(settings, model, rows(), seen, record, is_teacher=recorded is None)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_loss_leaves_a_perfect_student_alone(precision):
    check(*LOGITS, *STATES, precision=precision)


def test_recorded_signals_and_an_offloaded_teacher_do_too():
    check(*FROM_TOP_K, CrossEntropy(), recorded=5)
    check(*LOGITS, *STATES, offload=True)


def shifted(loss: Callable[..., Values]) -> Callable[..., Values]:
    """The same gradient, and half a nat too much."""

    def broken(*args: Any, **kwargs: Any) -> Values:
        found = loss(*args, **kwargs)
        return Values(found.values_N + 0.5, found.gradient_NV)

    return broken


def pulling(loss: Callable[..., Values]) -> Callable[..., Values]:
    """The same value, and a gradient towards the first word."""

    def broken(*args: Any, **kwargs: Any) -> Values:
        found = loss(*args, **kwargs)
        pull = torch.zeros_like(found.gradient_NV)
        pull[:, 0] = -1
        return Values(found.values_N, found.gradient_NV + pull)

    return broken


@pytest.mark.parametrize("recorded", [None, 5])
@pytest.mark.parametrize("breaking", [shifted, pulling])
def test_a_loss_with_a_wrong_value_or_gradient_is_named(monkeypatch, breaking, recorded):
    monkeypatch.setattr(divergences, "reverse_kl", breaking(divergences.reverse_kl))
    with pytest.raises(RuntimeError, match=r"reverse_kl of the teacher with itself is .* both must be 0"):
        check(ForwardKL(), ReverseKL(), recorded=recorded)


def test_a_state_loss_that_is_not_zero_is_named(monkeypatch):
    def biased(student_ND: Tensor, teacher_ND: Tensor, distance: str) -> Tensor:
        return (student_ND - teacher_ND - 1).square().sum(-1)

    monkeypatch.setattr(layer_losses, "distances", biased)
    with pytest.raises(RuntimeError, match=r"hidden_states: layer 1 compared with itself gives"):
        check(ForwardKL(), HiddenStates())


@pytest.mark.parametrize(("family", "meet"), [("mamba", True), ("gpt_oss", False)])
def test_documents_that_see_each_other_are_told(family, meet, caplog) -> None:
    from architectures import tiny_model as tiny_architecture

    ids = torch.randint(5, 90, (1, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = PackedRows(ids, torch.cat([torch.arange(10), torch.arange(30)]).int()[None])
    for rows, told in ((packed, meet), (PackedRows(ids, torch.arange(40).int()[None]), False)):
        caplog.clear()
        check_objective(Distill(), tiny_architecture(family), rows, None, Record(), is_teacher=True)
        assert (f"{family}: documents that share a row see each other" in caplog.text) == told
