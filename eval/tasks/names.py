"""Which task names there are, read off the files' text, so that a misspelt one is refused before anything is imported.

lm-eval's own index parses fourteen thousand files, and importing what it needs takes as long again. That a name stands
in none of them is seen by reading them, in a tenth of the time.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from glob import glob
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import yaml

from shoal.atomic_files import file_hashes, fingerprint, known_hash
from shoal.errors import UserError
from shoal.recipe.evaluate import Tasks
from shoal.recipe.suites import CONFIGS_DIR

from .data_sets import DataSet, Part, TaskProtocol, parts_of, read_data_sets

LOCAL_FORMATS = ("json", "csv", "parquet", "text")
"""Data set paths under which `datasets` reads local files."""
TASKS_DIR = CONFIGS_DIR / "tasks"
HUB_TASKS_DIR = CONFIGS_DIR / "hub_tasks"
NAMED_TASKS = 6
"""Tasks that are named, at most, of those that a name covers."""
NAMES = re.compile(r"^(task|group|tag):[ \t]*(\S.*)$", flags=re.MULTILINE)
LISTED_TAGS = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[ \t].*\n?)+)", flags=re.MULTILINE)


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
    files = [text for folder in folders for text in _texts(folder)]
    outside = [name for name in names if not (name in described or name in tags or _stands_in(files, name))]
    for name in outside:
        if not _stands_in(_collection(), name):
            raise unknown(name, folders, [other for text in _collection() for _, other in _names(text)], setting)


@contextmanager
def named_in(section: str, *settings: str) -> Iterator[None]:
    """Refusals name ``settings`` of section `eval`, none = all, as those of ``section``, which are called the same."""
    one_of = "|".join(settings) or "[a-z_]+"
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(rf"\beval\.(?=(?:{one_of})\b)", f"{section}.", str(error))) from error


def unknown(name: str, folders: Sequence[Path], others: Sequence[str], setting: str = "eval.tasks") -> UserError:
    """What is said of a name that is no task's, ``others`` being names beside those in ``folders``."""
    hint = _what_was_meant(name, folders, others)
    return UserError(f"{setting}: {name!r} is no task, neither of shoal nor of lm-eval; {hint}")


def limit_without_task(name: str, tasks: Iterable[str]) -> str:
    """What is said of a limit for a task that is not asked."""
    return (
        f"{name!r} is not among the evaluated tasks, which are {', '.join(tasks)}; add it to them, or leave its limit "
        "out (on the command line: eval.limits={})"
    )


def limits_without_task(settings: Tasks) -> Iterator[str]:
    """`place: what is wrong` with limits of single tasks, as far as names tell; what lm-eval's mean its index knows."""
    described, tags = described_tasks(task_folders(settings.include_path))
    tasks = [member for name in settings.tasks for member in tags.get(name, (name,))]
    if described.keys() | set(tasks_in_files(HUB_TASKS_DIR)) >= set(tasks):
        yield from (f"eval.limits: {limit_without_task(name, tasks)}" for name in settings.limits if name not in tasks)


def tasks_in_files(folder: Path) -> list[str]:
    """The tasks that files below ``folder`` define by themselves, without a described data set."""
    return [name for text in _texts(folder) for key, name in _names(text) if key == "task"]


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
    files = (file for folder in folders[1:] for file in folder.rglob("*.yaml"))
    named = {place for file in files for path in _data_in(_content(file)) for place in glob(path, recursive=True)}
    rows = [(path, content) for place in sorted(named) for path, content in file_hashes(Path(place))]
    return fingerprint([[_identity(data) for data in data_sets.values()], texts, *([rows] if rows else [])])


def _folders_there(include_path: str | Path | None) -> tuple[Path, ...]:
    """Those that are there: one that is missing is refused where tasks are loaded."""
    is_there = include_path is not None and Path(include_path).expanduser().is_dir()
    return task_folders(include_path if is_there else None)


def local_data(config: Mapping[str, Any]) -> list[str]:
    """Paths and patterns of local files that a task reads."""
    return list(_data_in(config)) if config.get("dataset_path") in LOCAL_FORMATS else []


def _data_in(content: Any) -> Iterator[str]:
    """Paths and patterns under `data_files` and `data_dir`, and folders under `dataset_path`, wherever these stand:
    tasks inherit parts of others."""
    if isinstance(content, list):
        for own in content:
            yield from _data_in(own)
    elif isinstance(content, Mapping):
        for key, own in content.items():
            if key in ("data_files", "data_dir"):
                yield from _texts_in(own)
            elif key == "dataset_path" and isinstance(own, str) and own not in LOCAL_FORMATS:
                yield from (own,) if Path(own).exists() else ()
            else:
                yield from _data_in(own)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from () if "://" in value else (value,)
    elif isinstance(value, list | Mapping):
        for own in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(own)


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


def _identity(data: DataSet) -> dict[str, object]:
    """A description as fingerprints have it: without people's shares where there are none."""
    settings = asdict(data)
    return (
        settings
        if data.label_distribution
        else {key: settings[key] for key in settings.keys() - {"label_distribution"}}
    )


def task_names(data: DataSet) -> dict[str, tuple[Part, TaskProtocol]]:
    """Task name -> its part and protocol."""
    return {f"{part.name}_{protocol}": (part, protocol) for part in parts_of(data) for protocol in data.protocols}


def _what_was_meant(name: str, folders: Sequence[Path], others: Sequence[str]) -> str:
    """The hint at an unknown name: the closest, of what it covers where only the protocol or the level is left out."""
    described, tags = described_tasks(folders)
    in_files = [pair for folder in folders for text in _texts(folder) for pair in _names(text)]
    tasks = dict.fromkeys([*sorted({other for key, other in in_files if key == "task"}), *described])
    covered: dict[str, dict[str, None]] = {}  # in their order
    for task in tasks:
        base, _, protocol = task.rpartition("_")
        if protocol in get_args(TaskProtocol):
            covered.setdefault(base, {})[task] = None
    for task, (part, _) in described.items():
        covered.setdefault(part.data.dataset, {})[task] = None
    known = [*tasks, *sorted({other for _, other in in_files}), *tags, *covered]
    close = [name] if name in covered else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    close = close or difflib.get_close_matches(name, [*known, *others], n=1, cutoff=0.6)
    group = f"{name}_suite"
    if close and close[0] in covered:
        members = list(covered[close[0]])
        named = members if len(members) <= NAMED_TASKS else [*members[: NAMED_TASKS - 1], "...", members[-1]]
        groups = [tag for tag in tags if set(members) <= set(tags[tag])]
        meant = "" if close[0] == name else f"did you mean {close[0]!r}? "
        return f"{meant}shoal asks it as {', '.join(named)}" + (f", all in the group {groups[0]}" if groups else "")
    if group in tags:
        return f"did you mean the group {group!r}?"
    if close:
        return f"did you mean {close[0]!r}?"
    return f"shoal's own are {', '.join(sorted(tags['shoal']))} ...; configs/tasks/README.md lists all"


def _names(text: str) -> Iterator[tuple[str, str]]:
    """(task, group or tag, name) that a file defines. Good enough for a hint: YAML has other ways to write them."""
    for key, value in NAMES.findall(text):
        for name in value.strip("[]").split(",") if value.startswith("[") else [value.split(" #")[0]]:
            yield key, name.strip(" \"'")
    for block in LISTED_TAGS.findall(text):
        yield from (("tag", line.strip(" -\"'")) for line in block.splitlines())


def _stands_in(texts: Sequence[str], name: str) -> bool:
    whole = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    return any(name in text and whole.search(text) for text in texts)


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
