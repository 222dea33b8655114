"""Layers of a donor in the place of a model's own: they are the donor's, and undone exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import census
from masked_models import FAMILIES, logits, mlp_skipped, tiny
from tiny import tiny_model as tiny_kind
from transformers import PreTrainedModel
from variant_cases import requests

from shoal.components import REMOVED, LayerEdit
from shoal.compress.surgery.cut_model import skipped
from shoal.compress.variants.variants import score_variants, variant
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.inference.scoring import score
from shoal.lab.donor import swapped
from shoal.lab.sweeps import WithDonor
from shoal.models.anatomy import anatomy, decoder_layers


def pair(name: str = "llama", **donor_settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny(name), tiny(name, **{"seed": 1, **donor_settings})


def pair_that_differs_in_layers_alone(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    model, donor = pair(name)
    layers = f"{anatomy(model).layers_name}."
    donor.load_state_dict(
        {key: one for key, one in model.state_dict().items() if not key.startswith(layers)}, strict=False
    )
    return model, donor


def swap(model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int]) -> None:
    """Swap and swap back: for what is refused."""
    with swapped(model, donor, layers):
        pass


@pytest.mark.parametrize("name", census([*FAMILIES, "zamba2", "mamba", "gemma4_text"]))
def test_everything_swapped_is_the_donor_and_nothing_swapped_the_model(name: str) -> None:
    model, donor = pair_that_differs_in_layers_alone(name)
    every = range(len(decoder_layers(model)))
    base, other = logits(model), logits(donor)
    assert not torch.equal(base, other)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with swapped(model, donor, every):
        assert torch.equal(logits(model), other)
        found = model.state_dict()
        assert all(torch.equal(weight, found[key]) for key, weight in donor.state_dict().items())
    with swapped(model, donor, ()):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(donor), other)
    assert all(parameters[key] is one for key, one in model.named_parameters(remove_duplicate=False))


def test_a_swapped_layer_is_the_donors_own_memory_and_the_rest_the_models() -> None:
    model, donor = pair()
    ours, theirs = dict(model.named_parameters()), dict(donor.named_parameters())
    with swapped(model, donor, [1, 4]):
        for name, parameter in model.named_parameters():
            assert parameter is (theirs if name.startswith(("model.layers.1.", "model.layers.4.")) else ours)[name]


def test_swaps_are_undone_after_an_error_and_in_any_nesting() -> None:
    model, donor = pair()
    third = tiny("llama", seed=2)
    before, base = dict(model.named_parameters()), logits(model)
    with swapped(model, donor, [1, 2]):
        first = logits(model)
        with swapped(model, third, [2, 3]), mlp_skipped(model, [1]):
            assert not torch.equal(logits(model), first)
        assert torch.equal(logits(model), first)
        with pytest.raises(ZeroDivisionError), swapped(model, third, [2, 3]), mlp_skipped(model, [1]):
            _ = 1 / 0
        assert torch.equal(logits(model), first)
        with pytest.raises(UserError), swapped(model, third, [0, 6]):
            pass
        assert torch.equal(logits(model), first)
    assert torch.equal(logits(model), base)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"num_hidden_layers": 5}, "num_hidden_layers is 5 in the donor, but 6 in the model"),
    ("llama", rope(5e5), r"rope_parameters is .*500000.* in the donor, but .*10000"),
    ("llama", {"rms_norm_eps": 1e-3}, r"rms_norm_eps is 0\.001 in the donor, but 1e-06"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 6}, r"layer_types is .* in the donor"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_models_that_do_not_fit_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    model, donor = pair(name, **settings)
    with pytest.raises(UserError, match=message):
        swap(model, donor, [2])


def test_donors_of_another_class_or_dtype_are_refused() -> None:
    with pytest.raises(UserError, match="class is 'Qwen3ForCausalLM' in the donor, but 'LlamaForCausalLM'"):
        swap(tiny("llama"), tiny("qwen3"), [2])
    with pytest.raises(UserError, match=r"is torch\.bfloat16 \(32.* in the donor, but torch\.float32"):
        swap(tiny("llama"), tiny("llama").bfloat16(), [2])


def test_a_donors_layers_are_scored_as_the_model_into_which_they_are_put_is() -> None:
    model, donor = tiny_kind("qwen3"), tiny_kind("qwen3", seed=1)
    edited, decoder, asked = WithDonor(model, donor), Decoder(model), requests()
    one = LayerEdit("donor")
    variants = [variant("one", [(2, one)]), variant("three", [(1, one), (4, one), (5, REMOVED)])]
    found = score_variants(edited, decoder, asked, variants, batch_size=3)
    for scored, own in zip(found, ([2], [1, 4]), strict=True):
        with swapped(model, donor, own), skipped(model, [5] if len(own) > 1 else []):
            assert scored == score(decoder, asked, batch_size=3)
    assert found[0] != score(decoder, asked, batch_size=3)


def test_a_tensor_that_is_not_swapped_everywhere_is_refused() -> None:
    model, donor = pair()
    for own in (model, donor):
        decoder_layers(own)[4].mlp = decoder_layers(own)[2].mlp
    with pytest.raises(
        UserError, match=r"layers\.2\.mlp.* is one tensor with .*layers\.4\.mlp.*, which is not swapped"
    ):
        swap(model, donor, [2])
    swap(model, donor, [2, 4])
