"""Tensors move from file to file by their bytes: all of them, unchanged, and never half."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.compress.surgery import shards
from shoal.compress.surgery.shards import PART, compare_shards, new_shards, write_shards
from shoal.errors import UserError
from shoal.models.checkpoint_files import INDEX_FILE, read_header, read_shards

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def hashes(folder: Path) -> dict[str, str]:
    """Of every tensor's bytes, read by the safetensors library."""
    found: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            found[name] = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files: every dtype; layers 0 to 5 in order; nothing but a layer that will go."""
    folder = tmp_path / "source"
    folder.mkdir()
    parts = [
        {f"odd.{name}": random_tensor(dtype, (3, 7)) for name, dtype in DTYPES.items()},
        {
            f"layers.{layer}.{part}": random_tensor(torch.bfloat16, (16, 9), layer)
            for layer in range(6)
            for part in "ab"
        },
        {"layers.6.a": random_tensor(torch.float32, (5,)), "layers.6.b": random_tensor(torch.float32, (2, 5))},
    ]
    files = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    for file, tensors in zip(files, parts, strict=True):
        save_file(tensors, folder / file, metadata={"format": "pt", "made_by": "a test"})
    weight_map = {name: file for file, tensors in zip(files, parts, strict=True) for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def without(folder: Path, *layers: int) -> dict[str, str]:
    names = [name for shard in read_shards(folder) for name in shard.tensors]
    return {name: f"new.{name}" for name in names if not name.startswith(tuple(f"layers.{n}." for n in layers))}


def copied(source: Path, target: Path, names: dict[str, str]) -> Path:
    target.mkdir(exist_ok=True)
    planned = new_shards(read_shards(source), names)
    write_shards(planned, target, {})
    compare_shards(planned, target, {})
    return target


def test_every_kept_tensor_keeps_its_hash_dtype_and_shape(source: Path, tmp_path: Path) -> None:
    names = without(source, 1, 4)
    target = copied(source, tmp_path / "target", names)
    before, after = hashes(source), hashes(target)
    assert after == {new: before[old] for old, new in names.items()}
    tensors = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {dtype: tensors[f"new.odd.{dtype}"].dtype for dtype in DTYPES} == DTYPES
    assert tensors["new.layers.6.b"].shape == (2, 5)


def test_files_without_a_kept_tensor_vanish_and_the_index_says_what_there_is(source: Path, tmp_path: Path) -> None:
    target = copied(source, tmp_path / "target", without(source, 6))
    assert {file.name for file in target.iterdir()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX_FILE,
    }
    index = json.loads((target / INDEX_FILE).read_text())
    headers = read_shards(target)  # refuses an index that disagrees with the files
    data = sum(tensor.end - tensor.start for shard in headers for tensor in shard.tensors.values())
    assert index["metadata"] == {"total_size": data}
    assert set(index["weight_map"]) == {name for shard in headers for name in shard.tensors}


def test_every_tensor_is_aligned_however_the_source_was_sorted(tmp_path: Path) -> None:
    tensors = {"small": ("U8", [3], 3), "large": ("F64", [2], 16), "middle": ("BF16", [5], 10)}
    header, position = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    source = tmp_path / "source"
    source.mkdir()
    data = bytes(range(position))
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    target = copied(source, tmp_path / "target", {name: name for name in tensors})
    found = read_header(target / "model.safetensors").tensors
    content = (target / "model.safetensors").read_bytes()
    for name, tensor in found.items():
        assert tensor.start % (tensor.bits // 8) == 0
        offset = header[name]["data_offsets"]
        assert content[tensor.start : tensor.end] == data[offset[0] : offset[1]]


def test_complete_files_are_not_copied_again_and_others_are(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names, target = without(source, 1), tmp_path / "target"
    first, second, third = new_shards(read_shards(source), names)
    copied(source, target, names)
    wanted = hashes(target)
    (target / second.name).rename(target / (second.name + PART))  # killed before its bytes were on the disk
    (target / third.name).write_bytes((target / third.name).read_bytes()[:-1])
    written: list[str] = []
    monkeypatch.setattr(shards, "_write", lambda shard, *rest: (written.append(shard.name), original(shard, *rest)))
    with caplog.at_level("INFO"):
        copied(source, target, names)
    assert written == [second.name, third.name]
    assert f"copy: {first.num_bytes / 1e3:.3g} kB of" in caplog.text
    assert hashes(target) == wanted
    assert not list(target.glob(f"*{PART}"))


original: Callable[..., None] = shards._write


@pytest.mark.parametrize("place", [-1, 0], ids=["last byte", "first byte"])
def test_lost_bytes_are_found(source: Path, tmp_path: Path, place: int) -> None:
    planned = new_shards(read_shards(source), without(source, 1))
    write_shards(planned, tmp_path, {})
    file = tmp_path / planned[1].name
    content = bytearray(file.read_bytes())
    content[place if place else len(planned[1].header)] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"new\.layers\.\d\.[ab] differs from layers"):
        compare_shards(planned, tmp_path, {})


def test_too_small_a_disk_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_room", lambda _: 1000)
    with pytest.raises(UserError, match=r"needs [\d.]+ kB, and 1 kB are free"):
        write_shards(new_shards(read_shards(source), without(source, 1)), tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


# --- headers


def written(folder: Path, header: dict[str, Any], num_data_bytes: int) -> Path:
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_data_bytes))
    return file


def entry(start: int, end: int, *, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(0, 4), "b": entry(6, 12)},
        {"a": entry(0, 12, dtype="F32", shape=[4])},
        {"a": entry(0, 12, shape=[-3, -4])},
        {"a": {"dtype": "U8", "shape": [12]}},
        {"a": entry(0, 11)},
    ],
)
def test_header_that_contradicts_itself_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged "):
        read_header(written(tmp_path, header, 12))
