"""Scores against an independent float64 reference, and what they must not depend on."""

from __future__ import annotations

import math

import flash_stand_in
import pytest
import torch
from architectures import tiny_model as tiny_architecture
from packed_rows import ROWS, documents, packed, raw_states
from tiny import KINDS, NUM_LAYERS, tiny_model
from transformers import PreTrainedModel

from shoal.compress.measure import measure_importance
from shoal.compress.metrics.hidden_metrics import HIDDEN_METRICS
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.attention import implementation


def reference(model: PreTrainedModel, rows: PackedRows) -> tuple[list[float], dict[tuple[int, int], float]]:
    """Block influence and angular distances from one document at a time, by the definitions."""
    influence: list[list[float]] = [[] for _ in range(NUM_LAYERS)]
    angles: dict[tuple[int, int], list[float]] = {}
    for document in documents(rows):
        states = raw_states(model, document)
        for layer in range(NUM_LAYERS):
            for before, after in zip(states[layer], states[layer + 1], strict=True):
                influence[layer].append(1 - float(before @ after / (before.norm() * after.norm())))
        for length in range(1, NUM_LAYERS + 1):
            for start in range(NUM_LAYERS - length + 1):
                one, other = states[start, -1], states[start + length, -1]
                cosine = max(-1.0, min(1.0, float(one @ other / (one.norm() * other.norm()))))
                angles.setdefault((length, start), []).append(math.acos(cosine) / math.pi)
    mean = {key: sum(values) / len(values) for key, values in angles.items()}
    return [sum(values) / len(values) for values in influence], mean


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_the_float64_reference(kind: str) -> None:
    model = tiny_model(kind)
    scores = measure_importance(model, ROWS, metrics=["block_influence", "angular"], batch_size=2)
    influence, angles = reference(model, ROWS)
    assert scores.num_layers == NUM_LAYERS
    assert scores.num_tokens == ROWS.input_ids_NS.numel()
    assert scores.layers["block_influence"] == pytest.approx(influence, abs=2e-6)
    assert [len(row) for row in scores.runs["angular"]] == list(range(NUM_LAYERS, 0, -1))
    for (length, start), angle in angles.items():
        assert scores.runs["angular"][length - 1][start] == pytest.approx(angle, abs=2e-6)


@pytest.mark.parametrize("metric", HIDDEN_METRICS)
def test_states_that_overflow_are_refused_by_layer_and_batch(metric: str) -> None:
    model = tiny_model("llama")
    model.get_parameter("model.embed_tokens.weight").data[77] = torch.nan
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data[:, 0] = torch.inf
    fine = PackedRows(ROWS.input_ids_NS.masked_fill(ROWS.input_ids_NS == 77, 5), ROWS.position_ids_NS)
    message = r"measure: the output of layer 3 is not finite \(NaN or infinite\) in batch 0 \(row 0 of the calibration"
    with pytest.raises(UserError, match=message):
        measure_importance(model, fine, metrics=[metric], batch_size=2)
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data.fill_(0)
    fine.input_ids_NS[4, 3] = 77
    message = r"the input of layer 0 is not finite .* in batch 2 \(row 4 .*\): model.embed_tokens.weight holds NaN"
    with pytest.raises(UserError, match=message):
        measure_importance(model, fine, metrics=[metric], batch_size=2)


def test_a_precision_that_is_set_is_no_remedy_of_finite_weights() -> None:
    model = tiny_model("llama")
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data.fill_(3e38)
    model.get_parameter("model.layers.3.post_attention_layernorm.weight").data.fill_(1e20)
    message = r"layer 3 .*: the model overflows in torch.float32, with finite weights; give another model"
    with pytest.raises(UserError, match=message):
        measure_importance(model, ROWS, metrics=["angular"], batch_size=2)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_scores_are_those_of_masked_attention_under_other_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_stand_in.install(monkeypatch)
    model, rows = tiny_architecture(family), packed([[8, 12], [8, 12]])
    rows = PackedRows(rows.input_ids_NS % 90, rows.position_ids_NS)
    metrics = ("block_influence", "angular", "single_drop_perplexity", "taylor")
    expected = measure_importance(model, rows, metrics=metrics, batch_size=2)
    model.set_attn_implementation(str(implementation("flash", model.config, hub_kernels=True)))
    found = measure_importance(model, rows, metrics=metrics, batch_size=2)
    assert found.num_tokens == expected.num_tokens
    for metric, values in expected.layers.items():
        assert found.layers[metric] == pytest.approx(values, rel=1e-3, abs=1e-5), metric
    for row, other in zip(found.runs["angular"], expected.runs["angular"], strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
