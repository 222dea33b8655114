"""Which tasks there are and what identifies them, read off the files' text: without importing lm-eval, whose index
takes ten seconds, a misspelt name is refused in one."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from glob import glob
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from shoal.atomic_files import fingerprint, known_hash, read_text
from shoal.errors import UserError
from shoal.recipe.evaluate import CONFIGS_DIR, DEFAULT, SUITES, Limit

from .data_sets import DataSet, TaskProtocol, read_data_sets

ROWS = re.compile(r"[^\s'\"\[\]{},]+\.(?:jsonl?|csv|parquet|txt)\b")
"""Paths of local data, as task files name them."""
FEW_EXAMPLES = "eval.num_fewshot: {!r} has only {} examples next to its scored items; lower it (got {})"
TASKS_DIR = CONFIGS_DIR / "tasks"
HUB_TASKS_DIR = CONFIGS_DIR / "hub_tasks"
NAMED_TASKS = 6
"""Tasks that are named, at most, of those that a name begins."""
NAME = r"""[^\s'"\[\]{},]+"""
NAMES = re.compile(
    rf"""^["']?(?:task|group|tag)["']?:[ \t]*(?:["']?({NAME})|\[([^]]*)\]|\n((?:[ \t]*(?:[-#].*)?(?:\n|\Z))+))""",
    flags=re.MULTILINE,
)
"""Names at the top of a task file: one, a list in brackets, or one on lines of its own."""
LISTED = re.compile(rf"""(?:^[ \t]*-[ \t]|^|,)[ \t]*["']?((?![#-]){NAME})""", flags=re.MULTILINE)
"""Names in such a list."""
OUTPUT_TYPES = ("loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until")
"""What a task file of lm-eval can ask for."""
HUB_PATH = re.compile(r"^dataset_path:[ \t]*[\"']?([\w.-]+/[\w.-]+)", flags=re.MULTILINE)
TASKS = re.compile(r"^task:[ \t]*[\"']?([\w./-]+)", flags=re.MULTILINE)
OTHERS = re.compile(r"^(?:dataset|model):", flags=re.MULTILINE)
"""Beginnings of lines of recipes and of descriptions of data sets: neither is a task file, and what a description asks
is compared by itself."""


def refuse_unknown(
    names: Sequence[str], include_path: str | Path | None = None, *, setting: str = "eval.tasks"
) -> None:
    """Refuse a name that no task file defines; ``setting`` is what names them."""
    folders = task_folders(include_path)
    described, tags = described_tasks(folders)
    own = {file: read_text(file) for folder in folders[2:] for file in sorted(folder.rglob("*.yaml"))}
    for file, text in own.items():
        if NAMES.search(text := text.removeprefix("\ufeff")) and any(name in text for name in names):
            _refuse_task_file(file)
            if taken := next((name for name in TASKS.findall(text) if name in described), None):
                raise UserError(f"{file}: task: {taken!r} is a task of shoal's, which would be scored; rename yours")
    for name in names:
        if name not in described and name not in tags and name not in _defined(folders):
            for file in (file for file, text in own.items() if name in text):
                _with_includes(file)  # a torn file defines nothing
            raise unknown(name, folders, setting)


def _refuse_task_file(file: Path) -> None:
    """Refuse a task file of the user that is no YAML, says too little, or asks for what lm-eval does not know."""
    settings = _with_includes(file)
    if not isinstance(settings.get("task"), str) or {"dataset", "class", "group"} & settings.keys():
        return
    if (kind := settings.get("output_type", OUTPUT_TYPES[-1])) not in OUTPUT_TYPES:
        raise UserError(f"{file}: output_type: must be one of {', '.join(OUTPUT_TYPES)} (got {kind!r})")
    if not settings.get("dataset_path") and not settings.get("custom_dataset"):
        raise UserError(f"{file}: dataset_path: is required; name a data set of the Hub, or json with data_files")


def _with_includes(file: Path) -> dict[str, Any]:
    """What a task file says with all that it includes; a function is its name."""
    try:
        settings, whole = yaml.safe_load(read_text(file).replace("!function ", "")), dict[str, Any]()
        if not isinstance(settings, dict):
            raise yaml.YAMLError(f"it is {type(settings).__name__}, not a mapping")
        included = settings.pop("include", None) or []
        for name in included if isinstance(included, list) else [included]:
            if not (other := file.parent / str(name)).is_file():
                raise UserError(f"{file}: include: no file {str(name)!r}; correct it, or remove it")
            whole |= _with_includes(other)
        return whole | settings
    except (yaml.YAMLError, RecursionError) as error:
        problem = "it includes itself, or nests too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{file}: is not a task file: {problem}; correct it, or remove it") from error


def tasks_named(names: Sequence[str], include_path: str | Path | None) -> list[str] | None:
    """The tasks that ``names`` mean, groups expanded; None if only lm-eval knows some of them."""
    described, tags = described_tasks(task_folders(include_path))
    if include_path is not None or not {*names} <= described.keys() | tags.keys():
        return None
    return list(dict.fromkeys(member for name in names for member in tags.get(name, (name,))))


def refuse_other_limits(limit: Limit, tasks: Collection[str]) -> None:
    """Refuse a limit for a task that is not among the evaluated ``tasks``."""
    named = limit if isinstance(limit, dict) else {}
    if unknown := sorted(named.keys() - {DEFAULT, *tasks}):
        raise UserError(
            f"eval.limit: {unknown[0]!r} is not among the evaluated tasks, which are {', '.join(tasks)}; add it to "
            "them, or remove its limit (on the command line: eval.limit=NUMBER)"
        )


def refuse_offline(names: Sequence[str], include_path: str | Path | None) -> None:
    """Refuse, where the Hub may not be asked, a task whose data set is not in a cache, as far as its file tells."""
    from huggingface_hub import constants

    described, _ = described_tasks(folders := task_folders(include_path))
    own = _names(text for folder in folders[2:] for text in _texts(folder))  # which lm-eval takes before its namesake
    for name in {*names} - own if constants.HF_HUB_OFFLINE else ():
        hub = described[name][0].hub if name in described else None
        path = hub.path if hub else "" if name in described else _collection().get(name, "")
        kept, cache = os.environ.get("HF_DATASETS_CACHE", f"{constants.HF_HOME}/datasets"), Path(constants.HF_HUB_CACHE)
        data = Path(kept).glob(f"{path.partition('/')[0]}___*")  # whose MATH-500 is math-500 there
        caches = data, cache.glob(f"*{path.replace('/', '--')}")
        if "/" in path and not any(map(any, caches)):
            told = f"its data set {path} is not in the cache, and HF_HUB_OFFLINE is set"
            raise UserError(f"eval.tasks: {name!r}: {told}; unset that once, or remove the task")


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
    known = [*SUITES, *described, *tags, *sorted(_defined(folders))]
    begun = [other for other in known if other.startswith(f"{name}_")][:NAMED_TASKS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "`shoal list tasks` names shoal's own"
    hint = f"it could be {', '.join(begun)}" if begun else hint
    hint = f"several tasks are a list: [{', '.join(name.replace(',', ' ').split())}]" if "," in name else hint
    hint = "a task file names it, and none defines it" if name in known else hint
    return UserError(f"{setting}: {name!r} is not a task of shoal or lm-eval; {hint}")


def tasks_in_files(folder: Path) -> list[str]:
    """The tasks that files below ``folder`` define by themselves, without a described data set."""
    return [name for text in _texts(folder) for name in TASKS.findall(text)]


def task_folders(include_path: str | Path | None) -> tuple[Path, ...]:
    """Where task files are looked for, each place once."""
    folders = [TASKS_DIR, HUB_TASKS_DIR]
    if include_path is not None:
        folder = Path(include_path).expanduser()
        if not (include_path and folder.is_dir()):
            raise UserError(
                f"eval.include_path: {str(include_path)!r} is not a folder; name one with *.yaml task files"
            )
        if wrong := next((file for file in folder.rglob("*.yaml") if not file.is_file()), None):
            raise UserError(f"eval.include_path: {wrong} is not a file; remove it")
        if folder.resolve() not in [other.resolve() for other in folders]:
            folders.append(folder)
    return tuple(folders)


def local_data(data_dir: str | None) -> Path | None:
    """The folder that eval.data_dir names."""
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not (data_dir and folder.is_dir()):
        raise UserError(f"eval.data_dir: {data_dir!r} is not a folder; name a folder with data sets")
    return folder


def described_data(folders: Sequence[Path]) -> dict[str, DataSet]:
    """The described data sets; one of the user's folder replaces ours of the same name."""
    return {name: data for folder in folders for name, data in read_data_sets(folder).items()}


def described_tasks(
    folders: Sequence[Path],
) -> tuple[dict[str, tuple[DataSet, TaskProtocol]], dict[str, tuple[str, ...]]]:
    """The tasks that described data sets give, each with its data set and protocol, and the groups they are in.

    Raises:
        UserError: a data set that rewords tasks that no data set in a trained wording has.
    """
    tasks: dict[str, tuple[DataSet, TaskProtocol]] = {}
    tags: dict[str, tuple[str, ...]] = {}
    for data in described_data(folders).values():
        of_data: dict[str, tuple[DataSet, TaskProtocol]]
        of_data = {f"{data.dataset}_{protocol}": (data, protocol) for protocol in data.protocols}
        tasks |= of_data
        for tag in (*data.tags, *([data.dataset] if data.bundled else [])):
            tags[tag] = (*tags.get(tag, ()), *of_data)
    for data, protocol in tasks.values():
        if (other := data.reworded_under(protocol)) and (other not in tasks or tasks[other][0].column != "in"):
            raise UserError(
                f"data set {data.dataset!r}: reworded_of is {data.reworded_of!r}, and no described data set of the "
                f"column in has a task {other!r}; name such a task, without its protocol"
            )
    return tasks, tags


def tasks_fingerprint(tasks: Sequence[str], include_path: str | Path | None) -> str:
    """Content hash of what shapes the items of ``tasks``, which may be groups: they are part of a score.

    Their descriptions, the generators where one is theirs, and the task files in folders with the local files of rows
    that these name. If one of them is not described, then all descriptions, since tasks of lm-eval may read any data
    set that is described.
    """
    folders = _folders_there(include_path)
    described, tags = described_tasks(folders)
    members = {member for name in tasks for member in tags.get(name, (name,))}
    if members <= described.keys():
        data_sets = {described[member][0].dataset: described[member][0] for member in sorted(members)}
    else:
        data_sets = described_data(folders)
    sources = list(folders[1:])  # the first one holds descriptions only
    if any(data.bundled for data in data_sets.values()):
        sources.append(Path(str(resources.files("shoal.abilities"))))
    files = [file for source in sources for file in sorted(source.rglob("*")) if file.suffix in (".yaml", ".py")]
    texts = [[file.name, file.read_text(encoding="utf-8", errors="replace")] for file in files]
    texts = [own for own in texts if own[0].endswith(".py") or not OTHERS.search(own[1])]
    rows = sorted({Path(name) for _, text in texts for named in ROWS.findall(text) for name in glob(named)})
    known = [[str(path), known_hash(path)] for path in rows if path.is_file()]
    asked = [asdict(data) | {"about": ""} for data in data_sets.values()]
    return fingerprint([asked, texts, *([known] if known else [])])


def _folders_there(include_path: str | Path | None) -> tuple[Path, ...]:
    """Those that are there: one that is missing is refused where tasks are loaded."""
    is_there = include_path is not None and Path(include_path).expanduser().is_dir()
    return task_folders(include_path if is_there else None)


def local_data_fingerprint(data_dir: str, include_path: str | Path | None = None) -> str:
    """Content hash of the described data sets in a folder, wherever that is and whatever else lies there."""
    data_sets = described_data(_folders_there(include_path)).values()
    named = {f"{data.place}/{file}" for data in data_sets for file in (data.items, data.examples) if file}
    folder = Path(data_dir).expanduser()
    return fingerprint([[name, known_hash(folder / name)] for name in sorted(named) if (folder / name).is_file()])


def _defined(folders: Sequence[Path]) -> Set[str]:
    """The names of tasks, groups and tags in the task files of ``folders`` and of lm-eval."""
    return _names(text for folder in folders for text in _texts(folder)) | _collection().keys()


def _names(texts: Iterable[str]) -> frozenset[str]:
    found = [match for text in texts for match in NAMES.findall(text)]
    in_lists = (name for _, *lists in found for items in lists for name in LISTED.findall(items))
    return frozenset(name for name, *_ in found if name).union(in_lists)


@cache
def _collection() -> dict[str, str]:
    """The same of lm-eval's, found without importing it, each with the data set of the Hub that its file names, ""
    without one; what its files include has names of any form."""
    package = find_spec("lm_eval")
    places = list(package.submodule_search_locations or ()) if package else []
    walked = (row for place in places for row in os.walk(Path(place) / "tasks"))
    files = (Path(folder, name) for folder, _, names in walked for name in names if "." not in name or ".y" in name)
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return {name: "".join(HUB_PATH.findall(text)[:1]) for text in texts for name in _names([text])}


def _texts(folder: Path) -> Iterator[str]:
    """The text of every YAML file in a folder and below it."""
    return (file.read_text(encoding="utf-8-sig", errors="replace") for file in sorted(folder.rglob("*.yaml")))
