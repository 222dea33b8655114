"""Metrics of weights and gradients against a float64 model and autograd's own gradient of the whole loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_rows import documents, packed
from ranks import call_on_ranks, in_group
from tiny import KINDS, NUM_LAYERS, tiny_model
from torch import nn
from transformers import PreTrainedModel

from shoal.artifacts.importance import Importance
from shoal.compress import measure as measuring
from shoal.compress.measure import measure_importance
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers

ALL = ("magnitude", "taylor")
ROWS = packed([[20], [7, 13], [1, 9, 10], [20], [19, 1]])


def measure(model: PreTrainedModel, rows: PackedRows = ROWS, *, batch_size: int = 2, **arguments: object) -> Importance:
    return measure_importance(model, rows, metrics=ALL, batch_size=batch_size, **arguments)  # pyright: ignore[reportArgumentType]


def reference(model: PreTrainedModel, rows: PackedRows = ROWS) -> tuple[list[float], list[float]]:
    """Magnitude and Taylor: every document alone, the loss over all their tokens as one graph."""
    model = model.double()
    losses = []
    for document in documents(rows):
        log_p = model(document, use_cache=False).logits[0].log_softmax(dim=-1)
        losses += [-log_p[place, token] for place, token in enumerate(document[0, 1:])]
    (sum(losses, torch.zeros(())) / len(losses)).backward()
    magnitude, taylor = [0.0] * NUM_LAYERS, [0.0] * NUM_LAYERS
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".layers." in name and parameter.ndim == 2:
            layer = int(name.split(".layers.")[1].split(".")[0])
            assert parameter.grad is not None
            magnitude[layer] += float(parameter.detach().abs().sum())
            taylor[layer] += float((parameter.detach() * parameter.grad).abs().sum())
    return magnitude, taylor


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_and_taylor_equal_the_float64_reference(kind: str) -> None:
    scores = measure(tiny_model(kind)).layers
    magnitude, taylor = reference(tiny_model(kind))
    assert scores["magnitude"] == pytest.approx(magnitude, rel=1e-6)
    assert scores["taylor"] == pytest.approx(taylor, rel=1e-4)


def test_a_matrix_that_layers_share_counts_in_each_of_them_with_its_whole_gradient() -> None:
    model = tiny_model("llama")
    layers = decoder_layers(model)
    layers[4].mlp = layers[1].mlp
    scores = measure(model).layers
    magnitude, taylor = reference(model)
    assert scores["magnitude"] == pytest.approx(magnitude, rel=1e-6)
    assert scores["taylor"] == pytest.approx(taylor, rel=1e-4)


def test_only_layer_matrices_get_gradients_and_nothing_stays_changed() -> None:
    model = tiny_model("llama_tied")
    frozen = model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_(False)
    own = model.get_parameter("model.norm.weight")
    own.grad = torch.ones_like(own)
    expected = measure(tiny_model("llama_tied")).layers
    with torch.no_grad():
        assert measure(model).layers == expected
    assert not frozen.requires_grad
    assert own.requires_grad
    assert torch.equal(own.grad, torch.ones_like(own))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not own)


def _measure_on_rank(rank: int, world_size: int, folder: str, num_rows: int) -> None:
    with in_group(rank, world_size, folder):
        rows = PackedRows(ROWS.input_ids_NS[:num_rows], ROWS.position_ids_NS[:num_rows])
        measure(tiny_model("llama"), rows).save(Path(folder, f"{rank}.json"))


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [5, 1], ids=["uneven shares", "a rank without rows"])
def test_two_ranks_give_the_scores_of_one(num_rows: int, tmp_path: Path) -> None:
    call_on_ranks(_measure_on_rank, str(tmp_path), num_rows, ranks=2)
    first, second = (Importance.load(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first == second
    rows = PackedRows(ROWS.input_ids_NS[:num_rows], ROWS.position_ids_NS[:num_rows])
    expected = measure(tiny_model("llama"), rows)
    for name in ALL:
        assert first.layers[name] == pytest.approx(expected.layers[name], rel=1e-5)


@pytest.mark.parametrize("metric", ALL)
def test_quantised_models_are_refused(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PASSES", {})  # before anything is measured
    needs = f"measure.metrics: {metric} needs plain weights"
    model = tiny_model("llama")
    layer = decoder_layers(model)[2].get_submodule("mlp.up_proj")
    layer.register_parameter("weight", nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False))
    message = (
        rf"{needs}, but this model is quantised \(model.layers.2.mlp.up_proj.weight is torch.int8\); give the full"
    )
    with pytest.raises(UserError, match=message):
        measure_importance(model, ROWS, metrics=[metric], batch_size=2)
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match=rf"{needs}, but this model is quantised \(according to config.json\)"):
        measure_importance(model, ROWS, metrics=[metric], batch_size=2)
