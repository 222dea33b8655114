"""Which kernels compute attention, and that documents of a row, padding and caches are the same under all of them.

Flash kernels are a stand-in by loops in float64 (flash_stand_in.py).

Covers: shoal.models.packed_attention.
"""

from __future__ import annotations

import inspect
from typing import Any

import architectures
import flash_stand_in
import pytest
import torch
from architectures import ARCHITECTURES, census
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, StableLmConfig

from shoal import machine
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.inference.generation import write_after
from shoal.inference.scoring import score
from shoal.models import attention
from shoal.models.anatomy import decoder_body, text_config
from shoal.models.attention import choose_attention, implementation, named, without_kernels
from shoal.models.document_masks import documents_apart
from shoal.models.families import family
from shoal.models.load import load_model
from shoal.models.packed_attention import VARLEN, Documents, varlen_attention

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
IDS = torch.randint(5, 90, (2, 16), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[*range(12), *range(4)], [7, 8, 9, *range(13)]])
"""Two documents a row, one of them longer than a window; the second row begins within a document."""
INSTALL = {"installed": flash_stand_in.install, "torch's own": flash_stand_in.install_torchs_own}
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_oss", "granite_swa", "phi3")
"""Plain, normed, capped, sliding, sliding, sinks and experts, sinks, fused; all but phi3 with grouped heads."""


def switched(model: PreTrainedModel, wanted: str) -> PreTrainedModel:
    kernels = implementation(wanted, model.config, hub_kernels=True)
    assert kernels is not None
    model.set_attn_implementation(kernels)
    return model


@torch.no_grad()
def hidden(model: PreTrainedModel, ids: Tensor = IDS, positions: Tensor = POSITIONS) -> Tensor:
    body: Any = decoder_body(model)
    with documents_apart(body, positions):
        return body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state


# --- what is chosen -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which everything is installed."""
    flash_stand_in.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "card", lambda *_: machine.Card("a card", (9, 0)))


HALF = {"dtype": "bfloat16", "distill.precision": "float16"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("config", "precisions", "reason"),
    [
        (StableLmConfig(), HALF, "is not possible for stablelm, which does not pass document borders to its kernels"),
        (PreTrainedConfig(), HALF, "is not known to work for PreTrainedConfig"),
        (architectures.tiny_config("gemma4"), HALF, "is not known to work for gemma4"),
        (LlamaConfig(), HALF | {"distill.precision": "float32"}, "but distill.precision is float32"),
        (LlamaConfig(head_dim=288), HALF, "takes head sizes of a multiple of 8 up to 256, but llama has 288"),
        (LlamaConfig(head_dim=60), HALF, "a multiple of 8 up to 256, but llama has 60"),
        (LlamaConfig(hidden_size=80, num_attention_heads=4), HALF, "but llama has 20"),
    ],
)
def test_flash_is_refused_where_it_is_not_possible_and_auto_takes_sdpa(
    config: PreTrainedConfig, precisions: dict[str, str], reason: str
) -> None:
    with pytest.raises(UserError, match=rf"^attn_implementation: flash .*{reason}; set it to sdpa, or to auto"):
        choose_attention("flash", config, GPU, precisions)
    chosen = choose_attention("auto", config, GPU, precisions)
    assert (chosen.attention, reason in chosen.reason) == ("sdpa", True)


@pytest.mark.usefixtures("gpu")
def test_flash_is_taken_where_it_is_possible_and_the_reason_names_the_kernels() -> None:
    assert choose_attention("flash", LlamaConfig(), GPU, HALF).attention == "flash"
    chosen = choose_attention("auto", LlamaConfig(), GPU, HALF)
    assert (chosen.attention, chosen.reason) == ("flash", "flash_attention_2 is installed, and llama can use it")
    assert choose_attention("auto", Gemma2Config(), GPU, HALF).attention == "flash"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("config", "capability", "reason"),
    [
        (LlamaConfig(), (8, 0), ""),
        (StableLmConfig(), (8, 0), ""),  # hands on no borders, but its mask
        (
            architectures.tiny_config("gemma4_text"),
            (8, 0),
            "for gemma4_text, which computes something else under the name SDPA",
        ),
        (Gemma2Config(), (9, 0), "by torch's own kernels is not possible for gemma2, which has no SDPA"),
        (
            LlamaConfig(attention_dropout=0.1),
            (9, 0),
            "has no dropout_p in varlen, but config.json has attention_dropout",
        ),
        (LlamaConfig(head_dim=256), (8, 9), ""),
        (LlamaConfig(head_dim=224), (9, 0), ""),
        (LlamaConfig(head_dim=224), (8, 9), "has no gradients for heads of 224 numbers on this GPU"),
    ],
)
def test_torchs_own_kernels_are_taken_before_masks_where_they_serve(
    config: PreTrainedConfig, capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_stand_in.install_torchs_own(monkeypatch)
    monkeypatch.setattr(machine, "card", lambda *_: machine.Card("a card", capability))
    chosen = choose_attention("auto", config, GPU, HALF)
    assert (chosen.attention == "flash") == (not reason)
    assert (reason or f"torch has its own kernels, and {config.model_type} can use them") in chosen.reason


@pytest.mark.usefixtures("gpu")
def test_kernels_that_cannot_be_loaded_leave_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_is_installed", lambda name: name in (VARLEN, "flash_attention_2"))
    assert implementation("flash", LlamaConfig()) == "flash_attention_2"

    def broken(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(attention, "lazy_import_flash_attention", broken)
    assert (implementation("flash", LlamaConfig()), named(VARLEN)) == (VARLEN, "flash")


@pytest.mark.usefixtures("gpu")
def test_kernels_of_the_hub_are_taken_only_where_the_recipe_allows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_is_installed", lambda name: "/" in name)
    config = architectures.tiny_config("gpt_oss")
    with pytest.raises(UserError, match="flash has no kernels here: install flash-attn, or set hub_kernels: true"):
        choose_attention("flash", config, GPU, HALF)
    assert choose_attention("auto", config, GPU, HALF).attention == "eager"
    assert choose_attention("auto", config, GPU, HALF, hub_kernels=True).attention == "flash"


def test_a_cpu_has_no_flash_and_auto_is_what_the_family_has() -> None:
    with pytest.raises(UserError, match="attn_implementation: flash needs a CUDA GPU, and this device is cpu; set it"):
        choose_attention("flash", LlamaConfig(), CPU, HALF)
    assert choose_attention("auto", LlamaConfig(), CPU, HALF).attention == "sdpa"
    capped = choose_attention("auto", Gemma2Config(), CPU, HALF)
    assert capped.attention == "eager"
    assert "gemma2 has no SDPA" in capped.reason


def test_a_checkpoint_is_loaded_with_the_kernels_of_its_setting(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_stand_in.install(monkeypatch)
    loaded = load_model(teacher, attention="flash")
    assert named(str(loaded.config._attn_implementation)) == "flash"
    torch.testing.assert_close(hidden(loaded), hidden(load_model(teacher)), rtol=1e-4, atol=1e-4)


# --- documents, padding and caches --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "windows"), [("llama", {-1}), ("qwen3", {-1, 7}), ("mistral", {7}), ("phi3", {-1})])
def test_torchs_own_kernels_get_documents_and_windows_in_place_of_masks(
    name: str, windows: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = flash_stand_in.install_torchs_own(monkeypatch)
    model = architectures.tiny_model(name)
    expected = hidden(switched(model, "sdpa"))
    assert not asked
    torch.testing.assert_close(hidden(switched(model, "flash")), expected, rtol=2e-4, atol=2e-4)
    assert (len(asked), {left for left, _ in asked}) == (model.config.num_hidden_layers, windows)
    alone = hidden(model, IDS[:1, 12:], POSITIONS[:1, 12:])
    torch.testing.assert_close(hidden(model)[:1, 12:], alone, rtol=2e-4, atol=2e-4)


def test_the_stand_in_has_the_parameters_of_torchs_own_kernels() -> None:
    real, own = (inspect.signature(each).parameters for each in (varlen.varlen_attn, flash_stand_in.varlen_attn))
    assert [(p.name, p.kind, p.default) for p in own.values()] == [(p.name, p.kind, p.default) for p in real.values()]


def test_torchs_own_kernels_take_what_they_are_called_with() -> None:
    """Shapes and gradients alone: their values need a GPU."""
    with FakeTensorMode():
        query, key, value = (
            torch.randn(2, heads, 16, width, requires_grad=True) for heads, width in ((4, 8), (2, 8), (2, 4))
        )
        documents = Documents(torch.zeros(5, dtype=torch.int32), 12, 7)
        out, _ = varlen_attention(torch.nn.Identity(), query, key, value, documents, scaling=0.5)
        out.sum().backward()
    assert out.shape == (2, 16, 4, 4)
    assert [each.grad is not None and each.grad.shape == each.shape for each in (query, key, value)] == [True] * 3


@pytest.mark.parametrize("setting", ["s_aux", "softcap", "position_bias"])
def test_torchs_own_kernels_refuse_scores_that_they_do_not_know(setting: str) -> None:
    heads, documents = torch.zeros(1, 2, 4, 8), Documents(torch.tensor([0, 4], dtype=torch.int32), 4, None)
    with pytest.raises(ValueError, match=f"does not support {setting}"):
        varlen_attention(torch.nn.Identity(), heads, heads, heads, documents, **{setting: torch.ones(2)})


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_give_the_states_of_masked_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_stand_in.install(monkeypatch)
    model = architectures.tiny_model(name)
    expected = hidden(switched(model, without_kernels("flash", model.config)))
    torch.testing.assert_close(hidden(switched(model, "flash")), expected, rtol=2e-4, atol=2e-4)
    alone = hidden(model, IDS[:1, 12:], POSITIONS[:1, 12:])
    torch.testing.assert_close(hidden(model)[:1, 12:], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("llama", "installed"), ("gemma3_text", "installed"), ("gpt_oss", "installed"), ("gemma3_text", "torch's own")],
)
def test_scores_and_text_are_those_of_masked_attention(
    name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    INSTALL[kernels](monkeypatch)
    model = architectures.tiny_model(name)
    beginning = tuple(range(5, 18))  # read once for two questions; longer than a window
    requests = [
        ((*beginning, *question), continuation)
        for question in ((20, 21, 22), (30, 31), (40,))
        for continuation in ((50,), (51, 52, 53), (54, 55))
    ]
    prompts = [[5, 6, 7], list(range(5, 18)), [9]]

    def answers(wanted: str, batch_size: int) -> tuple[Any, Any]:
        decoder = Decoder(switched(model, wanted))
        texts = write_after(decoder, prompts, max_new_tokens=6, is_finished=lambda tokens: len(tokens) == 4)
        return score(decoder, requests, batch_size=batch_size), texts

    for batch_size in (1, 3):
        scores, texts = answers(without_kernels("flash", model.config), batch_size)
        found_scores, found_texts = answers("flash", batch_size)
        assert found_texts == texts
        assert [each[0] for each in found_scores] == pytest.approx([each[0] for each in scores], abs=2e-3)


@pytest.mark.prove
@pytest.mark.parametrize("name", census(ARCHITECTURES))
def test_every_family_that_torchs_own_kernels_serve_has_the_states_of_sdpa(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_stand_in.install_torchs_own(monkeypatch)
    model = architectures.tiny_model(name)
    if reason := attention._lacks(VARLEN, model.config):
        pytest.skip(reason)
    expected = hidden(switched(model, "sdpa"))
    found = hidden(switched(model, "flash"))
    assert float((found - expected).norm() / expected.norm()) < (1e-3 if model.dtype == torch.float32 else 0.1)


RIGHT_ONLY_WITH_BORDERS = ("biogpt",)
"""Make a mask of ones where none is given, after which transformers does not look for documents."""


@pytest.mark.prove
@pytest.mark.parametrize("name", census(ARCHITECTURES))
def test_every_family_that_transformers_offers_kernels_for_keeps_documents_apart_or_is_known_not_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_stand_in.install(monkeypatch)
    model = architectures.tiny_model(name)
    kind = attention._model_class(model.config)
    if kind is None or not kind._supports_flash_attn:
        pytest.skip("transformers has no flash kernels for it")
    if family(text_config(model.config).model_type).no_flash:
        if model.config.model_type in ("falcon", "gpt_neo"):
            pytest.skip("chooses its kernels where it is made")
        expected = hidden(model)
        with pytest.raises((UserError, ValueError, AssertionError)):
            torch.testing.assert_close(hidden(switched(model, "flash")), expected, rtol=1e-2, atol=1e-2)
        return
    if name.startswith("gpt2") or name == "gpt-sw3":
        model.bfloat16()  # whose linear maps are of a kind in which transformers finds no precision
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    expected = hidden(model)
    found = hidden(switched(model, "flash"))
    if name in RIGHT_ONLY_WITH_BORDERS:
        found, expected = found[:1, 12:], hidden(model, IDS[:1, 12:], POSITIONS[:1, 12:])
    assert float((found - expected).norm() / expected.norm()) < tolerance
