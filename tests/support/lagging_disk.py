"""A disk of several nodes as a client of NFS shows it: for a while it believes what it has once been told of a name,
also that there is none, and of the names in a folder. What its own node does it sees at once, and to open a file is to
ask.
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


class Client:
    """What one process, which stands for its node, believes of what lies in ``folder``."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._states: dict[str, tuple[float, Any]] = {}
        self._names: dict[str, tuple[float, set[str]]] = {}

    def _shared(self, path: Any) -> str | None:
        """The path where it is on the shared disk."""
        if not isinstance(path, (str, os.PathLike)):
            return None
        name = os.path.abspath(os.fspath(path))
        return name if isinstance(name, str) and name.startswith(self._folder) else None

    def stat(self, real: Callable[..., Any], path: Any, **kwargs: Any) -> Any:
        if (name := self._shared(path)) is None or kwargs.get("dir_fd") is not None:
            return real(path, **kwargs)
        told, state = self._states.get(name, (0.0, None))
        if time.monotonic() > told + LAG_S:
            try:
                state = real(path, **kwargs)
            except FileNotFoundError as error:
                state = error
            self._states[name] = time.monotonic(), state
        if isinstance(state, FileNotFoundError):
            raise FileNotFoundError(2, "No such file or directory", name)
        return state

    def _believed(self, folder: str, names: Callable[[], list[str]]) -> set[str]:
        told, found = self._names.get(folder, (0.0, set[str]()))
        if time.monotonic() > told + LAG_S:
            found = set(names())
            self._names[folder] = time.monotonic(), found
        return found

    def listdir(self, real: Callable[..., list[str]], path: Any = ".") -> list[str]:
        names = real(path)
        folder = self._shared(path)
        return names if folder is None else [n for n in names if n in self._believed(folder, lambda: names)]

    def scandir(self, real: Callable[..., Any], path: Any = ".") -> Any:
        if (folder := self._shared(path)) is None:
            return real(path)
        with real(path) as found:
            entries = list(found)
        believed = self._believed(folder, lambda: [entry.name for entry in entries])
        return _Entries(iter([entry for entry in entries if entry.name in believed]))

    def open(self, real: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        asked = str(args[0]) if args else kwargs.get("mode", "r")
        name = self._shared(path)
        if name is not None and asked[0] == "r" and "+" not in asked:
            told, state = self._states.get(name, (0.0, None))
            if isinstance(state, FileNotFoundError) and time.monotonic() < told + LAG_S:
                raise FileNotFoundError(2, "No such file or directory", name)
        opened = real(path, *args, **kwargs)
        if asked[0] != "r":
            self.made(path)
        elif name is not None:
            self._states.pop(name, None)
        return opened

    def made(self, *paths: Any) -> None:
        """These names were made, changed or removed here."""
        for name in filter(None, map(self._shared, paths)):
            folder, own = os.path.split(name)
            self._states = {path: state for path, state in self._states.items() if not path.startswith(name)}
            self._names = {path: names for path, names in self._names.items() if not path.startswith(name)}
            if folder in self._names:
                self._names[folder][1].add(own)

    def changed(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return real(*args, **kwargs)
        finally:
            self.made(*args[:2])


class _Entries:
    """What os.scandir gives."""

    def __init__(self, entries: Iterator[Any]) -> None:
        self._entries = entries

    def __iter__(self) -> Iterator[Any]:
        return self._entries

    def __next__(self) -> Any:
        return next(self._entries)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""


def lag_behind(folder: Path) -> None:
    """From now on this process sees late what others do in ``folder``."""
    client = Client(str(folder))
    for name in ("stat", "lstat"):
        setattr(os, name, partial(client.stat, getattr(os, name)))
    for name in ("listdir", "scandir"):
        setattr(os, name, partial(getattr(client, name), getattr(os, name)))
    for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "open", "utime", "truncate"):
        setattr(os, name, partial(client.changed, getattr(os, name)))
    builtins.open = io.open = partial(client.open, builtins.open)
    save = torch.save

    def saved(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        save(obj, f, *args, **kwargs)
        client.made(f)

    torch.save = saved
