"""Which tasks there are and what identifies them, read off the files' text: without importing lm-eval, whose index
takes ten seconds, a misspelt name is refused in one."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from glob import glob
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from shoal.atomic_files import file_hashes, fingerprint, known_hash
from shoal.errors import UserError
from shoal.recipe.evaluate import CONFIGS_DIR

from .data_sets import DataSet, Part, TaskProtocol, parts_of, read_data_sets

LOCAL_FORMATS = ("json", "csv", "parquet", "text")
"""Data set paths under which `datasets` reads local files."""
DATA_KEYS = ("data_files", "data_dir", "dataset_path")
"""Keys of task files under which paths of local data stand."""
TASKS_DIR = CONFIGS_DIR / "tasks"
HUB_TASKS_DIR = CONFIGS_DIR / "hub_tasks"
NAMED_TASKS = 6
"""Tasks that are named, at most, of those that a name begins."""
NAMES = re.compile(r"^(?:task|group|tag):[ \t]*[\"']?([\w./-]+)", flags=re.MULTILINE)
TASKS = re.compile(r"^task:[ \t]*[\"']?([\w./-]+)", flags=re.MULTILINE)


def refuse_unknown(
    names: Sequence[str], include_path: str | Path | None = None, *, setting: str = "eval.tasks"
) -> None:
    """Refuse a name that stands in no task file; one that is only mentioned in some is for the index to refuse.
    ``setting`` is what names them.

    Raises:
        UserError: such a name, with what may be meant.
    """
    folders = task_folders(include_path)
    described, tags = described_tasks(folders)
    for name in names:
        if name not in described and name not in tags:
            whole = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
            if not any(name in text and whole.search(text) for text in _every_text(folders)):
                raise unknown(name, folders, setting)


@contextmanager
def named_in(section: str, *settings: str) -> Iterator[None]:
    """Refusals name ``settings`` of section `eval`, none = all, as those of ``section``, which are called the same."""
    one_of = "|".join(settings) or "[a-z_]+"
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(rf"\beval\.(?=(?:{one_of})\b)", f"{section}.", str(error))) from error


def unknown(name: str, folders: Sequence[Path], setting: str = "eval.tasks") -> UserError:
    """What is said of a name that is no task's: what it begins, or what is closest to it."""
    described, tags = described_tasks(folders)
    known = [*described, *tags, *(other for text in _every_text(folders) for other in NAMES.findall(text))]
    begun = [other for other in known if other.startswith(f"{name}_")][:NAMED_TASKS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "`shoal list tasks` names shoal's own"
    hint = f"there is {', '.join(begun)}" if begun else hint
    return UserError(f"{setting}: {name!r} is no task, neither of shoal nor of lm-eval; {hint}")


def tasks_in_files(folder: Path) -> list[str]:
    """The tasks that files below ``folder`` define by themselves, without a described data set."""
    return [name for text in _texts(folder) for name in TASKS.findall(text)]


def task_folders(include_path: str | Path | None) -> tuple[Path, ...]:
    """Where task files are looked for, each place once."""
    folders = [TASKS_DIR, HUB_TASKS_DIR]
    if include_path is not None:
        folder = Path(include_path).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"eval.include_path: {str(include_path)!r} is no folder; name one that holds *.yaml task files"
            )
        if folder.resolve() not in [other.resolve() for other in folders]:
            folders.append(folder)
    return tuple(folders)


def described_data(folders: Sequence[Path]) -> dict[str, DataSet]:
    """The described data sets; one of the user's folder replaces ours of the same name."""
    return {name: data for folder in folders for name, data in read_data_sets(folder).items()}


def described_tasks(
    folders: Sequence[Path],
) -> tuple[dict[str, tuple[Part, TaskProtocol]], dict[str, tuple[str, ...]]]:
    """The tasks that described data sets give, each with its part and protocol, and the groups they are in.

    Raises:
        UserError: a data set that calls itself a twin of tasks that none of them gives.
    """
    tasks: dict[str, tuple[Part, TaskProtocol]] = {}
    tags: dict[str, tuple[str, ...]] = {}
    for data in described_data(folders).values():
        of_data = task_names(data)
        tasks |= of_data
        for tag in data.tags:
            tags[tag] = (*tags.get(tag, ()), *of_data)
    for part, protocol in tasks.values():
        if (other := part.twin_of(protocol)) and other not in tasks:
            raise UserError(
                f"data set {part.data.dataset!r}: twin_of is {part.data.twin_of!r}, and no described data set has a "
                f"task {other!r}; name one before its protocol (retrieval, knowledge ...)"
            )
        if other and tasks[other][0].column != "in":
            raise UserError(
                f"data set {part.data.dataset!r}: twin_of names {part.data.twin_of!r}, whose column is "
                f"{tasks[other][0].column or 'none'}; a twin asks again what is asked in a trained form, so say "
                "column: in there"
            )
    return tasks, tags


def tasks_fingerprint(tasks: Sequence[str], include_path: str | Path | None) -> str:
    """Content hash of what shapes the items of ``tasks``, which may be groups: they are part of a score.

    Their descriptions, the generators where one is theirs, and the task files in folders with the local data that these
    name. If one of them is not described, then all descriptions, since tasks of lm-eval may read any data set that is
    described.
    """
    folders = _folders_there(include_path)
    described, tags = described_tasks(folders)
    members = {member for name in tasks for member in tags.get(name, (name,))}
    if members <= described.keys():
        data_sets = {described[member][0].data.dataset: described[member][0].data for member in sorted(members)}
    else:
        data_sets = described_data(folders)
    sources = list(folders[1:])  # the first one holds descriptions only
    if any(data.bundled for data in data_sets.values()):
        sources.append(Path(str(resources.files("shoal.abilities"))))
    texts = [
        [file.name, file.read_text(encoding="utf-8")]
        for folder in sources
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".yaml", ".py")
    ]
    named = {place for folder in folders[1:] for place in _local_data(folder)}
    rows = [(path, content) for place in sorted(named) for path, content in file_hashes(Path(place))]
    return fingerprint([[asdict(data) for data in data_sets.values()], texts, *([rows] if rows else [])])


def _folders_there(include_path: str | Path | None) -> tuple[Path, ...]:
    """Those that are there: one that is missing is refused where tasks are loaded."""
    is_there = include_path is not None and Path(include_path).expanduser().is_dir()
    return task_folders(include_path if is_there else None)


def _local_data(folder: Path) -> Iterator[str]:
    """Files and folders that task files below ``folder`` read; tasks inherit parts of others, so anywhere in them."""
    for file in folder.rglob("*.yaml"):
        for key, text in _strings(_content(file)):
            if key in DATA_KEYS and text not in LOCAL_FORMATS and "://" not in text:
                yield from glob(text, recursive=True)


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text with the key of DATA_KEYS that it stands under, else with its own."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, list):
        for own in content:
            yield from _strings(own, key)
    elif isinstance(content, Mapping):
        for name, own in content.items():
            yield from _strings(own, key if key in DATA_KEYS else str(name))


class _TaskFile(yaml.SafeLoader):
    """Task files, in which `!function` names code."""


_TaskFile.add_multi_constructor("!", lambda *_: None)


def _content(file: Path) -> Any:
    """What a task file says; nothing of one that is refused where tasks are loaded."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskFile)
    except (yaml.YAMLError, ValueError):  # ValueError: no UTF-8, no date
        return None


def local_data_fingerprint(data_dir: str, include_path: str | Path | None = None) -> str:
    """Content hash of the described data sets in a folder, wherever that is and whatever else lies there."""
    parts = [part for data in described_data(_folders_there(include_path)).values() for part in parts_of(data)]
    named = {name for part in parts for name in (*part.files, f"{part.data.place}/{part.data.examples}")}
    folder = Path(data_dir).expanduser()
    return fingerprint([[name, known_hash(folder / name)] for name in sorted(named) if (folder / name).is_file()])


def task_names(data: DataSet) -> dict[str, tuple[Part, TaskProtocol]]:
    """Task name -> its part and protocol."""
    return {f"{part.name}_{protocol}": (part, protocol) for part in parts_of(data) for protocol in data.protocols}


def _every_text(folders: Sequence[Path]) -> Iterator[str]:
    """The text of every task file, of ``folders`` and of lm-eval."""
    for folder in folders:
        yield from _texts(folder)
    yield from _collection()


@cache
def _collection() -> tuple[str, ...]:
    """The text of lm-eval's task files, found without importing it."""
    package = find_spec("lm_eval")
    places = list(package.submodule_search_locations or ()) if package else []
    return tuple(text for place in places for text in _texts(Path(place) / "tasks"))


def _texts(folder: Path) -> Iterator[str]:
    """The text of every YAML file in a folder and below it."""
    for place, _, files in os.walk(folder):
        for file in sorted(files):
            if file.endswith(".yaml"):
                with open(os.path.join(place, file), encoding="utf-8", errors="replace") as text:
                    yield text.read()
