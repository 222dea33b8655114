"""Losses on attention, values and pooled states: values and gradients from the definitions, and a whole training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from ranks import environment, run_ranks
from tiny import tiny_model
from torch import Tensor, nn
from training_runs import Trial, finished, prepare
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.data.packing import IGNORED
from shoal.lab import relations
from shoal.lab.attention.calls import AttentionInputs
from shoal.lab.relations import Attended, AttentionRelation, MultiScale, RelationLosses, ValueRelation
from shoal.models.anatomy import decoder_layers
from shoal.recipe.losses import StateTerm
from shoal.train.objective.objective import final_hidden

POSITIONS = torch.stack([torch.cat([torch.arange(7), torch.arange(5)]), torch.cat([torch.arange(3), torch.arange(9)])])
"""Two rows of two documents each."""
CUT = Plan(Provenance({}), num_layers=6, drop=(2, 3), reason="")


def labels() -> Tensor:
    """All tokens but the first of a document, and the second row's first five, which are a prompt."""
    found = torch.arange(24).view(2, 12).masked_fill(POSITIONS == 0, IGNORED)
    found[-1, :5] = IGNORED
    return found


def counted_tokens() -> list[tuple[int, int]]:
    return [
        (row, token)
        for row in range(2)
        for token in range(11)
        if labels()[row, token + 1] != IGNORED and POSITIONS[row, token] != 0
    ]


def documents(row: int) -> list[int]:
    return [int(number) for number in (POSITIONS[row] == 0).cumsum(0)]


def losses_of(*terms: StateTerm) -> RelationLosses:
    teacher = tiny_model("llama")
    student: Any = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(student.model.layers[layer] for layer in CUT.keep)
    student.config.num_hidden_layers = 4
    return RelationLosses(terms, CUT, student, teacher)


def random_attention(seed: int, *, softcap: float | None = None, window: int | None = None) -> AttentionInputs:
    torch.manual_seed(seed)
    shapes = ((2, 6, 12, 5), (2, 3, 12, 5), (2, 3, 12, 4))
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    mask = None
    if window is not None:
        seen = [[seen_keys(row, token, window) for token in range(12)] for row in range(2)]
        mask = torch.tensor(seen).unsqueeze(1)
    return AttentionInputs(query, key, value, scale=0.7 + 0.1 * seed, softcap=softcap, seen_B1SS=mask)


def seen_keys(row: int, token: int, window: int) -> list[bool]:
    document = documents(row)
    return [k <= token < k + window and document[k] == document[token] for k in range(12)]


def reference(term: StateTerm, ours: AttentionInputs, theirs: AttentionInputs) -> Tensor:
    """From the definition, query by query and head by head."""
    total = torch.zeros((), dtype=torch.float64)
    heads = 6 if isinstance(term, AttentionRelation) else 3
    for row, token in counted_tokens():
        document = documents(row)
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


@pytest.mark.prove
@pytest.mark.parametrize("term", [AttentionRelation(), ValueRelation()], ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (0.8, None), (None, 3)])
@pytest.mark.parametrize("scores", [1, 6 * 12 * 5])
def test_relations_and_their_gradients_follow_from_the_definition(term, softcap, window, scores, monkeypatch) -> None:
    monkeypatch.setattr(relations, "SCORES", scores)
    ours, theirs = (random_attention(seed, softcap=softcap, window=window) for seed in (1, 2))
    loss, sums = losses_of(term)(Attended({}, {3: ours}), Attended({}, {5: theirs}), labels(), POSITIONS)
    expected = reference(term, ours, theirs)
    torch.testing.assert_close(sums, expected.detach()[None], rtol=1e-12, atol=0)
    inputs = (ours.query_BHSd, ours.key_BGSd) if isinstance(term, AttentionRelation) else (ours.value_BGSd,)
    *found, query = torch.autograd.grad(loss, (*inputs, theirs.query_BHSd), allow_unused=True)
    assert query is None, "the teacher learns nothing"
    for one, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_states_of_late_layers_are_pooled_over_neighbours() -> None:
    torch.manual_seed(0)
    ours, theirs = ({layer: torch.randn(2, 12, 6, dtype=torch.float64) for layer in range(6)} for _ in range(2))
    with torch.no_grad():
        _, sums = losses_of(MultiScale())(Attended(ours), Attended(theirs), labels(), POSITIONS)
    total = 0.0
    for layer, target in ((1, 3), (2, 4), (3, 5)):
        windows: dict[Any, list[tuple[int, int]]] = {}
        for row, token in counted_tokens():
            place = (row, documents(row)[token], int(POSITIONS[row, token]) // 4) if layer > 1 else (row, token)
            windows.setdefault(place, []).append((row, token))
        for members in windows.values():
            sides = ((ours, layer), (theirs, target))
            s, t = (torch.stack([side[at][where] for where in members]).mean(0) for side, at in sides)
            total += float((s - t) @ (s - t) / (t @ t)) * len(members) / 3
    assert sums.item() == pytest.approx(total, rel=1e-12)


def run(losses: RelationLosses, student: PreTrainedModel, teacher: PreTrainedModel) -> Tensor:
    ids = torch.randint(0, 90, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), losses.capturing_teacher() as theirs:
        final_hidden(teacher, ids, POSITIONS)
    with losses.capturing_student() as ours:
        final_hidden(student, ids, POSITIONS)
    return losses(ours, theirs, labels(), POSITIONS)[0]


@pytest.mark.prove
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "qwen3", "deepseek_v3", "gemma3_text"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_relation_is_that_of_the_models_own_attention(family: str, implementation: str) -> None:
    """Fused and latent projections, norms of heads, rotary embedding, masks: all are in the inputs."""
    narrow: dict[str, Any] = {"sliding_window": 3} if family == "gemma3_text" else {}
    teacher, student = (architectures.tiny_model(family, seed=seed, **narrow) for seed in (0, 1))
    num_layers, own = len(decoder_layers(teacher)), []
    ids = torch.randint(0, 90, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
    for model in (teacher, student):
        model.set_attn_implementation("eager")
        own.append(model(input_ids=ids, position_ids=POSITIONS, use_cache=False, output_attentions=True).attentions)
        model.set_attn_implementation(implementation)
    whole = Plan(Provenance({}), num_layers=num_layers, drop=(), reason="")
    term = AttentionRelation(layers=tuple(range(num_layers)))
    loss = run(RelationLosses((term,), whole, student, teacher), student, teacher)
    expected = 0.0
    for theirs, ours in zip(*own, strict=True):
        for row, token in counted_tokens():
            p, q = theirs[row, :, token].double(), ours[row, :, token].double()
            seen = p > 0
            expected += (p[seen] * (p[seen] / q[seen]).log()).sum().item() / p.shape[0] / num_layers
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.prove
def test_a_student_is_trained_with_these_terms_beside_the_recipes(tmp_path: Path, teacher: Path) -> None:
    prepare(tmp_path, teacher)
    terms = "terms=[{kind: attention_relation}, {kind: multi_scale, weight: 0.1}]"
    finished(
        Trial(
            tmp_path,
            run_ranks(
                ["lab", "relations", str(tmp_path / "recipe.yaml"), terms], ranks=1, env=environment(), cwd=tmp_path
            ),
        )
    )
    training = Training.load(tmp_path / "run" / "lab" / "relations" / Training.FILE)
    assert {"attention_relation", "multi_scale", "forward_kl"} <= training.history[0].keys()
    assert training.history[-1]["attention_relation"] < training.history[0]["attention_relation"]
