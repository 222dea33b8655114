"""Tasks by name: shoal's own files in configs/tasks, a folder of the user's, and everything lm-eval ships."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.recipe import CONFIGS_DIR

log = logging.getLogger(__name__)

TASKS_DIR = CONFIGS_DIR / "tasks"


def load_tasks(
    names: Sequence[str], *, include_path: str | Path | None = None, num_fewshot: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Task name -> lm-eval task, groups expanded, in the order asked for.

    ``num_fewshot`` None leaves every task its own number. lm-eval's whole collection is read only where a name is not
    ours: that takes ten seconds, reading ours a tenth of one.

    Raises:
        UserError: an unknown name (with the closest known one), no such folder, or data that cannot be had.
    """
    folders = [TASKS_DIR]
    if include_path is not None:
        folder = Path(include_path).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"eval.include_path: {str(include_path)!r} is no folder; name one that holds *.yaml task files"
            )
        folders.append(folder)
    manager = _manager_that_knows(names, folders)
    tasks: dict[str, Any] = {}
    for name in names:
        tasks |= _load(manager, name)
    for name, task in tasks.items():
        _set_fewshot(name, task, num_fewshot, seed)
    return tasks


def known_tasks(include_path: str | Path | None = None, *, ours_only: bool = False) -> set[str]:
    """The names of all tasks and groups: shoal's own, those of ``include_path``, and lm-eval's collection."""
    folders = (TASKS_DIR, *([Path(include_path).expanduser()] if include_path else []))
    return set(_manager(folders, with_all=not ours_only).task_index)


@cache
def _manager(folders: tuple[Path, ...], *, with_all: bool) -> Any:
    """lm-eval's index of task files; reading its whole collection takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=with_all)


def _manager_that_knows(names: Sequence[str], folders: list[Path]) -> Any:
    ours = _manager(tuple(folders), with_all=False)
    if all(name in ours.task_index for name in names):
        return ours
    log.info("reading lm-eval's task collection (about 10 s the first time)")
    everything = _manager(tuple(folders), with_all=True)
    for name in names:
        if name not in everything.task_index:
            close = difflib.get_close_matches(name, ours.all_tasks, n=1, cutoff=0.5)
            close = close or difflib.get_close_matches(name, everything.all_tasks, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"shoal's own are {', '.join(ours.all_subtasks)}"
            raise UserError(f"eval.tasks: {name!r} is no task, neither of shoal nor of lm-eval; {hint}")
    return everything


def _load(manager: Any, name: str) -> dict[str, Any]:
    """The tasks behind a name, sorted: lm-eval keeps a tag's tasks in a set, whose order differs between ranks."""
    if _is_ours(manager, name):
        return dict(sorted(manager.load([name])["tasks"].items()))
    try:
        return dict(sorted(manager.load([name])["tasks"].items()))
    except Exception as error:  # data sets, task code and lm-eval raise a dozen unrelated types here
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        raise UserError(
            f"eval.tasks: {name!r} cannot be loaded ({reason}). Its data may need the Hugging Face Hub: check the "
            "network or the paths in its task file, or choose from shoal's own tasks, which need neither"
        ) from error


def _is_ours(manager: Any, name: str) -> bool:
    """Whether every file behind the name is one of shoal's; if one of those fails to load, the defect is ours."""
    entry = manager.task_index[name]
    files = [entry.yaml_path, *(manager.task_index[tagged].yaml_path for tagged in entry.tags if not entry.yaml_path)]
    return all(TASKS_DIR.resolve() in file.resolve().parents for file in files if file is not None)


def _set_fewshot(name: str, task: Any, num_fewshot: int | None, seed: int) -> None:
    """As lm-eval's command line does it, but a task without examples is refused, not given its own test items."""
    chosen = task.get_config("num_fewshot") if num_fewshot is None else num_fewshot
    task.set_config(key="num_fewshot", value=chosen or 0)
    given = task.fewshot_cfg.split is not None or task.fewshot_cfg.samples is not None
    apart = task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs())
    if chosen and not given and not apart:
        raise UserError(
            f"eval.num_fewshot: {name!r} has no examples beside the items it is scored on; set it to 0 (got {chosen})"
        )
    task.set_fewshot_seed(seed=seed)
