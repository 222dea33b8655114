"""Losses on states: layer map, values and gradients from the definitions, capture on real models."""

from __future__ import annotations

import copy

import architectures
import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan, PlannedChange
from shoal.data.packing import IGNORED
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.recipe.losses import HiddenStates
from shoal.train.objective.layer_losses import Captured, StateLosses, capturing, layer_map, layer_pairs
from shoal.train.objective.objective import final_hidden

POSITIONS = torch.stack([torch.cat([torch.arange(7), torch.arange(5)]), torch.cat([torch.arange(3), torch.arange(9)])])
"""Two rows of two documents each."""
KINDS = tuple(
    HiddenStates(map=how, distance=distance) for how in ("gap_closing", "own") for distance in ("mse", "cosine")
)


def plan(drop: tuple[int, ...], *changes: PlannedChange, num_layers: int = 6) -> Plan:
    return Plan(Provenance({}), num_layers, drop, "", changes=changes)


def labels(positions: Tensor = POSITIONS) -> Tensor:
    """All tokens but the first of a document, and the second row's first five, which are a prompt."""
    found = torch.arange(positions.numel()).view_as(positions).masked_fill(positions == 0, IGNORED)
    found[-1, :5] = IGNORED
    return found


def counted_tokens(labels_BS: Tensor, positions_BS: Tensor) -> list[tuple[int, int]]:
    rows, length = labels_BS.shape
    return [
        (row, token)
        for row in range(rows)
        for token in range(length - 1)
        if labels_BS[row, token + 1] != IGNORED and positions_BS[row, token] != 0
    ]


def cut(teacher: PreTrainedModel, drop: tuple[int, ...]) -> PreTrainedModel:
    student = copy.deepcopy(teacher)
    kept = [layer for index, layer in enumerate(decoder_layers(student)) if index not in drop]
    student.get_submodule("model").layers = nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    return student


def changed(student: PreTrainedModel, first: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in decoder_layers(student)[first:]:
            for parameter in layer.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return student


def ids() -> Tensor:
    return torch.randint(0, 90, POSITIONS.shape, generator=torch.Generator().manual_seed(0))


def run(losses: StateLosses, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), losses.capturing_teacher() as theirs:
        final_hidden(teacher, ids(), POSITIONS)
    with losses.capturing_student() as ours:
        final_hidden(student, ids(), POSITIONS)
    return losses(ours, theirs, labels(), POSITIONS)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


MERGED = PlannedChange("merge", "", (1,), runs=((1, 3),))
SILENT = PlannedChange("skip", "", (3,))


@pytest.mark.parametrize(
    ("cut_plan", "own", "gap_closing"),
    [
        (plan(()), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
        (plan((2,)), (0, 1, 3, 4, 5), (0, 2, 3, 4, 5)),
        (plan((2, 3)), (0, 1, 4, 5), (0, 3, 4, 5)),
        (plan((1, 4)), (0, 2, 3, 5), (1, 2, 4, 5)),
        (plan((4, 5)), (0, 1, 2, 3), (0, 1, 2, 5)),
        (plan((0,)), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)),
        (plan((2, 3), MERGED), (0, 3, 4, 5), (0, 3, 4, 5)),
    ],
)
def test_layer_map_is_that_of_the_hand_written_table(cut_plan, own, gap_closing) -> None:
    assert layer_map(cut_plan, "own") == own
    assert layer_map(cut_plan, "gap_closing") == gap_closing


def test_layers_that_are_not_named_are_those_that_differ() -> None:
    dropped = plan((2, 3))
    assert layer_pairs(HiddenStates(), dropped) == ((1, 3), (2, 4), (3, 5))
    assert layer_pairs(HiddenStates(map="own"), dropped) == ((2, 4), (3, 5))
    assert layer_pairs(HiddenStates(), plan(())) == tuple(zip(range(6), range(6), strict=True))
    assert layer_pairs(HiddenStates(), plan((5,), SILENT)) == ((3, 3), (4, 5))
    assert layer_pairs(HiddenStates(layers=(3, 0)), dropped) == ((0, 0), (3, 5))
    with pytest.raises(UserError, match=r"hidden_states: layers: the student has 4 layers, 0 to 3 \(got 4\)"):
        layer_pairs(HiddenStates(layers=(1, 4)), dropped)


def test_pairs_below_the_shared_prefix_are_left_out_and_none_left_is_refused() -> None:
    dropped = plan((2, 3))
    assert layer_pairs(HiddenStates(), dropped, num_shared=2) == ((2, 4), (3, 5))
    assert layer_pairs(HiddenStates(layers=(0, 3)), dropped, num_shared=2) == ((3, 5),)
    with pytest.raises(UserError, match=r"all are below the first dropped layer.*\(got \[0, 1\]\); name layers 2, 3"):
        layer_pairs(HiddenStates(layers=(0, 1)), dropped, num_shared=2)


def reference_hidden(term: HiddenStates, ours: dict[int, Tensor], theirs: dict[int, Tensor], pairs) -> Tensor:
    """From the definition, token by token."""
    counted = counted_tokens(labels(), POSITIONS)
    total = torch.zeros((), dtype=torch.float64)
    for layer, target in pairs:
        for where in counted:
            s, t = ours[layer][where], theirs[target][where]
            total = total + (
                (s - t) @ (s - t) / (t @ t) if term.distance == "mse" else 1 - s @ t / (s.norm() * t.norm())
            )
    return total / len(pairs)


@pytest.mark.parametrize("term", KINDS, ids=str)
def test_hidden_state_losses_and_their_gradients_follow_from_the_definition(term: HiddenStates) -> None:
    teacher = tiny_model("llama")
    losses = StateLosses((term,), plan((2, 3)), cut(teacher, (2, 3)), teacher)
    torch.manual_seed(0)
    theirs = {layer: torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True) for layer in range(6)}
    ours = {layer: torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True) for layer in range(4)}
    pairs = {"gap_closing": ((1, 3), (2, 4), (3, 5)), "own": ((2, 4), (3, 5))}[term.map]
    loss, sums = losses(Captured(dict(ours)), Captured(dict(theirs)), labels(), POSITIONS)
    expected = reference_hidden(term, ours, theirs, pairs)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sums, expected.detach()[None], rtol=1e-12, atol=0)
    inputs = list(ours.values())
    found = torch.autograd.grad(loss, inputs + list(theirs.values()), allow_unused=True)
    assert found[4:] == (None,) * 6, "the teacher learns nothing"
    right = torch.autograd.grad(expected, inputs, allow_unused=True)
    for one, other in zip(found[:4], right, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


TERMS = (HiddenStates(), HiddenStates(map="own", distance="cosine"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    teacher, student = (architectures.tiny_model(family, seed=seed) for seed in (0, 1))
    losses = StateLosses(TERMS, plan(()), student, teacher)
    found = []
    for checkpointed in (False, True):
        student.train()
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for name in ("attention_dropout", "attn_pdrop"):
            if hasattr(student.config, name):
                setattr(student.config, name, 0.0)
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        student.zero_grad()
        calls: list[int] = []
        handle = (
            decoder_layers(student)[0]
            .get_submodule("attn" if family == "gpt2" else "self_attn")
            .register_forward_hook(lambda *_, calls=calls: calls.append(1))
        )
        loss, sums = run(losses, student, teacher)
        loss.backward()
        handle.remove()
        assert len(calls) == 1 + checkpointed, "a checkpointed layer runs again"
        found.append((sums, gradients(student)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-5, atol=1e-6)


def test_backward_inside_the_capture_records_nothing_twice() -> None:
    model = tiny_model("llama").train()
    with capturing(model, [3]) as seen:
        out = checkpoint(final_hidden, model, ids(), POSITIONS, use_reentrant=False)
        assert isinstance(out, Tensor)
        state = seen.states[3]
        out.sum().backward()
    assert seen.states[3] is state


def test_a_term_that_trains_nothing_is_refused() -> None:
    teacher = tiny_model("llama")
    student = changed(cut(teacher, (2, 3))).requires_grad_(False)
    with pytest.raises(UserError, match="hidden_states: no gradient reaches the student"):
        run(StateLosses(TERMS, plan((2, 3)), student, teacher), student, teacher)


def test_every_term_inside_the_layers_learns_from_its_own_tokens() -> None:
    """Labels of a term's own give what the term alone gives with these labels."""
    teacher, student = tiny_model("llama"), cut(tiny_model("llama", seed=3), (2, 3))
    terms = (HiddenStates(weight=0.5), HiddenStates(map="own"), HiddenStates(distance="cosine"))
    first, none = labels().clone(), torch.full_like(labels(), IGNORED)
    first[1] = IGNORED
    own = (labels(), first, none)
    losses = StateLosses(terms, plan((2, 3)), student, teacher)
    with torch.no_grad(), losses.capturing_teacher() as theirs:
        final_hidden(teacher, ids(), POSITIONS)
    with losses.capturing_student() as ours:
        final_hidden(student, ids(), POSITIONS)
    loss, sums = losses(ours, theirs, own, POSITIONS)
    assert sums[2] == 0
    assert (sums[:2] > 0).all()
    alone = [
        StateLosses((term,), plan((2, 3)), student, teacher)(ours, theirs, each, POSITIONS)[1][0]
        for term, each in zip(terms, own, strict=True)
    ]
    assert torch.equal(sums, torch.stack(alone))
    assert loss.item() == pytest.approx(sum(t.weight * s.item() for t, s in zip(terms, alone, strict=True)), rel=1e-6)
