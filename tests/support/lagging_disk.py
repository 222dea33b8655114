"""A disk of several nodes as a client of NFS shows it: for a while it believes what it has once been told of a name,
also that there is none, and of the names in a folder. What its own node does it sees at once; to open a file is to ask.
"""

from __future__ import annotations

import builtins
import io
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

LAG_S = 1.5
CHANGE = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "open", "utime", "truncate")


class _Entries(Iterator[Any]):
    """What os.scandir gives."""

    def __init__(self, entries: list[Any]) -> None:
        self._entries = iter(entries)

    def __next__(self) -> Any:
        return next(self._entries)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None: ...


class Client:
    """What one process, which stands for its node, believes of what lies in ``folder``."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._told: dict[str, tuple[float, Any]] = {}
        """When, and what: of a name its state, None = there is none; of a name and / the names in it."""

    def _shared(self, path: Any) -> str | None:
        """The path where it is on the shared disk."""
        name = os.path.abspath(path) if isinstance(path, (str, os.PathLike)) else ""
        return name if name.startswith(self._folder) else None

    def _believed(self, key: str, ask: Callable[[], Any]) -> Any:
        at, answer = self._told.get(key, (0.0, None))
        if time.monotonic() > at + LAG_S:
            answer = ask()
            self._told[key] = time.monotonic(), answer
        return answer

    def stat(self, real: Callable[..., Any], path: Any, **kwargs: Any) -> Any:
        if (name := self._shared(path)) is None or kwargs.get("dir_fd") is not None:
            return real(path, **kwargs)

        def ask() -> Any:
            try:
                return real(path, **kwargs)
            except FileNotFoundError:
                return None

        if (state := self._believed(name, ask)) is None:
            raise FileNotFoundError(2, "No such file or directory", name)
        return state

    def names(self, real: Callable[..., Any], path: Any = ".") -> Any:
        """For listdir and scandir."""
        if (folder := self._shared(path)) is None:
            return real(path)
        found = {getattr(entry, "name", entry): entry for entry in real(path)}
        believed = self._believed(f"{folder}/", lambda: {*found})
        kept = [entry for name, entry in found.items() if name in believed]
        return kept if real.__name__ == "listdir" else _Entries(kept)

    def open(self, real: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        mode, name = str(args[0] if args else kwargs.get("mode", "r")), self._shared(path)
        if name is not None and mode in ("r", "rb", "rt"):
            if self._told.get(name, (0.0, ""))[1] is None:
                os.stat(path)
            self._told.pop(name, None)
            return real(path, *args, **kwargs)
        return self.changed(real, path, *args, **kwargs)

    def changed(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """For what makes, changes or removes the names that come first."""
        try:
            return real(*args, **kwargs)
        finally:
            for name in filter(None, map(self._shared, args[:2])):
                self._told = {key: told for key, told in self._told.items() if not key.startswith(name)}
                folder, own = os.path.split(name)
                if f"{folder}/" in self._told:
                    self._told[f"{folder}/"][1].add(own)


def lag_behind(folder: Path) -> None:
    """From now on this process sees late what others do in ``folder``."""
    client = Client(str(folder))
    patched = {**dict.fromkeys(CHANGE, client.changed), **dict.fromkeys(("stat", "lstat"), client.stat)}
    for name, late in {**patched, **dict.fromkeys(("listdir", "scandir"), client.names)}.items():
        setattr(os, name, partial(late, getattr(os, name)))
    builtins.open = io.open = partial(client.open, builtins.open)
    save = torch.save
    torch.save = lambda obj, f, *args, **kwargs: client.changed(lambda file: save(obj, file, *args, **kwargs), f)
