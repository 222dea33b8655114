"""What single queries attend to, from what attention is computed from, against the weights of eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import architectures
import flash_stand_in
import pytest
import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.lab.attention.calls import AttentionInputs, attention_calls, attention_weights
from shoal.models.anatomy import decoder_body, decoder_layers
from shoal.models.attention import implementation, without_kernels
from shoal.models.document_masks import documents_apart

EAGER_ONLY = ("gemma2", "gpt_oss")
"""A soft cap or sinks: transformers computes them in eager attention alone."""
NARROW: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 3},
    "llama4_text": {"attention_chunk_size": 4},
    "mixtral": {"sliding_window": 3},
}
PLACES = torch.tensor([[0, 4, 11], [7, 8, 3]])


@pytest.mark.prove
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "deepseek_v3", *EAGER_ONLY, *NARROW])
def test_weights_of_chosen_queries_are_those_of_eager_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.tiny_model(family, **NARROW.get(family, {})).double()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    # nor does the softmax of eager attention, which rounds to float32
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim, dtype=None: scores.softmax(dim))
    ids = torch.randint(6, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    own = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    if family not in EAGER_ONLY:
        model.set_attn_implementation("sdpa")
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int, inputs: AttentionInputs) -> None:
        found[layer] = attention_weights(inputs, PLACES)

    with torch.no_grad(), attention_calls(model, range(len(decoder_layers(model))), keep, remedy="none"):
        model(input_ids=ids, use_cache=False)
    assert sorted(found) == list(range(len(own)))
    rows = torch.arange(2)[:, None]
    for layer, weights_BHTS in found.items():
        expected_BHTS = own[layer][rows, :, PLACES].transpose(1, 2)
        assert weights_BHTS.dtype == torch.float64
        torch.testing.assert_close(weights_BHTS, expected_BHTS, rtol=1e-9, atol=1e-12)
    if family == "gpt_oss":
        assert float(found[0].sum(-1).max()) < 1  # the rest is the sink's


def test_scores_with_biases_of_their_own_are_refused_by_name() -> None:
    model = architectures.tiny_model("doge")
    calls = attention_calls(model, range(2), lambda *_: None, remedy="leave it out")
    with pytest.raises(UserError, match=r"doge: attention of layer 0 adds biases to its scores; leave it out"), calls:
        model(input_ids=torch.arange(6)[None])


@torch.no_grad()
def hidden(model: Any, wanted: str) -> None:
    """Run two rows of two documents each under the kernels ``wanted``."""
    model.set_attn_implementation(implementation(wanted, model.config, hub_kernels=True))
    body: Any = decoder_body(model)
    positions = torch.tensor([[*range(12), *range(4)], [7, 8, 9, *range(13)]])
    ids = torch.randint(5, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    with documents_apart(body, positions):
        body(input_ids=ids, position_ids=positions, use_cache=False)


@pytest.mark.prove
@pytest.mark.parametrize(
    ("name", "install"),
    [
        *((name, flash_stand_in.install) for name in ("llama", "gemma2", "gpt_oss", "mistral")),
        *((name, flash_stand_in.install_torchs_own) for name in ("llama", "mistral")),
    ],
)
def test_what_queries_attend_to_is_told_from_borders_as_from_masks(
    name: str, install: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    model, places = architectures.tiny_model(name), torch.tensor([[11, 12, 15], [0, 3, 15]])

    def weights(wanted: str) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def keep(layer: int, inputs: AttentionInputs) -> None:
            found[layer] = attention_weights(inputs, places)

        with attention_calls(model, range(len(decoder_layers(model))), keep, remedy="none"):
            hidden(model, wanted)
        return found

    expected, found = weights(without_kernels("flash", model.config)), weights("flash")
    for layer, own in expected.items():
        torch.testing.assert_close(found[layer], own, rtol=1e-4, atol=1e-5)
