"""Every metric of hidden states against a float64 reference written from its formula, and what none may depend on.

The reference runs one document at a time, as plain loops over the model's raw states.

Covers: shoal.compress.metrics.hidden_pass, shoal.compress.metrics.metric, shoal.compress.metrics.observation,
shoal.compress.metrics.registry.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model as architecture
from packed_rows import documents, packed, raw_states
from ranks import call_on_ranks, in_group
from tiny import KINDS, NUM_LAYERS, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.importance import Importance
from shoal.compress import measure as measuring
from shoal.compress.measure import measure_importance
from shoal.compress.metrics.hidden_metrics import HIDDEN_METRICS
from shoal.compress.metrics.registry import METRICS
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.recipe import measure as section

ROWS = packed([[40], [17, 23], [1, 19, 20], [40], [39, 1]], seed=1)


def test_a_recipe_knows_the_names_of_all_metrics() -> None:
    assert tuple(METRICS) == section.METRICS
    assert {*section.GREEDY} == {name for name, metric in METRICS.items() if metric.yields == "order"}


def measure(model: PreTrainedModel, rows: PackedRows = ROWS, *, batch_size: int = 2, **arguments: Any) -> Importance:
    return measure_importance(model, rows, metrics=list(HIDDEN_METRICS), batch_size=batch_size, **arguments)


def assert_close(one: Importance, other: Importance) -> None:
    assert one.num_tokens == other.num_tokens
    for name in HIDDEN_METRICS:
        if METRICS[name].yields == "layers":
            assert one.layers[name] == pytest.approx(other.layers[name], abs=2e-6), name
        else:
            for row, other_row in zip(one.runs[name], other.runs[name], strict=True):
                assert row == pytest.approx(other_row, abs=2e-6), name


def states_by_document(model: PreTrainedModel, rows: PackedRows) -> list[Tensor]:
    return [raw_states(model, document) for document in documents(rows)]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("kind", KINDS)
def test_update_norm_is_the_mean_relative_size_of_what_a_layer_adds(kind: str) -> None:
    model = tiny_model(kind)
    states = states_by_document(model, ROWS)
    expected = [
        mean(
            [
                float((after - before).norm() / before.norm())
                for document in states
                for before, after in zip(document[layer], document[layer + 1], strict=True)
            ]
        )
        for layer in range(NUM_LAYERS)
    ]
    assert measure(model).layers["update_norm"] == pytest.approx(expected, rel=2e-6)


def test_layers_that_do_nothing_score_lowest_under_every_metric() -> None:
    model = tiny_model("llama")
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        decoder_layers(model)[2].get_parameter(name).data.zero_()
    scores = measure(model)
    for name in ("block_influence", "update_norm"):
        assert scores.layers[name][2] == 0, name
        assert min(scores.layers[name][:2] + scores.layers[name][3:]) > 0, name
    assert scores.runs["angular"][0][2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_no_score_depends_on_the_batch_size(batch_size: int) -> None:
    model = tiny_model("gemma3")
    assert_close(measure(model), measure(model, batch_size=batch_size))


def _measure_on_rank(rank: int, world_size: int, folder: str, num_rows: int) -> None:
    with in_group(rank, world_size, folder):
        rows = PackedRows(ROWS.input_ids_NS[:num_rows], ROWS.position_ids_NS[:num_rows])
        measure(tiny_model("llama"), rows).save(Path(folder, f"{rank}.json"))
        broken = tiny_model("llama")
        broken.get_parameter("model.embed_tokens.weight").data[rows.input_ids_NS[num_rows // 2 - 1, 0]] = torch.nan
        with pytest.raises(UserError) as refusal:  # both ranks, though one of them has the row
            measure(broken, rows)
        Path(folder, f"{rank}.txt").write_text(str(refusal.value))


@pytest.mark.prove
@pytest.mark.parametrize("num_rows", [5, 1], ids=["uneven shares", "a rank without rows"])
def test_two_ranks_give_the_scores_of_one(num_rows: int, tmp_path: Path) -> None:
    call_on_ranks(_measure_on_rank, str(tmp_path), num_rows, ranks=2)
    first, second = (Importance.load(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first == second
    refusals = {(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)}
    assert len(refusals) == 1
    where = "batch 0 of rank 1 (row 1 of" if num_rows == 5 else "batch 0 of rank 0 (row 0 of"
    assert f"the input of layer 0 is not finite (NaN or infinite) in {where}" in refusals.pop()
    rows = PackedRows(ROWS.input_ids_NS[:num_rows], ROWS.position_ids_NS[:num_rows])
    assert_close(first, measure(tiny_model("llama"), rows))


@pytest.mark.parametrize("family", ["gemma3n_text", "cpmant"])
def test_layers_without_one_vector_per_token_are_refused_before_anything_is_measured(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "PASSES", {})
    model = architecture(family)
    for name in HIDDEN_METRICS:
        with pytest.raises(UserError, match=r"measure: layer 0 works on states of .*: use metrics of loss or weights"):
            measure_importance(model, ROWS, metrics=["magnitude", name], batch_size=2)
