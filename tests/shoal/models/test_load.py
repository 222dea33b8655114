"""Checkpoints found, checked, loaded, identified; every unusable one refused before it costs anything.

Covers: shoal.models.checkpoint_files, shoal.models.download, shoal.models.resolve.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from architectures import tiny_model as tiny_architecture
from cases import cases
from safetensors.torch import load_file, save_file
from tiny import KINDS, NUM_LAYERS, set_json, tiny_checkpoint, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoal.errors import UserError
from shoal.models import resolve
from shoal.models.anatomy import decoder_body, decoder_layers
from shoal.models.checkpoint_files import (
    check_checkpoint,
    checkpoint_bytes,
    model_fingerprint,
    read_shards,
    tokenizer_fingerprint,
    weight_files,
)
from shoal.models.load import (
    Checkpoint,
    LoadSettings,
    load_model,
    load_tokenizer,
    loaded_dtype,
    logits_from_hidden,
    num_parameters,
)
from shoal.models.resolve import DEMO_REMEDY, resolve_model

CASES = cases(__file__)
Change = Callable[[Path], object]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama checkpoint; tests copy it before they change it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("whole"), "llama")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def shard(folder: Path) -> None:
    """Split the weights into several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(weight_files(folder)) > 1


# --- loading


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_is_loaded_in_eval_mode_as_it_was_saved(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path, kind)
    model, saved = load_model(folder), tiny_model(kind).state_dict()
    assert not model.training
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert len(decoder_layers(model)) == NUM_LAYERS


def test_a_checkpoint_is_not_moved_once_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 3 deals out weights over GPUs as they are loaded; moved to the CPU, they would be gathered there."""
    moved: list[object] = []
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, *_: moved.append(model) or model)
    load_model(tiny_checkpoint(tmp_path, "llama"))
    assert not moved


@pytest.mark.parametrize(("dtype", "expected"), [("stored", torch.bfloat16), ("float32", torch.float32)])
def test_precision_is_as_stored_or_as_asked(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    assert load_model(folder, dtype=dtype).dtype == expected


def test_unknown_place_of_the_layers_is_refused() -> None:
    model = tiny_model("llama")
    del model.model.layers[0]
    with pytest.raises(UserError, match="LlamaForCausalLM: shoal does not know where this architecture keeps its"):
        decoder_layers(model)


def test_tokenizer_without_pad_token_pads_with_its_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint(tmp_path, "llama", pad_token=False))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer(["a", "abc"], padding=True)["input_ids"][0][:2] == [tokenizer.eos_token_id] * 2


def test_a_checkpoint_is_loaded_in_the_dtype_that_is_told(tmp_path: Path) -> None:
    """By the recipe, by config.json, by the text part of a composite one, by the first number with a point, in turn."""
    whole_and_half = {"a": torch.zeros(1, dtype=torch.int64), "b": torch.zeros(1, dtype=torch.float16)}
    save_file(whole_and_half, tmp_path / "model.safetensors")
    shards, config = read_shards(tmp_path), tiny_config("llama")
    assert loaded_dtype(config) == torch.float32
    assert loaded_dtype(config, shards=shards) == torch.float16
    unsaid = Checkpoint(tmp_path, config, LoadSettings(dtype="bfloat16"))
    assert (unsaid.stored_dtype, unsaid.loaded_dtype()) == (torch.float16, torch.bfloat16)
    config.dtype = torch.bfloat16
    assert loaded_dtype(config, shards=shards) == torch.bfloat16
    assert loaded_dtype(config, "float64", shards) == torch.float64
    composite = tiny_config("gemma3")
    composite.text_config.dtype = torch.bfloat16
    assert loaded_dtype(composite, shards=shards) == torch.bfloat16


# --- refusals


def test_remote_code_runs_only_with_consent(folder: Path) -> None:
    (folder / "theirs.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class TheirConfig(LlamaConfig):\n    model_type = 'theirs'\n"
        "class TheirModel(LlamaForCausalLM):\n    config_class = TheirConfig\n"
    )
    names = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    set_json(folder / "config.json", model_type="theirs", auto_map=names)
    message = "needs code that comes with the checkpoint; read the code, and if you trust it, set trust_remote_code"
    with pytest.raises(UserError, match=message):
        load_model(folder)
    assert type(load_model(folder, trust_remote_code=True)).__name__ == "TheirModel"


@pytest.mark.parametrize(("changes", "message"), CASES["weights"])
def test_weights_that_do_not_fit_are_refused_rather_than_made_up(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    set_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_model(folder)


# --- names


def test_local_path_is_used_as_it_is(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(whole)) == whole
    monkeypatch.chdir(whole.parent)
    assert resolve_model(whole.name) == Path(whole.name)


@pytest.mark.parametrize(("setting", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_unreachable_hub_is_explained_within_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, value: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"huggingface_hub.constants.{setting}", value)
    start = time.monotonic()
    message = r"model 'org/model': no such folder, and the Hub cannot be reached .* demo:smol"
    with pytest.raises(UserError, match=message):
        resolve_model("org/model")
    assert time.monotonic() - start < 10


# --- identity


def test_fingerprint_ignores_place_sharding_and_resaving(whole: Path, folder: Path, tmp_path: Path) -> None:
    expected = model_fingerprint(whole)
    assert model_fingerprint(folder) == expected
    load_model(folder).save_pretrained(tmp_path / "again")
    load_tokenizer(folder).save_pretrained(tmp_path / "again")
    assert model_fingerprint(tmp_path / "again") == expected
    set_json(folder / "config.json", _name_or_path="/elsewhere", transformers_version="0")
    (folder / "README.md").write_text("changed")
    assert model_fingerprint(folder) == expected
    size = checkpoint_bytes(folder)
    shard(folder)
    assert model_fingerprint(folder) == expected
    assert checkpoint_bytes(folder) == pytest.approx(size, rel=0.1)
    save_file({"x": torch.zeros(10**5)}, folder / "consolidated.safetensors")
    assert model_fingerprint(folder) == expected
    assert checkpoint_bytes(folder) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json", "chat_template.json"])
def test_fingerprint_sees_what_makes_inputs_of_images(folder: Path, name: str) -> None:
    fingerprints = {model_fingerprint(folder)}
    for content in ('{"image_mean": 0.5}', '{"image_mean": 0.25}'):
        (folder / name).write_text(content)
        fingerprints.add(model_fingerprint(folder))
    assert len(fingerprints) == 3


@pytest.mark.slow
def test_fingerprint_sees_a_change_of_any_single_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors, seen = load_file(file), {model_fingerprint(folder)}
    for name in tensors:
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 1e-3
        save_file({**tensors, name: changed}, file, metadata={"format": "pt"})
        seen.add(model_fingerprint(folder))
    assert len(seen) == len(tensors) + 1


def add_a_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        add_a_token,
        lambda folder: set_json(folder / "tokenizer_config.json", add_bos_token=True),
        lambda folder: set_json(folder / "tokenizer_config.json", eos_token="<pad>"),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    ],
)
def test_fingerprint_sees_a_change_of_the_tokenizer(folder: Path, change: Change) -> None:
    tokenizer, model = tokenizer_fingerprint(folder), model_fingerprint(folder)
    change(folder)
    assert tokenizer_fingerprint(folder) != tokenizer
    assert model_fingerprint(folder) != model


# --- logits


OWN_WAYS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 0.5},
    "inkling_text": {"unpadded_vocab_size": 90},
}


@pytest.mark.parametrize("kind", [*KINDS, *OWN_WAYS])
def test_logits_from_hidden_states_are_the_models_own(kind: str) -> None:
    model = tiny_architecture(kind, **OWN_WAYS[kind]) if kind in OWN_WAYS else tiny_model(kind)
    input_ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        hidden = decoder_body(model)(input_ids=input_ids, use_cache=False).last_hidden_state
        head: Any = model.get_output_embeddings()
        found, expected = logits_from_hidden(model)(hidden, head), model(input_ids=input_ids, use_cache=False).logits
        assert torch.equal(found, expected)
        if kind in OWN_WAYS:
            assert found.shape != head(hidden).shape or not torch.allclose(found, head(hidden)), "nothing is changed"


# --- the demo model


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The real demo model in the user's own cache, converted there if no run before did it."""
    if resolve.importlib.util.find_spec(resolve.DEMO_MODELS["smollm2-135m"][0]) is None:
        pytest.skip(f"the demo model is not installed; run: {DEMO_REMEDY}")
    return resolve_model("demo:smollm2-135m")


@pytest.mark.prove
def test_demo_model_is_a_plain_checkpoint_that_speaks_english(demo_folder: Path) -> None:
    check_checkpoint(demo_folder)
    model, tokenizer = load_model(demo_folder, dtype="bfloat16"), load_tokenizer(demo_folder)
    assert len(decoder_layers(model)) == 30
    assert num_parameters(model) == 134_515_008
    assert tokenizer.chat_template
    input_ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = model(input_ids=input_ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


@pytest.fixture
def fake_demo(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo model replaced by the tiny one; the list grows by one with every conversion."""
    conversions: list[str] = []

    def convert(source: Path, folder: Path) -> None:
        conversions.append(source.name)
        shutil.copytree(whole, folder, dirs_exist_ok=True)

    package = tmp_path / "fake_demo_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.gguf").write_text("weights")
    monkeypatch.syspath_prepend(tmp_path)
    digest = "9a129038"  # of "weights"
    monkeypatch.setitem(resolve.DEMO_MODELS, "fake", ("fake_demo_package", "model.gguf", digest, {}))
    monkeypatch.setattr(resolve, "convert_gguf", convert)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return conversions


def test_demo_model_is_converted_once(fake_demo: list[str], tmp_path: Path) -> None:
    assert resolve_model("demo:fake") == resolve_model("demo:fake") == tmp_path / "cache" / "fake"
    assert fake_demo == ["model.gguf"]
    load_model(tmp_path / "cache" / "fake")


@pytest.mark.parametrize(("package", "file", "digest", "message"), CASES["packages"])
def test_missing_or_damaged_package_is_refused(
    fake_demo: list[str], monkeypatch: pytest.MonkeyPatch, package: str, file: str, digest: str, message: str
) -> None:
    monkeypatch.setitem(resolve.DEMO_MODELS, "fake", (package, file, digest, {}))
    with pytest.raises(UserError, match=message):
        resolve_model("demo:fake")
    assert fake_demo == []
