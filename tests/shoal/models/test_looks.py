"""What is known of a checkpoint before torch is loaded, against what transformers says afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, census
from architectures import tiny_model as tiny_architecture
from safetensors.torch import load_file, save_file
from tiny import SHAPE, set_json, tiny_checkpoint, tiny_model, tiny_moe
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

from shoal.errors import UserError
from shoal.models.checkpoint_files import check_checkpoint, read_shards
from shoal.models.load import load_model
from shoal.models.looks import chat_template, refuse_config, refuse_tokenizer, refuse_weights

LLAMA: dict[str, Any] = {"model_type": "llama", **SHAPE}


def look(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    shapes = {name: tensor.shape for shard in read_shards(folder) for name, tensor in shard.tensors.items()}
    refuse_config("model", config, trust_remote_code=False)
    refuse_weights(folder, config, shapes)


@pytest.mark.every_case
@pytest.mark.parametrize("name", census(ARCHITECTURES))
def test_every_family_passes(name: str, tmp_path: Path) -> None:
    tiny_architecture(name).save_pretrained(tmp_path, max_shard_size="40KB")
    look(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "qwen3", "gemma3"])
def test_a_checkpoint_passes_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, kind)
    look(folder)
    refuse_tokenizer(folder)
    assert "message" in (chat_template(folder) or "")
    (folder / "chat_template.jinja").unlink()
    assert chat_template(folder) == ""


def test_a_stored_copy_of_the_embeddings_and_an_end_that_was_added_pass(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    set_json(folder / "config.json", tie_word_embeddings=True)
    check_checkpoint(folder)
    set_json(folder / "tokenizer_config.json", eos_token={"content": "<é>"})
    with pytest.raises(UserError, match=r"eos_token '<é>' of tokenizer_config\.json is not in the vocabulary"):
        refuse_tokenizer(folder)
    set_json(folder / "tokenizer_config.json", added_tokens_decoder={"259": {"content": "<é>"}})
    refuse_tokenizer(folder)


def test_experts_pass(tmp_path: Path) -> None:
    tiny_moe().save_pretrained(tmp_path)
    look(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 8}, r"the weights of model\.layers\.6 are missing, and config\.json has 8 layers"),
        ({"vocab_size": 100}, "the weights do not have the shapes that config.json gives"),
        ({"num_key_value_heads": 3}, "the weights do not have the shapes"),
        ({"num_attention_heads": 8}, "the weights do not have the shapes"),
    ],
)
def test_weights_of_another_model_are_refused(changes: dict[str, Any], message: str, teacher: Path) -> None:
    with pytest.raises(UserError, match=message):
        look(teacher, **changes)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "mixtral"])
def test_a_weight_that_one_layer_lacks_is_told_as_when_it_is_loaded(kind: str, tmp_path: Path) -> None:
    folder, layer = tmp_path / kind, "model.layers.1."
    (tiny_moe() if kind == "mixtral" else tiny_model(kind)).save_pretrained(folder)
    whole = load_file(folder / "model.safetensors")
    for lost in [[name for name in whole if name.startswith(layer)][:-1], [f"{layer}self_attn.k_proj.weight"]]:
        rest = {name: tensor for name, tensor in whole.items() if name not in lost}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        if kind in ("qwen2", "gemma3", "mixtral"):  # layers of two kinds, or of other parts
            look(folder)
            continue
        for tell in (look, load_model):
            with pytest.raises(
                UserError, match=rf"{layer}.* are missing \({len(lost)} tensors in all, for the {kind} "
            ):
                tell(folder)


@pytest.mark.parametrize("changes", [{"layer_types": 5}, {"layer_types": []}])
def test_kinds_that_are_none_are_looked_at(changes: dict[str, Any], teacher: Path) -> None:
    config = {**json.loads((teacher / "config.json").read_text()), **changes}
    names = {name: tensor.shape for shard in read_shards(teacher) for name, tensor in shard.tensors.items()}
    refuse_weights(teacher, config, names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "config.json has no model_type"),
        ({"model_type": "nope"}, "does not know the architecture"),
        ({"model_type": 3}, "does not know the architecture"),
        ({"model_type": "nope", "auto_map": {"AutoConfig": "a.B"}}, "needs code that comes with the checkpoint"),
        ({"model_type": "t5"}, "t5: is not a causal language model"),
        ({"hidden_act": "nope"}, "config.json has hidden_act: nope, which transformers does not know"),
        ({"rope_parameters": {"rope_type": "magic"}}, "config.json has rope_type: magic"),
        ({"dtype": "float99"}, "config.json has dtype: float99"),
        ({"layer_types": ["full_attention"]}, "config.json has layer_types: 1 of them next to num_hidden_layers 6"),
    ],
)
def test_words_that_transformers_does_not_know_are_refused(changes: dict[str, Any], message: str) -> None:
    refuse_config("model", LLAMA, trust_remote_code=False)
    with pytest.raises(UserError, match=message):
        refuse_config("model", {**LLAMA, **changes}, trust_remote_code=False)


def test_code_that_is_trusted_may_be_of_any_architecture() -> None:
    refuse_config("model", {"model_type": "nope", "auto_map": {"AutoConfig": "a.B"}}, trust_remote_code=True)


def test_model_types_are_told_apart_as_by_transformers() -> None:
    """By the names of their classes: to import those of all 500 would take a minute."""
    mappings: list[Any] = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    refused, write = set[str](), set[str]()
    for kind, family in CONFIG_MAPPING_NAMES.items():
        try:
            refuse_config("model", {"model_type": kind}, trust_remote_code=False)
        except UserError:
            refused.add(kind)
        if any(mapping._reverse_config_mapping.get(family) in mapping._model_mapping for mapping in mappings):
            write.add(kind)
    assert not refused & write
    assert {"t5", "align"} <= refused


def test_every_word_of_transformers_and_torch_passes() -> None:
    dtypes = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    words = {"hidden_act": ACT2CLS, "dtype": [*dtypes, *(f"torch.{name}" for name in dtypes), "auto"]}
    for key, known in words.items():
        for word in known:
            refuse_config("model", {**LLAMA, key: word}, trust_remote_code=False)
    rope = dict.fromkeys(("factor", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor"), 1.0)
    for kind in ROPE_INIT_FUNCTIONS:
        refuse_config("model", {**LLAMA, "rope_parameters": {**rope, "rope_type": kind}}, trust_remote_code=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.json": '{"model": '}, "no usable tokenizer .JSONDecodeError: tokenizer.json is missing or dam"),
        ({"tokenizer.json": '{"model": {"type": "Nonsense"}}'}, "no usable tokenizer .*a model of type 'Nonsense'"),
        ({"tokenizer.json": None}, "no usable tokenizer .FileNotFoundError"),
    ],
)
def test_a_damaged_tokenizer_is_refused_if_it_is_all_there_is(
    changes: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    for name, text in changes.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        refuse_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"of another library")
    refuse_tokenizer(folder)
