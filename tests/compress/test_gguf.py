"""GGUF files: what llama.cpp's converter writes is the checkpoint, is run by llama.cpp as transformers runs it, or is
refused. What llama.cpp takes a cut model for: every rule accepts an aligned cut and refuses one that shifts the layers.

Covers: shoal.launch.verbs.report.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from cases import cases
from run_gguf import llama_cpp_greedy, save_tokenizer
from tiny import tiny_checkpoint, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.compress import gguf as gguf_module
from shoal.compress.gguf import GgufProof, check_gguf, export_gguf, find_converter, misreading
from shoal.compress.surgery.config_cut import cut_config
from shoal.compress.surgery.cut_model import cut_model
from shoal.errors import UserError
from shoal.launch.verbs import prune, report
from shoal.launch.verbs.run import Run, open_run
from shoal.models.load import load_config
from shoal.recipe.recipe import parse_recipe

CASES = cases(__file__)
with_converter = pytest.mark.skipif(
    not os.environ.get(gguf_module.CONVERTER_VARIABLE)
    and importlib.util.find_spec(gguf_module.CONVERTER_PACKAGE) is None,
    reason="llama.cpp's converter is not installed",
)
with_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")

GEMMA: dict[str, Any] = {
    "sliding_window": 8,
    "sliding_window_pattern": 6,
    "num_hidden_layers": 12,
    "query_pre_attn_scalar": 8,
}


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def exported(model: PreTrainedModel, folder: Path) -> tuple[Path, GgufProof]:
    return folder / "model.gguf", export_gguf(save(model, folder), folder / "model.gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut float32 llama of four layers with its GGUF file."""
    folder = tmp_path_factory.mktemp("llama")
    path, proof = exported(cut_model(tiny_model("llama"), [1, 3]), folder)
    assert path.is_file()
    assert proof == GgufProof(num_blocks=4, num_equal=4 * 9 + 3, num_regrouped=0)
    return folder


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.prove
@with_converter
def test_file_holds_the_layers_and_the_precision_of_the_checkpoint(llama: Path) -> None:
    reader = gguf.GGUFReader(llama / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.block_count"] == 4
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert len({tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}) == 4


@pytest.mark.prove
@with_converter
def test_bfloat16_and_stacked_experts_keep_every_number(tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 2, "num_local_experts": 4, "sliding_window": None, "tie_word_embeddings": True}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING["mixtral"].from_dict({"vocab_size": 272, **shape, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    path, proof = exported(model, tmp_path)
    assert proof == GgufProof(num_blocks=2, num_equal=2 * 7 + 2, num_regrouped=2 * 4 * 3)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (types["blk.1.ffn_up_exps.weight"], types["blk.1.attn_norm.weight"]) == ("BF16", "F32")
    tensors_of(tmp_path)["blk.1.ffn_up_exps.weight"][2, 3, 5] ^= 1  # the lowest bit of one expert's number
    with pytest.raises(UserError, match=r"differs from .* in layer 1; use another"):
        check_gguf(path, tmp_path)


# --- run by llama.cpp -----------------------------------------------------------------------------------------------


def distance(model: PreTrainedModel, path: Path, num_tokens: int = 4) -> tuple[float, bool]:
    """Largest difference of log-probability behind a prompt of three windows; whether the greedy texts are equal."""
    prompt = [1, *range(5, 200, 8)]
    ids, found_NV = llama_cpp_greedy(path, prompt, num_tokens)
    with torch.inference_mode():
        logits_SV = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
    expected_NV = torch.log_softmax(logits_SV[len(prompt) - 1 : -1], -1)
    return (expected_NV - found_NV).abs().max().item(), ids == expected_NV.argmax(-1).tolist()


@pytest.mark.slow
@with_converter
@with_llama_cpp
def test_llama_cpp_gives_the_logits_of_transformers(llama: Path) -> None:
    difference, same_text = distance(AutoModelForCausalLM.from_pretrained(llama), llama / "model.gguf")
    assert difference < 1e-4
    assert same_text


@pytest.mark.prove
@with_converter
@with_llama_cpp
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_llama_cpp_runs_layers_of_fewer_heads_and_channels(kind: str, tmp_path: Path) -> None:
    """As prune.width leaves them: the heads side by side are narrower than the states."""
    sizes: Any = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = tiny_model(kind, **sizes)
    path, _ = exported(model, tmp_path)
    difference, same_text = distance(model, path)
    assert difference < 1e-4
    assert same_text


@pytest.mark.prove
@with_converter
@with_llama_cpp
def test_an_aligned_cut_runs_as_in_transformers_and_the_refused_one_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma3", **GEMMA)
    aligned = cut_model(model, range(6))
    path, proof = exported(aligned, tmp_path / "aligned")
    assert proof == GgufProof(num_blocks=6, num_equal=6 * 13 + 2, num_regrouped=0)
    difference, same_text = distance(aligned, path)
    assert difference < 0.01  # llama.cpp's GELU reads a table of float16
    assert same_text

    shifted = cut_model(model, [0, *range(7, 12)])
    with pytest.raises(UserError, match=r"layer 4 of this student for a sliding-window layer, but it is a full-"):
        exported(shifted, tmp_path / "refused")
    assert not (tmp_path / "refused" / "model.gguf").exists()
    monkeypatch.setattr(gguf_module, "misreading", lambda _: None)
    path, _ = exported(shifted, tmp_path / "shifted")
    assert distance(shifted, path)[0] > 0.1


# --- reading back ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "copied")


def tensors_of(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "model.gguf", "r+").tensors}


@pytest.mark.slow
@with_converter
def test_a_changed_number_a_swapped_layer_and_a_missing_one_are_found(copied: Path) -> None:
    assert check_gguf(copied / "model.gguf", copied).num_equal == 39
    tensors = tensors_of(copied)
    number = tensors["blk.2.ffn_up.weight"][3, 5]
    tensors["blk.2.ffn_up.weight"][3, 5] = number * (1 + 2**-20)
    with pytest.raises(UserError, match=r"differs from .* in layer 2; use another"):
        check_gguf(copied / "model.gguf", copied)
    tensors["blk.2.ffn_up.weight"][3, 5] = number
    maps = tensors["blk.0.ffn_up.weight"], tensors["blk.1.ffn_up.weight"]
    first, second = (one.copy() for one in maps)
    maps[0][:], maps[1][:] = second, first
    with pytest.raises(UserError, match=r"differs from .* in layer 0, layer 1; use another"):
        check_gguf(copied / "model.gguf", copied)
    save(cut_model(tiny_model("llama"), [1]), copied)
    with pytest.raises(UserError, match=r"has 4 blocks, but the model has 5 layers"):
        check_gguf(copied / "model.gguf", copied)


# --- refusals -------------------------------------------------------------------------------------------------------


def fake_converter(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    folder.mkdir()
    (folder / gguf_module.CONVERTER).write_text(f"import os, sys\n{code}\n")
    monkeypatch.setenv(gguf_module.CONVERTER_VARIABLE, str(folder))


@pytest.mark.slow
def test_converter_is_found_in_a_checkout_or_the_remedy_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_converter(tmp_path / "llama.cpp", monkeypatch, "")
    assert find_converter() == tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    monkeypatch.setenv(gguf_module.CONVERTER_VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"SHOAL_LLAMA_CPP=.*elsewhere: has no convert_hf_to_gguf.py; set it to a"):
        find_converter()
    monkeypatch.delenv(gguf_module.CONVERTER_VARIABLE)
    monkeypatch.setattr(gguf_module, "CONVERTER_PACKAGE", "no_such_package")
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    packages = " ".join(f"'{package}'" for package in extras["gguf"])
    with pytest.raises(UserError, match=re.escape(f"pip install {packages}, or set SHOAL_LLAMA_CPP to")):
        find_converter()


@pytest.mark.slow
def test_converter_runs_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = tiny_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    fake_converter(tmp_path / "asking", monkeypatch, "sys.exit('offline=' + os.environ['HF_HUB_OFFLINE'])")
    with pytest.raises(UserError, match=r"offline=1"):
        export_gguf(folder, tmp_path / "model.gguf")


@pytest.mark.slow
def test_code_of_a_tokenizer_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    tokenizer.save_pretrained(folder)
    fake_converter(tmp_path / "never", monkeypatch, "sys.exit('was run')")
    with pytest.raises(UserError, match=r"tokenizer_config.json: names code that comes with the checkpoint \(auto_map"):
        export_gguf(folder, tmp_path / "model.gguf")


# --- in a run -------------------------------------------------------------------------------------------------------


def run_of(teacher: Path, folder: Path, **settings: Any) -> Run:
    raw = {"model": str(teacher), "run_dir": str(folder), "prune": {"drop": [1, 3]}, "export": {"gguf": True}}
    return open_run(parse_recipe({**raw, **settings}))


@pytest.mark.prove
@with_converter
def test_a_run_writes_its_file_once_and_again_for_another_student(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="shoal")
    teacher = tiny_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    save_tokenizer(teacher)
    run = run_of(teacher, tmp_path / "run")
    prune.prune(run)
    report.export_gguf(run)
    folder = tmp_path / "run" / "gguf"
    assert sorted(file.name for file in folder.iterdir()) == ["gguf.json", "llama-pruned.gguf"]
    assert gguf_module.Gguf.load(folder / "gguf.json").proof == GgufProof(4, 39, 0)
    assert "4 blocks, 39 tensors equal" in caplog.text
    written = folder.stat().st_ino
    report.export_gguf(run)
    assert folder.stat().st_ino == written

    def convert(source: Path, path: Path) -> GgufProof:
        assert source == tmp_path / "run" / "distilled"
        path.touch()
        return GgufProof(4, 39, 0)

    monkeypatch.setattr(gguf_module, "export_gguf", convert)
    tiny_model("llama", seed=1, num_hidden_layers=4).save_pretrained(tmp_path / "run" / "distilled")
    report.export_gguf(run)
    assert sorted(file.name for file in folder.iterdir()) == ["gguf.json", "llama-distilled.gguf"]
    assert "gguf: gguf.json is out of date (model is" in caplog.text


@pytest.mark.slow
def test_a_cut_that_llama_cpp_would_misread_is_refused_before_it_is_made(tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, "gemma3", **GEMMA)
    run = run_of(teacher, tmp_path / "run")
    config = load_config(teacher)
    assert misreading(config) is None
    with pytest.raises(UserError, match=r"GGUF: Gemma3ForCausalLM: llama.cpp takes layer 3 of this student"):
        prune.prune(run)
    assert not (tmp_path / "run" / "student").exists()


# --- what llama.cpp counts ------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}


def config_of(model_type: str, num_layers: int, **settings: Any) -> PreTrainedConfig:
    family = CONFIG_MAPPING[model_type]
    known = family.default_config_fields().keys() | family.attribute_map.keys()
    shape = {key: value for key, value in SHAPE.items() if key in known}
    return family(**{**shape, "num_hidden_layers": num_layers, **settings})


def without(num_layers: int, *drop: int) -> list[int]:
    return [layer for layer in range(num_layers) if layer not in drop]


@pytest.mark.parametrize(
    ("model_type", "num_layers", "settings", "accepted", "refused", "says"),
    CASES["cuts"],
    ids=[f"{case[0]}-{case[1]}" for case in CASES["cuts"]],
)
def test_an_aligned_cut_is_accepted_and_a_misaligned_one_refused(
    model_type: str, num_layers: int, settings: dict[str, Any], accepted: Any, refused: Any, says: str
) -> None:
    config = config_of(model_type, num_layers, **settings)
    assert misreading(cut_config(config, without(num_layers, *accepted))) is None
    reason = misreading(cut_config(config, without(num_layers, *refused)))
    assert reason is not None
    assert reason.startswith(f"{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}: ")
    assert re.search(says, reason), reason


def test_exaone4_with_a_window_is_read_right_only_at_its_full_depth() -> None:
    config = config_of("exaone4", 64)
    assert misreading(config) is None
    reason = misreading(cut_config(config, without(64, 0, 1, 2, 3)))
    assert reason is not None
    assert "sliding window only for 64 layers; with 60" in reason
    plain = config_of("exaone4", 8, sliding_window=None, layer_types=8 * ["full_attention"])
    assert misreading(cut_config(plain, without(8, 3))) is None


def test_experts_are_counted_from_where_llama_cpp_counts_them() -> None:
    config = config_of("llama4_text", 8, attention_chunk_size=8192, interleave_moe_layer_step=2)
    assert misreading(config) is None
    config.moe_layers = [1, 2]
    assert "layer 2 of this student for a dense layer" in (misreading(config) or "")


def test_afmoe_rotates_by_number_even_without_a_window() -> None:
    config = config_of("afmoe", 8, sliding_window=None)
    assert misreading(config) is None
    assert "layer 2 of this student" in (misreading(cut_config(config, without(8, 0))) or "")


def test_gemma3n_is_read_by_fixed_layer_numbers() -> None:
    settings = {"layer_types": 7 * (4 * ["sliding_attention"] + ["full_attention"])}
    config = config_of("gemma3n_text", 35, num_kv_shared_layers=15, **settings)
    assert misreading(config) is None
    config.num_kv_shared_layers = 14
    assert "this student has 21" in (misreading(config) or "")


def test_the_text_part_decides_in_a_multimodal_model() -> None:
    text = config_of("gemma3_text", 12, query_pre_attn_scalar=16).to_dict()
    config = CONFIG_MAPPING["gemma3"].from_dict({"text_config": text})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    assert misreading(config) is None
    assert "layer 4 of this student" in (misreading(cut_config(config, without(12, 0))) or "")


def test_a_family_without_a_pattern_is_cut_anywhere() -> None:
    assert misreading(config_of("llama", 5)) is None


# --- against the sources of llama.cpp, where they are installed -----------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> Path:
    try:
        return find_converter().parent
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("file", "says"), CASES["sources"])
def test_the_sources_still_assume_what_the_rules_say(sources: Path, file: str, says: str) -> None:
    code = sources / "src" / "models" / f"{file}.cpp"
    if not code.is_file():
        pytest.skip(f"{code} is not there")
    assert says in code.read_text(encoding="utf-8")
