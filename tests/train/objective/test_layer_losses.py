"""Losses on states and relations: layer map, values and gradients from the definitions, capture on real models.

Covers: shoal.train.objective.capture.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import architectures
import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import ClosedGap, PruningPlan
from shoal.data.packing import IGNORED
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, state_of, with_state
from shoal.models.attention_calls import AttentionInputs
from shoal.recipe.edits import Edits, Insert, Merge, Replace, SkipMlp
from shoal.recipe.losses import AttentionRelation, HiddenStates, StateTerm, ValueRelation
from shoal.train.objective import layer_losses
from shoal.train.objective.capture import Captured, capturing
from shoal.train.objective.layer_losses import StateLosses, layer_map, layer_pairs
from shoal.train.objective.objective import SharedPrefix, final_hidden

POSITIONS = torch.stack([torch.cat([torch.arange(7), torch.arange(5)]), torch.cat([torch.arange(3), torch.arange(9)])])
"""Two rows of two documents each."""
RELATIONS = (AttentionRelation(), ValueRelation())
KINDS: tuple[StateTerm, ...] = (
    *(
        HiddenStates(map=how, distance=distance, multi_scale=scales)
        for how in ("gap_closing", "own")
        for distance in ("mse", "cosine")
        for scales in (False, True)
    ),
    *RELATIONS,
)


def plan(drop: tuple[int, ...], edits: Edits = (), num_layers: int = 6) -> PruningPlan:
    return PruningPlan(Provenance({}), num_layers=num_layers, drop=drop, reason="", edits=edits)


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


def documents(positions_S: Tensor) -> list[int]:
    found, number = [], -1
    for position in positions_S.tolist():
        number += position == 0
        found.append(number)
    return found


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


MERGED = Merge("merge", (1, 2, 3))
REPLACED = Replace("replace", (3, 4))
INSERTED = Insert("insert", (1, 3))


@pytest.mark.parametrize(
    ("cut_plan", "own", "gap_closing"),
    [
        (plan(()), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
        (plan((2,)), (0, 1, 3, 4, 5), (0, 2, 3, 4, 5)),
        (plan((2, 3)), (0, 1, 4, 5), (0, 3, 4, 5)),
        (plan((1, 4)), (0, 2, 3, 5), (1, 2, 4, 5)),
        (plan((4, 5)), (0, 1, 2, 3), (0, 1, 2, 5)),
        (plan((0,)), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)),
        (plan((2, 3), (MERGED,)), (0, 3, 4, 5), (0, 3, 4, 5)),
        (plan((4, 5), (REPLACED,)), (0, 1, 2, 4), (0, 1, 2, 5)),
        (plan((), (INSERTED,)), (0, 1, 1, 2, 3, 3, 4, 5), (0, 1, 1, 2, 3, 3, 4, 5)),
        (plan((2, 4), (INSERTED,)), (0, 1, 1, 3, 3, 5), (0, 1, 2, 3, 4, 5)),
        (plan((2,), (SkipMlp("skip_mlp", (4,)),)), (0, 1, 3, 4, 5), (0, 2, 3, 4, 5)),
    ],
)
def test_layer_map_is_that_of_the_hand_written_table(cut_plan, own, gap_closing) -> None:
    assert layer_map(cut_plan, "own") == own
    assert layer_map(cut_plan, "gap_closing") == gap_closing


def test_layers_that_are_not_named_are_those_that_differ_and_for_relations_the_last() -> None:
    dropped = plan((2, 3))
    assert layer_pairs(HiddenStates(), dropped) == ((1, 3), (2, 4), (3, 5))
    assert layer_pairs(HiddenStates(map="own"), dropped) == ((2, 4), (3, 5))
    assert layer_pairs(HiddenStates(), plan(())) == tuple(zip(range(6), range(6), strict=True))
    assert layer_pairs(HiddenStates(), plan((5,), (SkipMlp("skip_mlp", (3,)),))) == ((3, 3), (4, 5))
    assert layer_pairs(HiddenStates(layers=(3, 0)), dropped) == ((0, 0), (3, 5))
    assert layer_pairs(AttentionRelation(), dropped) == ((3, 5),)
    assert layer_pairs(ValueRelation(layers=(1, 2)), dropped) == ((1, 1), (2, 4))


def test_new_layers_stand_for_none_of_the_teachers_unless_they_are_named() -> None:
    grown, last = plan((), (INSERTED,)), plan((), (Insert("insert", (5,)),))
    assert layer_pairs(HiddenStates(), grown) == ((3, 2), (4, 3), (6, 4), (7, 5))
    assert layer_pairs(HiddenStates(layers=(2, 3)), grown) == ((2, 1), (3, 2))
    assert layer_pairs(AttentionRelation(), grown) == ((7, 5),)
    assert layer_pairs(AttentionRelation(), last) == ((5, 5),)


def test_pairs_below_the_shared_prefix_are_left_out_and_none_left_is_refused() -> None:
    dropped = plan((2, 3))
    assert layer_pairs(HiddenStates(), dropped, num_shared=2) == ((2, 4), (3, 5))
    assert layer_pairs(HiddenStates(layers=(0, 3)), dropped, num_shared=2) == ((3, 5),)
    with pytest.raises(UserError, match=r"all below the first cut.*\(got \[0, 1\]\); name layers from 2 to 3"):
        layer_pairs(HiddenStates(layers=(0, 1)), dropped, num_shared=2)


def test_what_must_be_captured_is_the_union_over_terms() -> None:
    teacher = tiny_model("llama")
    terms = (HiddenStates(layers=(1,)), HiddenStates(map="own", layers=(1, 3)), ValueRelation(layers=(2,)))
    losses = StateLosses(terms, plan((2, 3)), cut(teacher, (2, 3)), teacher)
    assert (losses.student_layers, losses.teacher_layers) == ((1, 3), (1, 3, 5))
    assert (losses.student_attention, losses.teacher_attention) == ((2,), (4,))


def reference_hidden(term: HiddenStates, ours: dict[int, Tensor], theirs: dict[int, Tensor], pairs) -> Tensor:
    """From the definition, token by token."""
    counted = counted_tokens(labels(), POSITIONS)
    total = torch.zeros((), dtype=torch.float64)
    for layer, target in pairs:
        windows: dict[Any, list[tuple[int, int]]] = {}
        for row, token in counted:
            late = term.multi_scale and layer in (2, 3)
            window = (row, documents(POSITIONS[row])[token], int(POSITIONS[row, token]) // 4) if late else (row, token)
            windows.setdefault(window, []).append((row, token))
        for members in windows.values():
            s = sum(ours[layer][where] for where in members) / len(members)
            t = sum(theirs[target][where] for where in members) / len(members)
            assert isinstance(s, Tensor)
            assert isinstance(t, Tensor)
            distance = (s - t) @ (s - t) / (t @ t) if term.distance == "mse" else 1 - s @ t / (s.norm() * t.norm())
            total = total + distance * len(members)
    return total / len(pairs)


@pytest.mark.parametrize("term", [kind for kind in KINDS if isinstance(kind, HiddenStates)], ids=str)
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


def random_attention(seed: int, *, softcap: float | None, window: int | None) -> AttentionInputs:
    torch.manual_seed(seed)
    shapes = ((2, 6, 12, 5), (2, 3, 12, 5), (2, 3, 12, 4))
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    seen = None if window is None else torch.tensor([[seen_keys(r, t, window) for t in range(12)] for r in range(2)])
    mask = None if seen is None else seen.unsqueeze(1)
    return AttentionInputs(query, key, value, scale=0.7 + 0.1 * seed, softcap=softcap, seen_B1SS=mask)


def seen_keys(row: int, token: int, window: int) -> list[bool]:
    document = documents(POSITIONS[row])
    return [k <= token < k + window and document[k] == document[token] for k in range(12)]


def reference_relation(term: StateTerm, ours: AttentionInputs, theirs: AttentionInputs) -> Tensor:
    """From the definition, query by query and head by head."""
    total = torch.zeros((), dtype=torch.float64)
    heads = 6 if isinstance(term, AttentionRelation) else 3
    for row, token in counted_tokens(labels(), POSITIONS):
        document = documents(POSITIONS[row])
        keys = [k for k in range(token + 1) if document[k] == document[token]]
        keys = [k for k in keys if theirs.seen_B1SS is None or theirs.seen_B1SS[row, 0, token, k]]
        for head in range(heads):
            p, q = (probabilities(term, one, row, head, token, keys) for one in (theirs, ours))
            total = total + (p * (p.log() - q.log())).sum() / heads
    return total


def probabilities(term: StateTerm, one: AttentionInputs, row: int, head: int, token: int, keys: list[int]) -> Tensor:
    if isinstance(term, AttentionRelation):
        scores = one.key_BGSd[row, head // 2, keys] @ one.query_BHSd[row, head, token] * one.scale
        return (scores if one.softcap is None else one.softcap * (scores / one.softcap).tanh()).softmax(0)
    values = one.value_BGSd[row, head]
    return (values[keys] @ values[token] / math.sqrt(4)).softmax(0)


@pytest.mark.parametrize("term", RELATIONS, ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (0.8, None), (None, 3)])
@pytest.mark.parametrize("scores", [1, 6 * 12 * 5, 1 << 24])
def test_relations_and_their_gradients_follow_from_the_definition(term, softcap, window, scores, monkeypatch) -> None:
    monkeypatch.setattr(layer_losses, "SCORES", scores)
    teacher = tiny_model("llama")
    losses = StateLosses((term,), plan((2, 3)), cut(teacher, (2, 3)), teacher)
    ours, theirs = (random_attention(seed, softcap=softcap, window=window) for seed in (1, 2))
    loss, sums = losses(Captured(attention={3: ours}), Captured(attention={5: theirs}), labels(), POSITIONS)
    expected = reference_relation(term, ours, theirs)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sums, expected.detach()[None], rtol=1e-12, atol=0)
    inputs = (ours.query_BHSd, ours.key_BGSd) if isinstance(term, AttentionRelation) else (ours.value_BGSd,)
    theirs_too = (*inputs, theirs.query_BHSd, theirs.key_BGSd, theirs.value_BGSd)
    *found, query, key, value = torch.autograd.grad(loss, theirs_too, allow_unused=True)
    assert query is key is value is None, "the teacher learns nothing"
    for one, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("term", KINDS, ids=str)
def test_every_term_has_its_weight_and_weight_0_trains_nothing(term: StateTerm) -> None:
    teacher = tiny_model("llama")
    student = changed(cut(teacher, (2, 3)))
    terms = tuple(dataclasses.replace(term, weight=weight) for weight in (1.0, 2.5, 0.0))
    loss, sums = run(StateLosses(terms, plan((2, 3)), student, teacher), student, teacher)
    assert sums[0] == sums[1] == sums[2] > 0
    torch.testing.assert_close(loss.double(), 3.5 * sums[0], rtol=1e-6, atol=0)
    loss, _ = run(StateLosses(terms[2:], plan((2, 3)), student, teacher), student, teacher)
    assert not loss.requires_grad


@pytest.mark.parametrize("how", ["own", "gap_closing"])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_a_factor_that_is_folded_into_weights_changes_no_loss_on_states(how: Any, distance: Any) -> None:
    """The student whose upper layers write less, told the factor, against one that multiplies its state at the gap."""
    teacher, factor = tiny_model("llama"), 1.25
    folded, hooked = (changed(cut(teacher, (2, 3))) for _ in range(2))
    with torch.no_grad():
        for layer in decoder_layers(folded)[2:]:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                for parameter in layer.get_submodule(name).parameters():
                    parameter.div_(factor)
    decoder_layers(hooked)[1].register_forward_hook(lambda _, __, output: with_state(output, state_of(output) * factor))
    gap = ClosedGap(2, 3, factor, False, 0.0, 0.0, 0.0, 0.0)
    term = HiddenStates(map=how, distance=distance, layers=(2, 3) if how == "own" else (1, 2, 3))
    told = dataclasses.replace(plan((2, 3)), gaps=(gap,))
    _, ours = run(StateLosses((term,), told, folded, teacher), folded, teacher)
    _, expected = run(StateLosses((term,), plan((2, 3)), hooked, teacher), hooked, teacher)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    if distance == "mse":
        _, untold = run(StateLosses((term,), plan((2, 3)), folded, teacher), folded, teacher)
        assert abs(untold - expected) > 0.01 * expected


@pytest.mark.parametrize("term", [kind for kind in KINDS if getattr(kind, "map", "own") == "own"], ids=str)
def test_teacher_as_its_own_student_has_no_loss_and_no_gradient(term: StateTerm) -> None:
    teacher = tiny_model("llama")
    student = copy.deepcopy(teacher)
    loss, sums = run(StateLosses((term,), plan(()), student, teacher), student, teacher)
    loss.backward()
    assert abs(sums.item()) < 1e-6
    assert gradients(student)
    assert max(gradient.abs().max().item() for gradient in gradients(student).values()) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "gpt_neox", "deepseek_v3", "bloom"])
def test_captured_states_are_the_raw_ones(family: str) -> None:
    model = architectures.tiny_model(family)
    num_layers = len(decoder_layers(model))
    with torch.no_grad(), capturing(model, range(num_layers)) as seen:
        shown = model(input_ids=ids(), position_ids=POSITIONS, use_cache=False, output_hidden_states=True)
    assert sorted(seen.states) == list(range(num_layers))
    for layer in range(num_layers - 1):
        assert torch.equal(seen.states[layer], shown.hidden_states[layer + 1])
    assert not torch.equal(seen.states[num_layers - 1], shown.hidden_states[-1])  # which is behind the final norm


NARROW = {
    "gemma3_text": {"sliding_window": 3},
    "llama4_text": {"attention_chunk_size": 4},
    "phimoe": {"sliding_window": 3},
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "mixtral", "qwen3", "deepseek_v3", *NARROW])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_relation_is_that_of_the_models_own_attention(family: str, implementation: str) -> None:
    """Fused and latent projections, norms of heads, rotary embedding, soft caps, masks: all are in the inputs."""
    narrow: dict[str, Any] = NARROW.get(family, {})
    teacher, student = (architectures.tiny_model(family, seed=seed, **narrow) for seed in (0, 1))
    num_layers = len(decoder_layers(teacher))
    layers = tuple(range(num_layers))
    if implementation == "sdpa" and family == "gemma2":
        pytest.skip("gemma2's soft cap needs eager attention")
    own = []
    for model in (teacher, student):
        model.set_attn_implementation("eager")
        own.append(model(input_ids=ids(), position_ids=POSITIONS, use_cache=False, output_attentions=True).attentions)
        model.set_attn_implementation(implementation)
    term = AttentionRelation(layers=layers)
    loss, _ = run(StateLosses((term,), plan((), num_layers=num_layers), student, teacher), student, teacher)
    expected = 0.0
    for theirs, ours in zip(*own, strict=True):
        for row, token in counted_tokens(labels(), POSITIONS):
            p, q = theirs[row, :, token].double(), ours[row, :, token].double()
            seen = p > 0
            expected += (p[seen] * (p[seen] / q[seen]).log()).sum().item() / p.shape[0] / num_layers
    assert loss.item() == pytest.approx(expected, rel=1e-4)


TERMS = (HiddenStates(), HiddenStates(map="own", distance="cosine", multi_scale=True), *RELATIONS)


def captured_pair() -> tuple[StateLosses, Captured, Captured]:
    teacher = tiny_model("llama")
    student = changed(cut(teacher, (2, 3)))
    losses = StateLosses(TERMS, plan((2, 3)), student, teacher)
    torch.manual_seed(0)
    sides = []
    for layers in (4, 6):
        state = {layer: torch.randn(2, 12, 6, dtype=torch.float64) for layer in range(layers)}
        sides.append(Captured(state, {layers - 1: random_attention(layers, softcap=None, window=None)}))
    return losses, sides[0], sides[1]


def parts(one: Captured, other: Captured, rows: slice | list[int], tokens: slice | list[int]) -> list[Captured]:
    return [part(side, rows, tokens) for side in (one, other)]


def part(captured: Captured, rows: slice | list[int], tokens: slice | list[int]) -> Captured:
    def of(values: Tensor) -> Tensor:
        return values[rows][..., tokens, :]

    found = {
        layer: AttentionInputs(of(one.query_BHSd), of(one.key_BGSd), of(one.value_BGSd), one.scale)
        for layer, one in captured.attention.items()
    }
    return Captured({layer: of(state) for layer, state in captured.states.items()}, found)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 5])
def test_micro_batches_add_up(start: int) -> None:
    """Also where a row begins inside a document, so that its first window would fit the last one of the row before."""
    losses, ours, theirs = captured_pair()
    rows_of_positions = ([torch.arange(5), torch.arange(7)], [torch.arange(start, start + 3), torch.arange(9)])
    positions = torch.stack([torch.cat(row) for row in rows_of_positions])
    supervised = torch.arange(24).view(2, 12)
    _, whole = losses(ours, theirs, supervised, positions)
    halves = []
    for rows in (slice(0, 1), slice(1, 2)):
        student, teacher = parts(ours, theirs, rows, slice(None))
        halves.append(losses(student, teacher, supervised[rows], positions[rows])[1])
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-12, atol=0)


@torch.no_grad()
def test_documents_in_another_order_or_alone_give_the_same_loss() -> None:
    """No window and no relation crosses their border, and nothing depends on where in a row a document is."""
    losses, ours, theirs = captured_pair()

    def sums(tokens: slice | list[int]) -> Tensor:
        student, teacher = parts(ours, theirs, [0], tokens)
        return losses(student, teacher, labels()[:1, tokens], POSITIONS[:1, tokens])[1]

    packed = sums(slice(None))
    torch.testing.assert_close(sums([*range(7, 12), *range(7)]), packed, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums(slice(0, 7)) + sums(slice(7, 12)), packed, rtol=1e-12, atol=0)


def test_what_is_not_counted_does_not_matter_and_all_of_it_is_nothing() -> None:
    losses, ours, theirs = captured_pair()
    counted = torch.zeros(2, 12, dtype=torch.bool)
    for where in counted_tokens(labels(), POSITIONS):
        counted[where] = True
    with torch.no_grad():
        _, before = losses(ours, theirs, labels(), POSITIONS)
        for state in (*ours.states.values(), *theirs.states.values()):
            state[~counted] = 1e6
        _, after = losses(ours, theirs, labels(), POSITIONS)
    assert torch.equal(before, after)
    for state in ours.states.values():
        state.requires_grad_()
    loss, sums = losses(ours, theirs, torch.full_like(labels(), IGNORED), POSITIONS)
    loss.backward()
    assert not sums.any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
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
    with capturing(model, [3], [3]) as seen:
        out = checkpoint(final_hidden, model, ids(), POSITIONS, use_reentrant=False)
        assert isinstance(out, Tensor)
        state, attention = seen.states[3], seen.attention[3]
        out.sum().backward()
    assert seen.states[3] is state
    assert seen.attention[3] is attention


def test_shared_prefix_gives_the_loss_and_gradients_of_the_unshared_run() -> None:
    teacher, drop = tiny_model("llama"), (3,)
    found = []
    for shared in (False, True):
        student = changed(cut(teacher, drop), first=3)
        for layer in decoder_layers(student)[:3]:
            layer.requires_grad_(False)
        student.get_input_embeddings().requires_grad_(False)
        losses = StateLosses(TERMS, plan(drop), student, teacher, num_shared=3)
        prefix = SharedPrefix(student, teacher, first_change=3)
        with torch.no_grad(), prefix.recording(), losses.capturing_teacher() as theirs:
            final_hidden(teacher, ids(), POSITIONS)
        if shared:
            with prefix.replaying(torch.float32), losses.capturing_student() as ours:
                final_hidden(student, ids(), POSITIONS)
        else:
            with losses.capturing_student() as ours:
                final_hidden(student, ids(), POSITIONS)
        loss, sums = losses(ours, theirs, labels(), POSITIONS)
        loss.backward()
        found.append((sums, gradients(student)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() != set()
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_arithmetic_is_float32_under_autocast_and_from_bfloat16() -> None:
    losses, ours, theirs = captured_pair()

    def of(captured: Captured, *dtypes: torch.dtype) -> Captured:
        def to(values: Tensor) -> Tensor:
            for dtype in dtypes:
                values = values.detach().to(dtype)
            return values

        found = {
            layer: AttentionInputs(to(one.query_BHSd), to(one.key_BGSd), to(one.value_BGSd), one.scale)
            for layer, one in captured.attention.items()
        }
        return Captured({layer: to(state) for layer, state in captured.states.items()}, found)

    exact, target = (of(side, torch.bfloat16, torch.float32) for side in (ours, theirs))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, rounded = losses(of(ours, torch.bfloat16), of(theirs, torch.bfloat16), labels(), POSITIONS)
    with torch.no_grad():
        assert torch.equal(rounded, losses(exact, target, labels(), POSITIONS)[1])
    with torch.autocast("cpu", torch.bfloat16):
        teacher, student = tiny_model("llama"), changed(tiny_model("llama"))
        loss, _ = run(StateLosses(TERMS, plan(()), student, teacher), student, teacher)
    assert loss.dtype == torch.float32


def test_nothing_but_states_is_kept_for_backward(monkeypatch) -> None:
    monkeypatch.setattr(layer_losses, "SCORES", 1)
    losses, ours, theirs = captured_pair()
    for state in ours.states.values():
        state.requires_grad_()
    attention = [tensor for side in (ours, theirs) for one in side.attention.values() for tensor in vars(one).values()]
    inputs = [*ours.states.values(), *theirs.states.values(), *(one for one in attention if isinstance(one, Tensor))]
    places = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    fresh: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in places:
            fresh.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses(ours, theirs, labels(), POSITIONS)
    assert max(fresh) <= 12, "more than one number per token of a row"


def test_recorded_states_are_as_good_as_a_teacher() -> None:
    teacher = tiny_model("llama")
    student = changed(cut(teacher, (2, 3)))
    live = StateLosses(TERMS[:2], plan((2, 3)), student, teacher)
    recorded = StateLosses(TERMS[:2], plan((2, 3)), student, None)
    with torch.no_grad(), live.capturing_teacher() as theirs:
        final_hidden(teacher, ids(), POSITIONS)
    assert recorded.teacher_layers == tuple(theirs.states)
    with recorded.capturing_student() as ours:
        final_hidden(student, ids(), POSITIONS)
    again = Captured({layer: state.clone() for layer, state in theirs.states.items()})
    assert torch.equal(recorded(ours, again, labels(), POSITIONS)[1], live(ours, theirs, labels(), POSITIONS)[1])
    with pytest.raises(UserError, match="attention_relation: is not in recorded signals"):
        StateLosses(TERMS, plan((2, 3)), student, None)


@pytest.mark.slow
@pytest.mark.parametrize("term", KINDS, ids=str)
def test_thirty_steps_bring_the_student_nearer(term: StateTerm) -> None:
    teacher = tiny_model("llama")
    student = changed(cut(teacher, (2, 3)))
    losses = StateLosses((term,), plan((2, 3)), student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    curve = []
    for _ in range(30):
        loss, sums = run(losses, student, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(sums.item())
    assert curve[-1] < 0.5 * curve[0]


def test_a_layer_that_the_student_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"hidden_states: layers: the student has 4 layers, 0 to 3 \(got 4\)"):
        layer_pairs(HiddenStates(layers=(1, 4)), plan((2, 3)))


def test_a_plan_of_other_models_is_refused() -> None:
    teacher = tiny_model("llama")
    with pytest.raises(UserError, match=r"student: has 6 layers, but 4 by plan\.json"):
        StateLosses(TERMS, plan((2, 3)), teacher, teacher)
    with pytest.raises(UserError, match=r"teacher: has 4 layers, but 6 by plan\.json"):
        StateLosses(TERMS, plan((2, 3)), cut(teacher, (2, 3)), cut(teacher, (0, 1)))
    wide = tiny_model("llama", hidden_size=64)
    with pytest.raises(UserError, match="student: hidden size 32, the teacher's is 64"):
        StateLosses(TERMS, plan((2, 3)), cut(teacher, (2, 3)), wide)


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("bloom", "layer 3 has no attention that shoal can look into"),
        ("mamba", "layer 3 has no attention that shoal can look into"),
        ("doge", "attention of layer 3 adds biases to its scores"),
    ],
)
def test_attention_that_cannot_be_seen_is_refused(family: str, problem: str) -> None:
    model = architectures.tiny_model(family)
    with (
        pytest.raises(UserError, match=f"{family}: {problem}"),
        torch.no_grad(),
        capturing(model, [], [3]),
    ):
        model(input_ids=ids())


def test_layers_without_one_stream_of_their_own_are_refused() -> None:
    model = tiny_model("llama")
    layer = decoder_layers(model)[2]
    own = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: hidden.copy_(own(hidden, *args, **kwargs))
    with (
        pytest.raises(UserError, match="llama: what layer 1 returns is overwritten"),
        torch.no_grad(),
        capturing(model, [1]),
    ):
        final_hidden(model, ids(), POSITIONS)
    layer.forward = lambda hidden, *args, **kwargs: own(hidden, *args, **kwargs)[None]
    with pytest.raises(UserError, match="llama: layer 2 does not return one stream"), capturing(model, [2]):
        final_hidden(model, ids(), POSITIONS)


def test_a_term_that_trains_nothing_is_refused() -> None:
    teacher = tiny_model("llama")
    student = changed(cut(teacher, (2, 3))).requires_grad_(False)
    with pytest.raises(UserError, match="hidden_states: no gradient reaches the student"):
        run(StateLosses(TERMS, plan((2, 3)), student, teacher), student, teacher)


def test_the_attention_interface_is_given_back() -> None:
    from transformers.modeling_utils import AttentionInterface

    before = AttentionInterface.get_interface
    with pytest.raises(RuntimeError, match="stop"), capturing(tiny_model("llama"), [], [1]):
        raise RuntimeError("stop")
    assert AttentionInterface.get_interface is before


def test_every_term_inside_the_layers_learns_from_its_own_tokens() -> None:
    """Labels of a term's own give what the term alone gives with these labels."""
    teacher, student = tiny_model("llama"), cut(tiny_model("llama", seed=3), (2, 3))
    terms = (HiddenStates(weight=0.5), HiddenStates(map="own", multi_scale=True), AttentionRelation(), ValueRelation())
    first, none = labels().clone(), torch.full_like(labels(), IGNORED)
    first[1] = IGNORED
    own = (labels(), first, first, none)
    losses = StateLosses(terms, plan((2, 3)), student, teacher)
    with torch.no_grad(), losses.capturing_teacher() as theirs:
        final_hidden(teacher, ids(), POSITIONS)
    with losses.capturing_student() as ours:
        final_hidden(student, ids(), POSITIONS)
    loss, sums = losses(ours, theirs, own, POSITIONS)
    assert sums[3] == 0
    assert (sums[:3] > 0).all()
    alone = [
        StateLosses((term,), plan((2, 3)), student, teacher)(ours, theirs, each, POSITIONS)[1][0]
        for term, each in zip(terms, own, strict=True)
    ]
    assert torch.equal(sums, torch.stack(alone))
    assert loss.item() == pytest.approx(sum(t.weight * s.item() for t, s in zip(terms, alone, strict=True)), rel=1e-6)
