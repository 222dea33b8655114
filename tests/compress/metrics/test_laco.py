"""LaCo's acceptance against models that are merged and cut by hand, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_rows import documents, packed
from tiny import NUM_LAYERS, tiny_model
from torch import nn
from transformers import PreTrainedModel

from shoal.compress.measure import measure_importance
from shoal.data.packing import PackedRows
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
