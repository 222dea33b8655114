"""Where hidden states wait for their next layer: in memory, or in a file where they are more than fits there."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.errors import DISK_FULL, UserError

from ..surgery.changed_tensors import as_bytes


class Kept(Protocol):
    """A tensor that was put away."""

    def load(self) -> Tensor:
        """The tensor, on its device."""
        ...


def read_into(file: int, data: memoryview, start: int) -> bool:
    """Fill ``data`` from an open file; whether there was as much."""
    while data:
        count = os.preadv(file, [data], start)
        if count == 0:
            return False
        data, start = data[count:], start + count
    return True


@dataclass(frozen=True)
class InMemory:
    """A tensor that stays where it is."""

    tensor: Tensor

    def load(self) -> Tensor:
        return self.tensor


class StateStore:
    """Keeps tensors in memory."""

    def keep(self, tensor: Tensor) -> Kept:
        return InMemory(tensor)


class FileStore(StateStore):
    """Keeps tensors in one file without a name, so that nothing of it outlives the process.

    Written and read by calls, not mapped: pages of a mapping count as the process's own, and a full disk would end it
    by a signal. The place of a tensor that nobody holds any more is used again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as its tensors
        self._free: dict[int, list[int]] = defaultdict(list)
        self.num_bytes = 0
        """Of the file."""

    def keep(self, tensor: Tensor) -> Kept:
        """``tensor``, copied to the file.

        Raises:
            UserError: the disk is full.
        """
        stored = tensor.detach().cpu().contiguous()
        size = stored.nbytes
        if self._free[size]:
            start = self._free[size].pop()
        else:
            start, self.num_bytes = self.num_bytes, self.num_bytes + size
        try:
            self._write(as_bytes(stored), start)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise UserError(
                f"{self.folder}: the disk is full after {self.num_bytes:,} bytes of hidden states; free some space, "
                "point TMPDIR to a larger disk, or take fewer tokens or items"
            ) from error
        return _InFile(self, start, stored.shape, stored.dtype, tensor.device)

    def read(self, start: int, tensor: Tensor) -> None:
        """Fill ``tensor`` from the file."""
        read_into(self._file.fileno(), as_bytes(tensor), start)

    def free(self, start: int, num_bytes: int) -> None:
        self._free[num_bytes].append(start)

    def _write(self, data: memoryview, start: int) -> None:
        while data:
            written = os.pwrite(self._file.fileno(), data, start)
            data, start = data[written:], start + written


@dataclass(eq=False)
class _InFile:
    store: FileStore = field(repr=False)
    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def load(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.store.read(self.start, tensor)
        return tensor.to(self.device)

    def __del__(self) -> None:
        self.store.free(self.start, self.shape.numel() * self.dtype.itemsize)
