"""Files of a checkpoint, written and hashed while training goes on.

DeepSpeed's own writer of this kind serves nobody here: in 0.19.8 it does not start at ZeRO 0 to 2, at stage 3 DeepSpeed
cannot read what it has written, and it holds the next step back until all is on the disk. So what DeepSpeed would write
is copied to host memory, which takes seconds, and a thread writes the copy.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shoal.machine import available_memory, ranks_on_this_node

SHARE_OF_HOST = 0.5
"""Of the host memory that is free for a rank, the most that a copy may take; else training waits for the disk."""
AT_ONCE = 2**24
"""Bytes between two looks whether the file is still wanted."""


class BackgroundWriter:
    """Takes the place of ``save`` in DeepSpeed's engine of checkpoints. One rank's, for one checkpoint at a time."""

    def __init__(self, save: Callable[[Any, Any], None]) -> None:
        """``save`` writes a state to a path, or to what takes bytes."""
        self._save, self._is_ended = save, threading.Event()
        self._threads: list[threading.Thread] = []
        self._hashes: dict[Path, str] = {}
        self._error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Begin to write a copy of the state; where memory does not hold one, write the state itself, and return
        then."""
        copy = copy_on_host(state_dict, available_memory() * SHARE_OF_HOST / ranks_on_this_node())
        if copy is None:
            self._write(state_dict, path)
            return
        thread = threading.Thread(target=self._write, args=(copy, path), name=f"writes {path}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def is_done(self) -> bool:
        """Whether nothing is being written any more."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self) -> tuple[dict[Path, str], Exception | None]:
        """What was written since the last time, with its SHA-256, when all of it is on the disk; and what went
        wrong."""
        for thread in self._threads:
            thread.join()
        hashes, error = self._hashes, self._error
        self._threads, self._hashes, self._error = [], {}, None
        return hashes, error

    def end(self) -> None:
        """Give up what is being written."""
        self._is_ended.set()
        self.wait()

    def _write(self, state: Any, path: str) -> None:
        try:
            with open(path, "wb", buffering=0) as file:
                hashed = _Hashed(file, self._is_ended)
                self._save(state, hashed)
                if hashed.error is not None:
                    raise hashed.error
                os.fsync(file.fileno())
            self._hashes[Path(path)] = hashed.hash.hexdigest()
        except Exception as error:  # raised where ranks meet
            self._error = error


class _Hashed:
    """A file that torch writes to."""

    def __init__(self, file: io.FileIO, is_ended: threading.Event) -> None:
        self._file, self._is_ended, self.hash = file, is_ended, hashlib.sha256()
        self.error: Exception | None = None
        """What went wrong. It is not raised: torch's writer, which would go on to end its archive, ends the process."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), AT_ONCE):
            self._take(view[begin : begin + AT_ONCE])
        return len(view)

    def _take(self, part: memoryview) -> None:
        try:
            if self._is_ended.is_set():
                raise InterruptedError("training has ended before this checkpoint was written")
            self.hash.update(part)
            while part and self.error is None:
                part = part[self._file.write(part) :]  # a disk that is nearly full takes some of it
        except OSError as error:
            self.error = self.error or error

    def flush(self) -> None:
        """Nothing is held back."""


def copy_on_host(state: Any, most_bytes: float) -> Any:
    """A copy that no step changes, its tensors in host memory; None where they take more than ``most_bytes``."""
    body = io.BytesIO()
    pickler = _Pickler(body, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dump(state)
    if sum(tensor.nbytes for tensor in pickler.tensors.values()) > most_bytes:
        return None
    unpickler = _Unpickler(io.BytesIO(body.getbuffer()))
    unpickler.tensors = {key: _copy(tensor) for key, tensor in pickler.tensors.items()}
    return unpickler.load()


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy.requires_grad_(tensor.requires_grad)


class _Pickler(pickle.Pickler):
    """Pickles all but plain tensors, which it lists: each once, however often it stands there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tensors: dict[Hashable, Tensor] = {}

    def persistent_id(self, obj: Any) -> Hashable | None:
        if type(obj) not in (Tensor, nn.Parameter):
            return None
        place = obj.data_ptr(), str(obj.device), obj.dtype, tuple(obj.shape), tuple(obj.stride())
        key = (type(obj) is Tensor, obj.requires_grad, *place)
        self.tensors.setdefault(key, obj)
        return key


class _Unpickler(pickle.Unpickler):
    tensors: dict[Hashable, Tensor]

    def persistent_load(self, pid: Any) -> Tensor:
        return self.tensors[pid]
