"""Copy tensors from safetensors files to safetensors files by their bytes, without a model and without reading them.

One new file per source file that keeps anything. Neighbouring tensors move in one call inside the kernel, so memory
stays at a header whatever the size of a shard. Numbers, dtypes and quantised layouts cannot change, because nobody
looks at them. Tensors that shall be others are written over their copies.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shoal.atomic_files import fingerprint, flush, write_json
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.models.checkpoint_files import INDEX_FILE, SINGLE_FILE, Shard, StoredTensor, read_header, sampled_ranges
from shoal.progress import BYTES, progress

log = logging.getLogger(__name__)

ALIGNMENT = 8
"""Bytes of which the start of a file's data is a multiple, so that a memory map can be used as it is."""
STEP_BYTES = 64 * 2**20
"""Bytes moved by one call; progress is shown this often."""
PART = ".part"
"""Suffix of a file that is not complete on the disk yet."""


@dataclass(frozen=True)
class NewShard:
    """A file to be written: a header, then byte runs of one source file."""

    name: str
    source: Shard
    tensors: dict[str, str]
    """Name in the source -> name here, in the order of the bytes."""
    header: bytes
    """Length field, JSON and padding."""
    runs: tuple[tuple[int, int], ...]
    """Pairs (first byte, one past the last byte) in the source file."""

    @property
    def num_data_bytes(self) -> int:
        """Size of the tensors."""
        return sum(end - start for start, end in self.runs)

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + self.num_data_bytes


def new_shards(shards: Sequence[Shard], names: Mapping[str, str]) -> list[NewShard]:
    """The files that hold the tensors ``names`` (stored name -> new name) of ``shards``; none of them is empty."""
    kept = [(shard, _aligned(shard, names)) for shard in shards]
    kept = [(shard, tensors) for shard, tensors in kept if tensors]
    file_names = (
        [SINGLE_FILE]
        if len(kept) == 1
        else [f"model-{number:05d}-of-{len(kept):05d}.safetensors" for number in range(1, len(kept) + 1)]
    )
    return [
        NewShard(
            file_name, shard, {name: names[name] for name in tensors}, _header(shard, tensors, names), _runs(tensors)
        )
        for file_name, (shard, tensors) in zip(file_names, kept, strict=True)
    ]


def shards_fingerprint(shards: Sequence[NewShard]) -> str:
    """Fingerprint of the files to be written: headers, byte runs, and size and time of change of every source file."""
    return fingerprint([[shard.name, shard.header.hex(), shard.runs, _identity(shard.source.file)] for shard in shards])


class Changed(Protocol):
    """Bytes of tensors that are not those of the source, by their names in the new files; of the same size."""

    def __contains__(self, name: object, /) -> bool: ...
    def __getitem__(self, name: str, /) -> memoryview: ...


def write_shards(shards: Sequence[NewShard], folder: Path, changed: Changed) -> None:
    """Write ``shards`` and their index to ``folder``; files that an interrupted call completed there are kept.

    A file gets its name when its bytes are on the disk, so that a name means a complete file even after a power cut.
    That flush runs beside the copying of the next file.

    Raises:
        UserError: not enough space, before anything is written; a source file that shrank meanwhile.
    """
    missing = [shard for shard in shards if not _is_complete(shard, folder)]
    total, rest = (sum(shard.num_bytes for shard in some) for some in (shards, missing))
    if missing != list(shards):
        log.info("copy: %s of %s were copied before", bytes_text(total - rest), bytes_text(total))
    if total > (room := _room(folder)):  # of all shards: what is there already counts as room too
        raise UserError(
            f"{folder.parent}: the disk is full: the student needs {bytes_text(total)}, and {bytes_text(room)} are "
            "free; free some space or set run_dir to another disk, then run the same command again"
        )
    with progress("prune: copying", total=rest, unit=BYTES) as step, ThreadPoolExecutor(1) as flusher:
        flushes: list[Future[None]] = []
        for shard in missing:
            _write(shard, folder / (shard.name + PART), step)
            _write_over(shard, folder / (shard.name + PART), changed)
            flushes.append(flusher.submit(_complete, folder / shard.name))
        for flush in flushes:
            flush.result()
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in shard.tensors.values()}
        size = {"total_size": sum(shard.num_data_bytes for shard in shards)}
        write_json(folder / INDEX_FILE, {"metadata": size, "weight_map": dict(sorted(weight_map.items()))})


def compare_shards(shards: Sequence[NewShard], folder: Path, changed: Changed) -> None:
    """Read the written files back: headers whole, and of every tensor the bytes that a fingerprint samples.

    Raises:
        UserError: a file is not what it should be.
    """
    for shard in shards:
        written = read_header(folder / shard.name)
        with shard.source.file.open("rb") as source, written.file.open("rb") as target:
            for old_name, new_name in shard.tensors.items():
                old, new = shard.source.tensors[old_name], written.tensors.get(new_name)
                if new is None or not (
                    _holds(new, changed[new_name], target.fileno())
                    if new_name in changed
                    else _same(old, new, source.fileno(), target.fileno())
                ):
                    raise UserError(
                        f"{written.file}: {new_name} differs from {old_name} in {shard.source.file}; the disk lost "
                        "bytes, or the source changed during the copy: run the same command again"
                    )


def _aligned(shard: Shard, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The kept tensors in an order in which each starts at a multiple of its number's size: wide numbers first.

    The usual writers store them so already; then the order stays and neighbours stay neighbours.
    """
    kept = [name for name in shard.tensors if name in names]  # in the order of their bytes; sorted() keeps equals so
    return {name: shard.tensors[name] for name in sorted(kept, key=lambda name: -shard.tensors[name].bits)}


def _header(shard: Shard, tensors: Mapping[str, StoredTensor], names: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {**shard.metadata, "format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        size = tensor.end - tensor.start
        header[names[name]] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)  # the format allows spaces behind the JSON
    return struct.pack("<Q", len(text)) + text


def _runs(tensors: Mapping[str, StoredTensor]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for tensor in tensors.values():
        if runs and runs[-1][1] == tensor.start:
            runs[-1] = (runs[-1][0], tensor.end)
        else:
            runs.append((tensor.start, tensor.end))
    return tuple(runs)


def _identity(file: Path) -> list[object]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def _is_complete(shard: NewShard, folder: Path) -> bool:
    file = folder / shard.name
    if not file.is_file() or file.stat().st_size != shard.num_bytes:
        return False
    with file.open("rb") as handle:
        return handle.read(len(shard.header)) == shard.header


def _write(shard: NewShard, target: Path, advance: Callable[[int], object]) -> None:
    with shard.source.file.open("rb") as source, target.open("wb") as handle:
        handle.write(shard.header)
        handle.flush()
        advance(len(shard.header))
        for start, end in shard.runs:
            while start < end:
                moved = os.sendfile(handle.fileno(), source.fileno(), start, min(end - start, STEP_BYTES))
                if not moved:
                    raise UserError(
                        f"{shard.source.file}: ends at byte {start:,}, but its header needs {end:,}: it changed "
                        "during the copy; create or download it again"
                    )
                advance(moved)
                start += moved


def _write_over(shard: NewShard, target: Path, changed: Changed) -> None:
    """Put the changed tensors in the places of their copies."""
    if not any(name in changed for name in shard.tensors.values()):
        return
    with target.open("r+b") as handle:
        for name, place in read_header(target).tensors.items():
            if name in changed:
                data = changed[name]
                assert len(data) == place.end - place.start, f"{name}: has another size than its place"
                handle.seek(place.start)
                handle.write(data)


def _complete(file: Path) -> None:
    """Flush the file to the disk, then give it its name."""
    part = file.with_name(file.name + PART)
    flush(part)
    part.rename(file)


def _same(old: StoredTensor, new: StoredTensor, source: int, target: int) -> bool:
    if (old.dtype, old.shape, old.end - old.start) != (new.dtype, new.shape, new.end - new.start):
        return False
    shift = new.start - old.start
    return all(
        os.pread(source, size, offset) == os.pread(target, size, offset + shift)
        for offset, size in sampled_ranges(old.start, old.end)
    )


def _holds(place: StoredTensor, data: memoryview, file: int) -> bool:
    return len(data) == place.end - place.start and all(
        os.pread(file, size, offset) == data[offset - place.start : offset - place.start + size]
        for offset, size in sampled_ranges(place.start, place.end)
    )


def _room(folder: Path) -> int:
    """Bytes that ``folder`` may hold in all: what is free, and what its files take."""
    return shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.iterdir())
