"""LoRA adapters as a model: merged as their formula says, or refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_moe, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from shoal.errors import UserError
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_model
from shoal.models.resolve import resolve_model

CASES = cases(__file__)

PROJECTIONS = ["q_proj", "v_proj"]
PEFT_CHATTER = [
    "ignore::FutureWarning",
    "ignore:.*tie_word_embeddings",
    "ignore:.*save_embedding_layers",
    "ignore:.*lora_bias",
    "ignore:.*LoRA tensor",
]
pytestmark = [pytest.mark.filterwarnings(chatter) for chatter in PEFT_CHATTER]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded(folder: Path, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def trained(base: Path, folder: Path, config: Any, *, dtype: str = "float32") -> Path:
    """An adapter of ``base`` in ``folder``, with every trainable number moved as training would."""
    adapted = get_peft_model(loaded(base, dtype), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **({"r": 4, "lora_alpha": 12, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"} | settings)
    )


def logits(model: Any) -> Tensor:
    input_ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model.eval()(input_ids=input_ids, use_cache=False).logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit(folder: Path, **settings: Any) -> None:
    """Change the adapter's settings; None takes one out."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "llama")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return trained(base, tmp_path / "adapter", lora())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_weights_are_the_formula_rounded_once(tmp_path: Path, dtype: str, rank_stabilised: bool) -> None:
    """W + scale * B A in float64, scale = alpha / r, or alpha / sqrt(r)."""
    base = tiny_checkpoint(tmp_path, "qwen3", dtype=getattr(torch, dtype))
    config = lora(use_rslora=rank_stabilised, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3})
    folder = resolve_model(str(trained(base, tmp_path / "adapter", config)))
    low_rank = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = tensors_of(base), tensors_of(folder)
    assert before.keys() == after.keys()
    changed = 0
    for name, old in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora"
        if f"{stem}_A.weight" not in low_rank:
            assert torch.equal(after[name], old), name
            continue
        a, b = (low_rank[f"{stem}_{side}.weight"].double() for side in "AB")
        rank, alpha = (2, 3) if "v_proj" in name else (4, 12)
        exact = old.double() + alpha / (rank**0.5 if rank_stabilised else rank) * b @ a
        assert after[name].dtype == old.dtype
        if dtype == "float32":
            torch.testing.assert_close(after[name].double(), exact, rtol=1e-6, atol=1e-7)
        else:  # equal to the correctly rounded sum but where float32 falls on the other side of a tie
            assert (after[name] == exact.to(old.dtype)).float().mean() > 0.999
        changed += 1
    assert changed == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"use_dora": True}),
        ("qwen2", {"bias": "all"}),
        ("qwen2", {"bias": "lora_only"}),
        ("qwen2", {"lora_bias": True}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama_tied", {"modules_to_save": ["lm_head"]}),
        ("llama_tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama", {"trainable_token_indices": [1, 2, 255]}),
        ("llama_tied", {"trainable_token_indices": [1, 2, 255]}),
        ("gemma3", {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
        ("gemma3", {"layers_to_transform": [1, 4]}),
        ("moe", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
    ids=str,
)
def test_merged_model_is_base_and_adapter_side_by_side(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    base = tiny_checkpoint(tmp_path, "llama" if kind == "moe" else kind)
    if kind == "moe":
        torch.manual_seed(0)
        tiny_moe().save_pretrained(base)
    adapter = trained(base, tmp_path / "adapter", lora(**settings))
    expected = logits(PeftModel.from_pretrained(loaded(base), adapter))
    merged = loaded(resolve_model(str(adapter)))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert (logits(loaded(base)) - expected).abs().max() > 0.01


@pytest.mark.slow
def test_the_result_is_a_plain_checkpoint_with_the_bases_settings(tmp_path: Path, cache: Path) -> None:
    base = tiny_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    (base / "LICENSE").write_text("a licence")
    (base / "preprocessor_config.json").write_text("{}")
    folder = resolve_model(str(trained(base, tmp_path / "adapter", lora())))
    assert folder.is_relative_to(cache)
    assert not any("adapter" in file.name for file in folder.iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config == json.loads((base / "config.json").read_text())
    assert (folder / "LICENSE").read_text() == "a licence"
    assert (folder / "preprocessor_config.json").read_text() == "{}"
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert load_model(folder).dtype == torch.bfloat16
    assert sorted(file.name for file in folder.parent.iterdir()) == sorted([f".{folder.name}.lock", folder.name])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["base", "adapter", "settings", "tokenizer"])
def test_another_base_adapter_or_tokenizer_is_another_model(base: Path, adapter: Path, part: str) -> None:
    first = resolve_model(str(adapter))
    if part == "base":
        tiny_checkpoint(base.parent, "llama", seed=7)
    elif part == "adapter":
        file = adapter / "adapter_model.safetensors"
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    elif part == "settings":
        edit(adapter, lora_alpha=24)
    else:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(adapter)
    second = resolve_model(str(adapter))
    assert second != first
    assert model_fingerprint(second) != model_fingerprint(first)


# --- refused ------------------------------------------------------------------------------------------------------


def refused(adapter: Path, message: str, cache: Path) -> None:
    with pytest.raises(UserError, match=message):
        resolve_model(str(adapter))
    assert not any((cache / "adapters").glob("[!.]*"))


@pytest.mark.parametrize(("settings", "message"), CASES)
def test_settings_that_cannot_be_merged_are_refused(
    adapter: Path, settings: dict[str, Any], message: str, cache: Path
) -> None:
    edit(adapter, **settings)
    refused(adapter, message, cache)


@pytest.mark.slow
def test_a_method_that_cannot_be_merged_is_refused(base: Path, tmp_path: Path, cache: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(trained(base, tmp_path / "other", config), "cannot be merged into its base", cache)


def test_a_quantised_base_is_refused(adapter: Path, base: Path, cache: Path) -> None:
    file = base / "config.json"
    config = json.loads(file.read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    file.write_text(json.dumps(config))
    refused(
        adapter,
        r"its base is quantised, and merging would round the adapter away; name the full-precision model",
        cache,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_lora_on_one_of_two_tied_embeddings_is_refused(tmp_path: Path, target: str, cache: Path) -> None:
    """peft merges it into both with a warning only."""
    base = tiny_checkpoint(tmp_path, "llama_tied")
    adapter = trained(base, tmp_path / "adapter", lora(target_modules=[*PROJECTIONS, target]))
    refused(adapter, r"merged, it gives other logits than base and adapter side by side \(by up to .*tied embed", cache)
