"""Tasks by name: described data sets under every protocol, lm-eval task files of a folder, and all that lm-eval ships.

A name is a data set's with a protocol behind it (data_sets.py), a group's, or that of a task in a task file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from shoal.errors import UserError
from shoal.formatting import listed
from shoal.recipe.evaluate import Eval, Tasks
from shoal.task_words import Column

from .data_sets import DataSet, Part, Stamps, parts_of, yaml_files
from .documents import LEAVE_OUT, MissingFiles, UnreadHub, local_rows
from .names import described_data, described_tasks, refuse_unknown, task_folders, unknown
from .protocols import task_config

log = logging.getLogger(__name__)

Sample = dict[str, Any]
"""One document with what lm-eval asked of it, was answered, and made of the answers."""
CHECKED_ITEMS = 20
"""Items of a task whose answers are looked at before a model is loaded."""


def load_tasks(
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    data_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    suite: str | None = None,
) -> dict[str, Any]:
    """Task name -> lm-eval task, groups expanded, in the order asked for.

    ``num_fewshot`` None leaves every task its own number. With ``data_dir``, data sets that are described come from
    there, whoever's task reads them. lm-eval's whole collection is read only where a name is not known without it:
    that takes ten seconds, reading the descriptions a tenth of one.

    Raises:
        UserError: an unknown name (with the closest known one), no such folder, or data that cannot be had.
    """
    folders = task_folders(include_path)
    refuse_unknown(names, include_path)
    described, tags = described_tasks(folders)
    manager = _manager_that_knows([name for name in names if name not in described | tags], folders)
    both = {name for name in names if name in tags and name in manager.task_index}  # a group of files too
    members = [member for name in names for member in (*tags.get(name, (name,)), *([name] if name in both else []))]
    outside = _parts_read(members, manager, folders)
    instead = (
        LEAVE_OUT if suite is None else f"name the tasks that you have data for in eval.tasks, without suite: {suite}"
    )
    local = _checked_folder(data_dir, outside, instead)
    tasks: dict[str, Any] = {}
    missing: dict[str, DataSet] = {}
    with _data_from(local, folders, num_fewshot):
        for member in members:
            try:
                if member in described:
                    tasks |= manager.load([task_config(*described[member], local, num_fewshot)])["tasks"]
                else:
                    tasks |= _load(manager, member)
            except MissingFiles as error:
                missing |= error.files
            except UnreadHub as error:
                raise UserError(
                    f"{error}. Check the network, or set eval.data_dir to a folder with {_files_of(outside)}"
                ) from error
    if missing and local is not None:  # all of them, so that one attempt is enough
        raise MissingFiles(local, missing, on_hub=all(part.hub for part in outside), instead=instead)
    data_sets = described_data(folders).values()
    for name, task in tasks.items():
        _set_fewshot(name, task, num_fewshot, seed)
        _set_ability(task, data_sets)
        _check_metadata(name, task)
    return tasks


def tasks_of(settings: Tasks, *, seed: int = 0) -> dict[str, Any]:
    """The tasks that evaluating by ``settings`` asks, as load_tasks gives them."""
    return load_tasks(
        settings.tasks,
        include_path=settings.include_path,
        data_dir=settings.data_dir,
        num_fewshot=settings.num_fewshot,
        seed=seed,
        suite=settings.suite if isinstance(settings, Eval) else None,
    )


def known_tasks(include_path: str | Path | None = None, *, ours_only: bool = False) -> set[str]:
    """The names of all tasks and groups: shoal's own, those of ``include_path``, and lm-eval's collection."""
    folders = task_folders(include_path)
    described, tags = described_tasks(folders)
    return {*_manager(folders, with_all=not ours_only).task_index, *described, *tags}


def _parts_read(members: Sequence[str], manager: Any, folders: tuple[Path, ...]) -> list[Part]:
    """The described parts whose rows ``members`` read from eval.data_dir or the Hub, each once."""
    described, _ = described_tasks(folders)
    data_sets = described_data(folders).values()
    by_file: dict[str, Part] = {}
    for member in members:
        if member in described:
            part = described[member][0]
        else:
            config: dict[str, Any] = manager.task_index[member].cfg or {}
            part = _part_read_by(config.get("dataset_path"), config.get("dataset_name"), data_sets)
        if part is not None and part.data.bundled is None:
            by_file.setdefault(part.files[0], part)
    return list(by_file.values())


def _checked_folder(data_dir: str | Path | None, parts: Sequence[Part], instead: str) -> Path | None:
    """``data_dir`` as a folder; None = the Hub, which must have all then: described data are read from one place.

    Raises:
        UserError: no such folder, or none where the Hub lacks data; all files that it should hold are named.
    """
    if data_dir is not None:
        local = Path(data_dir).expanduser()
        if not local.is_dir():
            held = f"holds {_files_of(parts)}" if parts else "holds a folder per data set"
            raise UserError(f"eval.data_dir: {str(data_dir)!r} is no folder; name one that {held}")
        return local
    lacking = [part.name for part in parts if part.hub is None]
    if lacking:
        raise UserError(
            f"eval.tasks: the Hub does not have {listed(lacking)}; set eval.data_dir to a folder with "
            f"{_files_of(parts)} (shoal's configs/tasks/README.md says what they hold), or {instead}"
        )
    return None


def _files_of(parts: Sequence[Part]) -> str:
    return listed(dict.fromkeys(file for part in parts for file in part.files))


@contextmanager
def _data_from(data_dir: Path | None, folders: Sequence[Path], num_fewshot: int | None) -> Iterator[None]:
    """Let lm-eval's tasks take described data sets from ``data_dir`` instead of the Hub, without splits it lacks.

    The file of few-shot examples may be missing where none are shown.
    """
    download = ConfigurableTask.download
    data_sets = described_data(folders).values()

    def from_folder(self: Any, *args: Any, **kwargs: Any) -> None:
        config = self.config
        splits = None
        if data_dir is not None and config.custom_dataset is None:
            shots = config.num_fewshot if num_fewshot is None else num_fewshot
            splits = _local_splits(data_sets, config, data_dir, with_examples=bool(shots))
        if splits is None:
            download(self, *args, **kwargs)
        else:
            self.dataset = splits
            for setting in ("training_split", "validation_split", "test_split"):
                if getattr(config, setting) not in splits:
                    setattr(config, setting, None)
            if config.fewshot_config.split not in splits:  # lm-eval reads examples also where none are shown
                config.fewshot_config.split = None

    ConfigurableTask.download = from_folder
    try:
        yield
    finally:
        ConfigurableTask.download = download


def _local_splits(
    data_sets: Collection[DataSet], config: Any, data_dir: Path, *, with_examples: bool
) -> dict[str, Any] | None:
    """The splits of a task's Hub data set, under the Hub's names, out of ``data_dir``; None where it is not described.

    Examples that are not asked for are taken along where they are there.
    """
    part, name = _part_read_by(config.dataset_path, config.dataset_name, data_sets), config.dataset_name
    if part is None or part.hub is None:
        return None
    hub, shown = part.hub, part.data.examples
    files = {hub.items: part.items}
    if hub.examples and shown and (with_examples or (data_dir / part.data.place / shown).is_file()):
        files[hub.examples] = shown
    rows = local_rows(part.data, data_dir, files)
    if name not in (hub.name, None):
        column = hub.part_column or ""
        rows = {split: [row for row in rows[split] if row[column] == name] for split in rows}
    return {split: Dataset.from_list([dict(row) for row in rows[split]]) for split in rows}


def _part_read_by(path: str | None, name: str | None, data_sets: Collection[DataSet]) -> Part | None:
    """The described part that has the Hub data set ``path`` under its configuration ``name``."""
    for part in (part for data in data_sets for part in parts_of(data)):
        hub = part.hub
        if hub and hub.path == path and (name in (hub.name, None) or hub.part_column is not None):
            return part
    return None


def _set_ability(task: Any, data_sets: Collection[DataSet]) -> None:
    """A task that does not say what it asks for, lm-eval's own for one, has the ability of the data that it reads."""
    config = task.config
    if config.custom_dataset is None and "ability" not in (config.metadata or {}):
        part = _part_read_by(config.dataset_path, config.dataset_name, data_sets)
        if part is not None:
            config.metadata = {**(config.metadata or {}), "ability": part.data.ability}


def _check_metadata(name: str, task: Any) -> None:
    """Refuse a column, chance or level of a task file that is none, before anything is scored; descriptions have been
    checked. A chance may be a fraction, as there."""
    told = task.config.metadata or {}
    column = told.get("column", "")
    if column not in ("", *get_args(Column)):
        raise UserError(
            f"eval.tasks: {name!r} has metadata.column {column!r}; it is one of {', '.join(get_args(Column))}, or left "
            "out for a public benchmark"
        )
    for key, is_one, what in (
        ("chance", lambda value: 0 <= value < 1, "a share below 1 such as 0.25 or 1/4"),
        ("level", math.isfinite, "a number"),
    ):
        if key in told:
            try:
                if isinstance(told[key], str):
                    told[key] = float(Fraction(told[key].replace(" ", "")))
                is_right = is_one(told[key])
            except (ValueError, TypeError, ZeroDivisionError, OverflowError):
                is_right = False
            if not is_right:
                raise UserError(f"eval.tasks: {name!r} has metadata.{key} {told[key]!r}; give {what}, or leave it out")


def _manager(folders: tuple[Path, ...], *, with_all: bool) -> Any:
    """lm-eval's index of task files; reading its whole collection takes ten seconds."""
    return _manager_of(folders, tuple(map(yaml_files, folders)), with_all=with_all)


@cache
def _manager_of(folders: tuple[Path, ...], _files: tuple[Stamps, ...], *, with_all: bool) -> Any:
    return lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=with_all)


def _manager_that_knows(names: Sequence[str], folders: tuple[Path, ...]) -> Any:
    """lm-eval's index with these names in it."""
    of_folders = _manager(folders, with_all=False)
    outside = [name for name in names if name not in of_folders.task_index]
    if not outside:
        return of_folders
    log.info("reading lm-eval's task collection (about 10 s the first time)")
    with_collection = _manager(folders, with_all=True)
    for name in outside:
        if name not in with_collection.task_index:
            raise unknown(name, folders)
    return with_collection


def _load(manager: Any, name: str) -> dict[str, Any]:
    """The tasks behind a name, sorted: lm-eval keeps a tag's tasks in a set, whose order differs between ranks."""
    try:
        tasks = dict(sorted(manager.load([name])["tasks"].items()))
    except UserError:
        raise
    except Exception as error:  # data sets, task code and lm-eval raise a dozen unrelated types here
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        if isinstance(error, IndexError):
            reason = "its split has no items, or the answer of the first is none of its options"
        raise UserError(
            f"eval.tasks: {name!r} cannot be loaded ({reason}). Its data may need the Hugging Face Hub: check the "
            "network or the paths in its task file, or choose from shoal's own tasks, which need neither"
        ) from error
    for member, task in tasks.items():  # all items are checked where they are scored
        docs = islice(enumerate(task.eval_docs), CHECKED_ITEMS)
        check_answers(member, task, [{"doc_id": n, "doc": doc, "target": task.doc_to_target(doc)} for n, doc in docs])
    return tasks


def check_answers(name: str, task: Any, samples: Sequence[Sample]) -> None:
    """Refuse a right answer that is not among the options: lm-eval counts every model wrong there and goes on.

    Raises:
        UserError: such an answer, with its document.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        for answer in gold if isinstance(gold, list) else [gold]:
            inside = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
            if not inside:
                raise UserError(
                    f"eval.tasks: {name!r}, document {sample['doc_id']}: the answer {answer!r} is none of its "
                    f"{len(choices)} options; correct its data or its doc_to_target"
                )


def _set_fewshot(name: str, task: Any, num_fewshot: int | None, seed: int) -> None:
    """As lm-eval's command line does it, but a task without examples is refused, not given its own test items."""
    shots = task.get_config("num_fewshot") if num_fewshot is None else num_fewshot
    task.set_config(key="num_fewshot", value=shots or 0)
    names_examples = task.fewshot_cfg.split is not None or task.fewshot_cfg.samples is not None
    has_other_split = task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs())
    if shots and not names_examples and not has_other_split:
        raise UserError(
            f"eval.num_fewshot: {name!r} has no examples beside the items it is scored on; set it to 0 (got {shots})"
        )
    sampler = getattr(task, "sampler", None)
    if shots and sampler is not None and shots > (most := len(sampler.fewshot_indices or sampler.df)):
        raise UserError(f"eval.num_fewshot: {name!r} has {most} examples; set it to at most that (got {shots})")
    task.set_fewshot_seed(seed=seed)
