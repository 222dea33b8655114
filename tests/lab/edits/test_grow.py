"""LESA against its definition: a decomposition by numpy in float64, weights of which the answer is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from architectures import tiny_model as tiny_architecture
from tiny import NUM_LAYERS, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.lab.edits import grow
from shoal.lab.edits.grow import predicted_layers
from shoal.models.anatomy import decoder_layers


def affine_in_depth(kind: str) -> tuple[PreTrainedModel, dict[str, tuple[Tensor, Tensor]]]:
    """A model whose weights are A + depth * B, and both by name."""
    model = tiny_model(kind) if kind == "llama" else tiny_architecture(kind)
    generator = torch.Generator().manual_seed(3)
    parts = {
        name: (torch.randn(tensor.shape, generator=generator), torch.randn(tensor.shape, generator=generator))
        for name, tensor in decoder_layers(model)[0].state_dict().items()
    }
    for depth, layer in enumerate(decoder_layers(model)):
        layer.load_state_dict({name: a + depth * b for name, (a, b) in parts.items()})
    return model, parts


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_weights_that_are_affine_in_depth_are_predicted_exactly(kind: str) -> None:
    """Between neighbours that is the layer at the half; across a run, its middle."""
    model, parts = affine_in_depth(kind)
    between, across = predicted_layers(model, [(2, 3), (1, 4)], seed=0)
    assert between.keys() == parts.keys()
    for found in (between, across):
        for name, (a, b) in parts.items():
            torch.testing.assert_close(found[name].double(), a.double() + 2.5 * b.double(), rtol=1e-4, atol=1e-4)


def test_coefficients_are_those_of_the_decomposition() -> None:
    """U S V_i by numpy in float64: the spectrum, the rows up to their signs, and every matrix whole again."""
    weights_LEmn = torch.randn(5, 1, 12, 20, generator=torch.Generator().manual_seed(0))
    directions_mm, scale_m = grow._basis(weights_LEmn)
    side_by_side = np.concatenate(list(weights_LEmn[:, 0].double().numpy()), axis=1)
    _, spectrum, rows = np.linalg.svd(side_by_side, full_matrices=False)
    np.testing.assert_allclose(scale_m.flip(0).numpy(), spectrum, rtol=1e-4)
    coefficients = ((directions_mm / scale_m).T @ weights_LEmn[:, 0]).flip(1)  # increasing there
    for layer, own in enumerate(coefficients):
        expected = rows[:, 20 * layer : 20 * (layer + 1)]
        np.testing.assert_allclose(own.abs().numpy(), np.abs(expected), atol=1e-4)
        whole = (directions_mm * scale_m) @ own.flip(0)
        torch.testing.assert_close(whole, weights_LEmn[layer, 0], rtol=1e-4, atol=1e-5)


def learnable() -> PreTrainedModel:
    """Layers that take turns, A and -A: the one in the middle is the negative of both sides."""
    model = tiny_model("llama", num_hidden_layers=12)
    layers = decoder_layers(model)
    for depth, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            parameter.data.copy_((-1) ** depth * layers[0].get_parameter(name).data.abs().sqrt())
    return model


@pytest.mark.prove
def test_what_a_mean_cannot_give_is_learnt(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(grow, "EPOCHS", 60)
    model = learnable()
    caplog.set_level("INFO")
    (found,) = predicted_layers(model, [(4, 6)], seed=0)
    expected = decoder_layers(model)[5].state_dict()
    for name in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
        own, of_mean = ((tensor - expected[name]).norm() for tensor in (found[name], -expected[name]))
        assert own < 0.2 * of_mean, name
    assert "lesa: mlp.up_proj.weight: held-out loss" in caplog.text


@pytest.mark.prove
def test_the_loss_is_that_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network that gives a known difference: (1 - lambda) MSE + lambda (|prediction| - |target|)^2, by batches."""
    coefficients_LRn = torch.randn(3, 160, 5, generator=torch.Generator().manual_seed(0))
    known = nn.Linear(10, 5)
    monkeypatch.setattr(grow, "_network", lambda *_: copy.deepcopy(known))
    monkeypatch.setattr(grow, "EPOCHS", 0)
    told: list[tuple[float, float]] = []
    monkeypatch.setattr(grow.log, "info", lambda _text, _name, network, mean, _end: told.append((network, mean)))
    grow._learnt("name", coefficients_LRn, [1], torch.Generator().manual_seed(7))
    held_out = torch.randperm(160, generator=torch.Generator().manual_seed(7))[:10]
    below, target, above = coefficients_LRn[:, held_out].double()
    mean = (below + above) / 2
    with torch.no_grad():
        predicted = mean + known.double()(torch.cat([below, above], -1))
    expected = [
        (1 - 5e-5) * ((found - target) ** 2).mean() + 5e-5 * (found.norm() - target.norm()) ** 2
        for found in (predicted, mean)
    ]
    assert told == [pytest.approx([value.item() for value in expected], rel=1e-5)]


def test_layers_without_neighbours_of_their_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"no three neighbouring layers have .* of layer 0"):
        predicted_layers(tiny_model("llama", num_hidden_layers=2), [(0, 1)], seed=0)
    mixed = tiny_architecture("jamba")
    with pytest.raises(UserError, match=r"no three neighbouring layers have"):
        predicted_layers(mixed, [(0, 0)], seed=0)
    assert len(decoder_layers(mixed)) == NUM_LAYERS
