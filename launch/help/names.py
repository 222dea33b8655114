"""`shoal list`: what a recipe can name. Nothing heavy is loaded but for metrics, whose classes say what they are."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from shoal.data.bundled import ABOUT
from shoal.progress import loading
from shoal.recipe.evaluate import CONFIGS_DIR, SUITES, read_suite
from shoal.recipe.losses import LOGIT_TERMS, HiddenStates
from shoal.task_words import COLUMNS

from .explain import table

Names = dict[str, str]
"""Name -> what it is."""


def recipes() -> Names:
    """The shipped recipes, which are found by their names from any folder."""
    return {file.stem: f"{_first_comment(file)} [{file}]" for file in sorted(CONFIGS_DIR.glob("*.yaml"))}


def tasks() -> Names:
    """Shoal's own tasks. Every task that lm-eval ships can be named too."""
    from shoal.eval.tasks.names import HUB_TASKS_DIR, described_tasks, task_folders, tasks_in_files

    described, _ = described_tasks(task_folders(None))
    names = {
        name: f"{data.about} [{COLUMNS[data.column]}]" if data.column else data.about
        for name, (data, _) in described.items()
    }
    return names | dict.fromkeys(tasks_in_files(HUB_TASKS_DIR), "a group of tasks in its own file")


def metrics() -> Names:
    """What measure.metrics can name and, measured, prune.metric."""
    with loading():
        from shoal.compress.metrics.registry import METRICS

    return {name: f"{_first_paragraph(metric)} [{metric.yields}; {metric.needs}]" for name, metric in METRICS.items()}


def losses() -> Names:
    """The kinds of distill.losses, with their keys."""
    return {
        term().kind: f"{_first_paragraph(term)} [{', '.join(key.name for key in fields(term) if key.name != 'kind')}]"
        for term in (*LOGIT_TERMS, HiddenStates)
    }


def data() -> Names:
    """Bundled sources of text."""
    return dict(ABOUT)


def suites() -> Names:
    """Sets of tasks that eval.tasks can name."""
    return {name: read_suite(name).about for name in SUITES}


def cluster() -> Names:
    """Example files that start ranks on several nodes."""
    return {file.name: f"{_first_comment(file)} [{file}]" for file in sorted((CONFIGS_DIR / "cluster").iterdir())}


LISTS: dict[str, Callable[[], Names]] = {
    function.__name__: function for function in (recipes, tasks, metrics, losses, data, suites, cluster)
}
"""Word after `shoal list` -> what gives the list."""
NOTES = {
    "tasks": "in brackets: relation to the training text. Every task of lm-eval works too.",
    "metrics": "in brackets: values for layers, for runs of layers, or a greedy order; input of the metric.",
    "losses": "in brackets: keys.",
}
"""Word after `shoal list` -> note below the list."""


def told(asked: argparse.Namespace) -> Any:
    """What `shoal list` prints."""
    if asked.as_json:
        return LISTS[asked.what]() if asked.what else list(LISTS)
    if asked.what is None:
        return "\n".join(f"shoal list {what}" for what in LISTS)
    rest = ["", NOTES[asked.what]] if asked.what in NOTES else []
    return "\n".join([*table(LISTS[asked.what]().items()), *rest])


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("# ")).removeprefix("# ").rstrip(":.")


def _first_paragraph(of: type) -> str:
    return " ".join((inspect.getdoc(of) or "").partition("\n\n")[0].split())
