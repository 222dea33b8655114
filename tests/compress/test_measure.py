"""Scores against an independent float64 reference, and what they must not depend on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import flash_stand_in
import pytest
import torch
from architectures import tiny_model as tiny_architecture
from packed_rows import ROWS, documents, packed, raw_states
from ranks import call_on_ranks, in_group
from tiny import KINDS, NUM_LAYERS, tiny_model
from transformers import PreTrainedModel

from shoal.compress.measure import Scores, measure_importance
from shoal.compress.metrics.hidden_metrics import HIDDEN_METRICS
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.attention import implementation

ALL = ("block_influence", "angular")


def measure(model: PreTrainedModel, rows: PackedRows = ROWS, *, batch_size: int = 2, **arguments: Any) -> Scores:
    return measure_importance(model, rows, metrics=ALL, batch_size=batch_size, **arguments)


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


def assert_close(one: Scores, other: Scores, tolerance: float) -> None:
    assert (one.num_layers, one.num_tokens) == (other.num_layers, other.num_tokens)
    assert one.layers["block_influence"] == pytest.approx(other.layers["block_influence"], abs=tolerance)
    for row, other_row in zip(one.runs["angular"], other.runs["angular"], strict=True):
        assert row == pytest.approx(other_row, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_the_float64_reference(kind: str) -> None:
    model = tiny_model(kind)
    scores = measure(model)
    influence, angles = reference(model, ROWS)
    assert scores.num_layers == NUM_LAYERS
    assert scores.num_tokens == ROWS.input_ids_NS.numel()
    assert scores.layers["block_influence"] == pytest.approx(influence, abs=2e-6)
    assert [len(row) for row in scores.runs["angular"]] == list(range(NUM_LAYERS, 0, -1))
    for (length, start), angle in angles.items():
        assert scores.runs["angular"][length - 1][start] == pytest.approx(angle, abs=2e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    model = tiny_model("gemma3")
    assert_close(measure(model), measure(model, batch_size=batch_size), 1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_padding_changes_no_score(kind: str, side: str) -> None:
    model = tiny_model(kind)
    width, padding = ROWS.input_ids_NS.shape[1], 6
    amounts = torch.tensor([0, 2, 6, 3, 1])
    ids = torch.full(
        (len(ROWS), width + padding), 5
    )  # no padding token: its states are all zero and hide a forgotten mask
    positions = torch.full_like(ids, 17)
    mask = torch.zeros_like(ids)
    for row, amount in enumerate(amounts.tolist()):
        start = amount if side == "left" else 0
        ids[row, start : start + width] = ROWS.input_ids_NS[row]
        positions[row, start : start + width] = ROWS.position_ids_NS[row]
        if side == "right":  # the padding looks like more of the last document
            positions[row, width:] = ROWS.position_ids_NS[row, -1] + 1 + torch.arange(padding)
        mask[row, start : start + width] = 1
    scores = measure(model, PackedRows(ids, positions), attention_mask_NS=mask)
    assert_close(measure(model), scores, 1e-6)


def first_rows(count: int) -> PackedRows:
    return PackedRows(ROWS.input_ids_NS[:count], ROWS.position_ids_NS[:count])


def _measure_on_rank(rank: int, world_size: int, folder: str, num_rows: int) -> None:
    with in_group(rank, world_size, folder):
        torch.save(measure(tiny_model("llama"), first_rows(num_rows)).__dict__, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [5, 1], ids=["uneven shares", "a rank without rows"])
def test_two_ranks_give_the_scores_of_one(num_rows: int, tmp_path: Path) -> None:
    call_on_ranks(_measure_on_rank, str(tmp_path), num_rows, ranks=2)
    first, second = (Scores(**torch.load(tmp_path / f"{rank}.pt", weights_only=True)) for rank in (0, 1))
    assert first == second
    assert_close(first, measure(tiny_model("llama"), first_rows(num_rows)), 1e-6)


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
    message = r"the input of layer 0 is not finite .* in batch 2 \(row 4 .* torch.float32, .* set dtype: bfloat16"
    with pytest.raises(UserError, match=message):
        measure_importance(model, fine, metrics=[metric], batch_size=2)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_scores_are_those_of_masked_attention_under_other_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_stand_in.install(monkeypatch)
    model, rows = tiny_architecture(family), packed([[8, 12], [8, 12]])
    rows = PackedRows(rows.input_ids_NS % 90, rows.position_ids_NS)
    metrics = ("block_influence", "angular", "single_drop_perplexity", "taylor")
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 17:] = False
    expected = measure_importance(model, rows, metrics=metrics, batch_size=2, attention_mask_NS=mask)
    model.set_attn_implementation(str(implementation("flash", model.config)))
    found = measure_importance(model, rows, metrics=metrics, batch_size=2, attention_mask_NS=mask)
    assert found.num_tokens == expected.num_tokens
    for metric, values in expected.layers.items():
        assert found.layers[metric] == pytest.approx(values, rel=1e-3, abs=1e-5), metric
    for row, other in zip(found.runs["angular"], expected.runs["angular"], strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
