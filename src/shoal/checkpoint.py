"""Checkpoint folders as files: whole or damaged, how large, and what identifies them. Loads no model."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.errors import UserError

DOWNLOAD_AGAIN = "make or download the checkpoint again"
SAMPLE_BYTES = 64 * 1024
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
TOKENIZER_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "bos_token", "eos_token", "unk_token")
"""What of tokenizer_config.json shapes tokens; the rest are paths, versions, and the pad token, which shoal masks."""


def checkpoint_bytes(folder: Path) -> int:
    """Size of the weights on disk."""
    return sum(file.stat().st_size for file in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: those the index names, else model.safetensors. Others may lie beside them.

    Raises:
        UserError: neither is there, or the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: is damaged ({error!r}); {DOWNLOAD_AGAIN}") from error
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    pickled = [name for name in others if not name.endswith(".safetensors")]
    if not others:
        found = "no weights"
    elif pickled == others:
        found = f"only pickled weights ({', '.join(pickled)}), which shoal never opens"
    else:
        found = f"neither model.safetensors nor model.safetensors.index.json, only {', '.join(others)}"
    raise UserError(f"{folder}: has {found}; give a complete checkpoint in safetensors")


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder whose weights are absent, pickled or damaged, in milliseconds and before anything loads them.

    A safetensors file says in its header how long it must be, so that a torn file shows without reading its data.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: has no config.json, so it is no Hugging Face checkpoint; give the folder that holds one"
        )
    for file in weight_files(folder):
        _safetensors_header(file)


def model_fingerprint(folder: Path) -> str:
    """Content hash of configuration, tokenizer and weights, whatever the folder and however the weights are split.

    A tensor of up to 256 KiB is hashed whole, a larger one by four evenly spaced blocks of 64 KiB: seconds for any
    size, and a training step, a requantisation or an edit of a single tensor all show.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for volatile in ("_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(tokenizer_fingerprint(folder).encode())
    samples = {name: sample for file in weight_files(folder) for name, sample in _samples(file)}
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:16]


def _samples(file: Path) -> Iterator[tuple[str, bytes]]:
    """Name and hash of every tensor in a safetensors file."""
    header, data_start = _safetensors_header(file)
    with file.open("rb") as handle:
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
            if end - start > 4 * SAMPLE_BYTES:
                offsets = [start + (end - SAMPLE_BYTES - start) * quarter // 3 for quarter in range(4)]
            else:
                offsets = range(start, end, SAMPLE_BYTES)
            for offset in offsets:
                handle.seek(data_start + offset)
                digest.update(handle.read(min(SAMPLE_BYTES, end - offset)))
            yield name, digest.digest()


def tokenizer_fingerprint(folder: Path) -> str:
    """Content hash of the tokenizer's vocabulary, rules and chat template."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    settings = _json_or_empty(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    tokens = {
        key: value["content"] if isinstance(value, dict) else value
        for key in TOKENIZER_SETTINGS
        if (value := settings.get(key))
    }
    digest.update(json.dumps([tokens, chat], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _json_or_empty(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file}: is not valid JSON ({error}); {DOWNLOAD_AGAIN}") from error


def _safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """Tensor name -> dtype, shape and data_offsets, and where the data start.

    Raises:
        UserError: no such file, or another size than the header says.
    """
    if not file.is_file():
        raise UserError(f"{file}: is named by the checkpoint's index but missing; download the checkpoint again")
    size = file.stat().st_size
    wanted = "a valid header"
    with file.open("rb") as handle:
        prefix = handle.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size + 1
        try:
            header: Any = json.loads(handle.read(header_bytes)) if header_bytes <= size else None
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            expected = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            pass
        else:
            if size == expected:
                return tensors, 8 + header_bytes
            wanted = f"{expected:,} bytes"
    raise UserError(f"{file}: is damaged: {size:,} bytes where {wanted} should be; {DOWNLOAD_AGAIN}")
