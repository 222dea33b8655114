"""LaCo's acceptance against models that are merged and cut by hand, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_rows import documents, packed
from ranks import call_on_ranks, in_group
from tiny import NUM_LAYERS, tiny_model
from torch import nn
from transformers import PreTrainedModel

from shoal.compress.measure import Scores, measure_importance
from shoal.compress.metrics.laco import first_texts
from shoal.compress.metrics.metric import Calibration
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers

ROWS = packed([[40], [17, 23], [1, 19, 20], [40]])


def measure(model: PreTrainedModel, rows: PackedRows = ROWS, **arguments: Any) -> tuple[tuple[float, ...], ...]:
    return measure_importance(model, rows, metrics=["laco_acceptance"], batch_size=2, **arguments).runs[
        "laco_acceptance"
    ]


def merged_by_hand(model: PreTrainedModel, start: int, length: int) -> PreTrainedModel:
    """Equation 1 written out, and the layers behind it taken out of the list."""
    merged = copy.deepcopy(model)
    own = dict(decoder_layers(model)[start].named_parameters())
    for name, parameter in decoder_layers(merged)[start].named_parameters():
        for k in range(1, length + 1):
            parameter.data += dict(decoder_layers(model)[start + k].named_parameters())[name].data - own[name].data
    body: Any = merged.get_submodule("model")
    gone = range(start + 1, start + length + 1)
    body.layers = nn.ModuleList([layer for index, layer in enumerate(body.layers) if index not in gone])
    merged.config.num_hidden_layers = len(body.layers)
    return merged


@torch.no_grad()
def acceptance(model: PreTrainedModel, start: int, length: int) -> float:
    merged, cosines = merged_by_hand(model, start, length), []
    for document in documents(ROWS)[:5]:
        one, other = (
            some(document[:, :32], output_hidden_states=True, use_cache=False).hidden_states[-1].flatten()
            for some in (model, merged)
        )
        cosines.append(float(one @ other / (one.norm() * other.norm())))
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("num_drop", [None, 2])
def test_scores_are_one_minus_the_cosine_of_models_merged_by_hand(num_drop: int | None) -> None:
    found = measure(tiny_model("llama"), num_drop=num_drop)
    model = tiny_model("llama").double()
    assert [len(row) for row in found] == list(range(NUM_LAYERS, NUM_LAYERS - (num_drop or 4), -1))
    for length, row in enumerate(found, 1):
        for start, score in enumerate(row[:-1]):
            assert score == pytest.approx(1 - acceptance(model, start, length), abs=1e-5)
        assert row[-1] == 2  # the last layer is among them: nothing is left to merge into


def test_layers_of_another_kind_are_not_merged_and_score_worst() -> None:
    model = tiny_model("gemma3")
    kinds = model.config.layer_types
    assert len(set(kinds)) == 2
    for length, row in enumerate(measure(model), 1):
        for start, score in enumerate(row):
            one_kind = start + length < NUM_LAYERS and len(set(kinds[start : start + length + 1])) == 1
            assert (score < 2) == one_kind


def test_the_model_is_as_it_was_and_nothing_is_said_of_merges_only_tried(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    before = {name: (id(own), own.clone()) for name, own in model.named_parameters()}
    measure(model)
    for name, own in model.named_parameters():
        assert id(own) == before[name][0]
        assert torch.equal(own, before[name][1])
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_texts_are_the_first_documents_without_padding() -> None:
    mask = torch.ones_like(ROWS.input_ids_NS)
    mask[0, :3] = 0
    texts = first_texts(Calibration(ROWS, 2, mask))
    expected = [document[0].tolist() for document in documents(ROWS)]
    assert texts == [expected[0][3:35], *(document[:32] for document in expected[1:5])]


@pytest.mark.slow
def test_padding_changes_no_score() -> None:
    padded = torch.nn.functional.pad(ROWS.input_ids_NS, (0, 3)), torch.nn.functional.pad(ROWS.position_ids_NS, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ROWS.input_ids_NS), (0, 3))
    model = tiny_model("llama")
    assert measure(model, PackedRows(*padded), attention_mask_NS=mask) == measure(model)


def test_a_merge_that_overflows_scores_worst_and_the_others_are_measured(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama").half()
    for layer, value in enumerate((-30_000, 30_000, 30_000)):  # -t0 + t1 + t2 is above 65,504
        decoder_layers(model)[layer].get_parameter("mlp.down_proj.weight").data[0, 0] = value
    (first, *_), (overflown, *rest) = measure(model, num_drop=2)
    assert (first < 2, overflown, rest[0] < 2) == (True, 2, True)
    assert "mlp.down_proj.weight is not finite in torch.float16" in caplog.text


def _measure_on_rank(rank: int, world_size: int, folder: str) -> None:
    with in_group(rank, world_size, folder):
        scores = measure_importance(tiny_model("llama"), ROWS, metrics=["laco_acceptance"], batch_size=2)
        torch.save(scores.__dict__, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    call_on_ranks(_measure_on_rank, str(tmp_path), ranks=2)
    first, second = (Scores(**torch.load(tmp_path / f"{rank}.pt", weights_only=True)) for rank in (0, 1))
    assert first == second
    for row, alone in zip(first.runs["laco_acceptance"], measure(tiny_model("llama")), strict=True):
        assert row == pytest.approx(alone, abs=1e-6)


def test_a_model_of_which_no_two_layers_are_of_one_kind_is_refused() -> None:
    model = tiny_model("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(UserError, match=r"laco_acceptance merges neighbouring layers, and no two of this model are of"):
        measure(model)


def test_a_model_that_overflows_is_refused() -> None:
    model = tiny_model("llama")
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data.fill_(torch.inf)
    with pytest.raises(UserError, match=r"the final hidden states are not finite in torch.float32; set dtype: bfloat1"):
        measure(model)
