"""Tasks by name: described data sets under every protocol, lm-eval task files of a folder, and all that lm-eval ships.

A name is a data set's with a protocol behind it (data_sets.py), a group's, or that of a task in a task file.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import jinja2
import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from shoal.errors import UserError
from shoal.formatting import listed
from shoal.recipe.evaluate import Eval
from shoal.task_words import Column

from .data_sets import DataSet, Stamps, share, yaml_files
from .documents import local_rows
from .names import FEW_EXAMPLES, described_data, described_tasks, local_data, refuse_unknown, task_folders, unknown
from .protocols import task_config

log = logging.getLogger(__name__)

Sample = dict[str, Any]
"""One document with what lm-eval asked of it, was answered, and made of the answers."""
RUNS_CODE = "HF_ALLOW_CODE_EVAL"
"""Environment variable by which libraries are told that they may."""
CHECKED_ITEMS = 20
"""Items of a task whose answers are looked at before a model is loaded."""


def tasks_of(settings: Eval, *, seed: int = 0) -> dict[str, Any]:
    """Task name -> lm-eval task that evaluating by ``settings`` asks, groups expanded, in the order asked for.

    With a ``data_dir``, data sets that are described come from there, whoever's task reads them. lm-eval's whole
    collection is read only where a name is not known without it: that takes ten seconds, reading the descriptions a
    tenth of one.

    Raises:
        UserError: an unknown name (with the closest known one), no such folder, or data that cannot be had.
    """
    names, num_fewshot = settings.tasks, settings.num_fewshot
    folders = task_folders(settings.include_path)
    refuse_unknown(names, settings.include_path)
    described, tags = described_tasks(folders)
    data_sets = described_data(folders).values()
    manager = _manager_that_knows([name for name in names if name not in described | tags], folders)
    both = {name for name in names if name in tags and name in manager.task_index}  # a group of files too
    members = [member for name in names for member in (*tags.get(name, (name,)), *([name] if name in both else []))]
    local = local_data(settings.data_dir)
    _refuse_missing(_rows_read(members, manager, folders, num_fewshot), local)
    tasks: dict[str, Any] = {}
    with _data_from(local, data_sets, num_fewshot):
        for member in members:
            if member in described:
                tasks |= manager.load([task_config(*described[member], local, num_fewshot)])["tasks"]
            else:
                tasks |= _load(manager, member)
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and os.environ.get(RUNS_CODE) != "1":
            raise UserError(
                f"eval.tasks: {name!r} runs code that the model writes; in a container of its own set the "
                f"environment variable {RUNS_CODE}=1, or remove the task"
            )
        _set_fewshot(name, task, num_fewshot, seed)
        config = task.config
        says_none = config.custom_dataset is None and "ability" not in (config.metadata or {})  # as lm-eval's own
        if says_none and (data := _read_by(config.dataset_path, config.dataset_name, data_sets)) is not None:
            config.metadata = {**(config.metadata or {}), "ability": data.ability}
        _check_metadata(name, task)
    return tasks


def _rows_read(
    members: Sequence[str], manager: Any, folders: tuple[Path, ...], num_fewshot: int | None
) -> dict[str, DataSet]:
    """The files of eval.data_dir that ``members`` would read, each with its data set."""
    described, _ = described_tasks(folders)
    data_sets = described_data(folders).values()
    files: dict[str, DataSet] = {}
    for member in members:
        if member in described:
            data, protocol = described[member]
            shots = data.shots_under(protocol) if num_fewshot is None else num_fewshot
        else:
            config: dict[str, Any] = manager.task_index[member].cfg or {}
            data, shots = _read_by(config.get("dataset_path"), config.get("dataset_name"), data_sets), 0
        if data is not None and data.bundled is None:
            names = (data.items, *([data.examples] if shots and data.examples else []))
            files |= {f"{data.place}/{name}": data for name in names}
    return files


def _refuse_missing(files: dict[str, DataSet], data_dir: Path | None) -> None:
    """Refuse rows that cannot be had, all at once, before anything is read. What is described is read from one place:
    ``data_dir``, or without one the Hub."""
    if data_dir is None:
        lacking = list(dict.fromkeys(data.dataset for data in files.values() if data.hub is None))
        missing, problem = list(files) if lacking else [], f"eval.tasks: the Hub does not have {listed(lacking)}"
    else:
        missing = [file for file in files if not (data_dir / file).is_file()]
        problem = f"eval.data_dir: {str(data_dir)!r} lacks files"
    if missing:
        raise UserError(
            f"{problem}; set eval.data_dir to a folder with {listed(missing)} (described in shoal's "
            "configs/tasks/README.md), or remove their tasks"
        )


@contextmanager
def _data_from(data_dir: Path | None, data_sets: Collection[DataSet], num_fewshot: int | None) -> Iterator[None]:
    """Let lm-eval's tasks take described data sets from ``data_dir`` instead of the Hub, without splits it lacks.

    The file of few-shot examples may be missing where none are shown.
    """
    download = ConfigurableTask.download

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
    data, name = _read_by(config.dataset_path, config.dataset_name, data_sets), config.dataset_name
    if data is None or data.hub is None:
        return None
    hub, shown = data.hub, data.examples
    files = {hub.items: data.items or ""}
    if hub.examples and shown and (with_examples or (data_dir / data.place / shown).is_file()):
        files[hub.examples] = shown
    rows = local_rows(data, data_dir, files)
    if name not in (hub.name, None):
        column = hub.part_column or ""
        rows = {split: [row for row in rows[split] if row[column] == name] for split in rows}
    return {split: Dataset.from_list([dict(row) for row in rows[split]]) for split in rows}


def _read_by(path: str | None, name: str | None, data_sets: Collection[DataSet]) -> DataSet | None:
    """The described data set that is ``path`` on the Hub under its configuration ``name``."""
    for data in data_sets:
        hub = data.hub
        if hub and hub.path == path and (name in (hub.name, None) or hub.part_column is not None):
            return data
    return None


def _check_metadata(name: str, task: Any) -> None:
    """Refuse a column, chance or level of a task file that is none, before anything is scored; descriptions have been
    checked. A chance may be a fraction, as there."""
    told = task.config.metadata or {}
    try:
        if "chance" in told:
            told["chance"] = share(told["chance"])
        if not math.isfinite(float(told.get("level", 0))):
            raise ValueError(f"level is {told['level']!r}")
        if told.get("column", "") not in ("", *get_args(Column)):
            raise ValueError(f"column is {told['column']!r}, but must be one of {', '.join(get_args(Column))}")
    except (ValueError, TypeError) as error:
        raise UserError(f"eval.tasks: {name!r}: metadata: {error}; correct it, or remove the task") from error


@cache
def _manager(folders: tuple[Path, ...], _files: tuple[Stamps, ...], *, with_all: bool) -> Any:
    """lm-eval's index of task files; reading its whole collection takes ten seconds."""
    return lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=with_all)


def _manager_that_knows(names: Sequence[str], folders: tuple[Path, ...]) -> Any:
    """lm-eval's index with these names in it."""
    files = tuple(map(yaml_files, folders))
    of_folders = _manager(folders, files, with_all=False)
    outside = [name for name in names if name not in of_folders.task_index]
    if not outside:
        return of_folders
    log.info("reading lm-eval's task collection (about 10 s the first time)")
    with_collection = _manager(folders, files, with_all=True)
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
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        remedy = (
            "Its data may need the Hugging Face Hub: check the network or the paths in its task file, or choose from "
            "shoal's own tasks, which need neither"
        )
        if isinstance(error, LookupError | jinja2.UndefinedError):
            remedy = "Its task file names a split, a metric, a column or a choice that is not there; correct it"
        raise UserError(f"eval.tasks: {name!r} cannot be loaded ({reason}). {remedy}") from error
    for member, task in tasks.items():  # all items are checked where they are scored
        docs = islice(enumerate(task.eval_docs), CHECKED_ITEMS)
        check_answers(member, task, [{"doc_id": n, "doc": doc, "target": task.doc_to_target(doc)} for n, doc in docs])
    return tasks


def check_answers(name: str, task: Any, samples: Sequence[Sample]) -> None:
    """Refuse a right answer that is not among the options: lm-eval counts every model wrong there and goes on."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        for answer in gold if isinstance(gold, list) else [gold]:
            inside = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
            if not inside:
                raise UserError(
                    f"eval.tasks: {name!r}, document {sample['doc_id']}: the answer {answer!r} is not one of its "
                    f"{len(choices)} options; correct its data or its doc_to_target"
                )


def _set_fewshot(name: str, task: Any, num_fewshot: int | None, seed: int) -> None:
    """As lm-eval's command line does it, but a task without examples is refused, not given its own test items."""
    shots = task.get_config("num_fewshot") if num_fewshot is None else num_fewshot
    task.set_config(key="num_fewshot", value=shots or 0)
    names_examples = task.fewshot_cfg.split is not None or task.fewshot_cfg.samples is not None
    has_other_split = task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs())
    sampler, most = getattr(task, "sampler", None), 0
    if names_examples or has_other_split:
        most = shots if sampler is None else len(sampler.fewshot_indices or sampler.df)
    if shots and shots > most:
        raise UserError(FEW_EXAMPLES.format(name, most, shots))
    task.set_fewshot_seed(seed=seed)
