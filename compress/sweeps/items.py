"""What every item of a sweep scored without every unit, on disk: <task>.json in the sweep's folder.

N items, U units.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shoal.artifacts.evaluation import TaskScore
from shoal.atomic_files import write_json
from shoal.errors import UserError
from shoal.stats.intervals import Array


def write_items(
    folder: Path, names: Sequence[str], intact: Sequence[TaskScore], removed: Sequence[Sequence[TaskScore]]
) -> None:
    """A file for every task: weights and scores of its items, intact and without each unit, in the order of the ids."""
    for index, task in enumerate(intact):
        table = {
            "task": task.task,
            "metric": task.metric,
            "ids": [item.id for item in task.items],
            "weights": [item.weight for item in task.items],
            "intact": [item.score for item in task.items],
            "without": {
                unit: [item.score for item in scores[index].items] for unit, scores in zip(names, removed, strict=True)
            },
        }
        write_json(_file(folder, task.task), table)


def read_items(folder: Path, task: str, *, num_units: int) -> dict[str, Array]:
    """Item -> (2 + U,): its weight, its score with everything, and without each unit. Weights of old files are 1.

    Raises:
        UserError: the file is missing, or of another number of units.
    """
    file = _file(folder, task)
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        rows = [table.get("weights") or [1.0] * len(table["ids"]), table["intact"], *table["without"].values()]
        rows_KN = np.array(rows, dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete importance.json and measure again") from error
    if len(rows_KN) != 2 + num_units:
        raise UserError(
            f"{file}: has {len(rows_KN) - 2} units, importance.json has {num_units}; delete it and measure again"
        )
    return dict(zip(table["ids"], rows_KN.T, strict=True))


def _file(folder: Path, task: str) -> Path:
    name = re.sub(r"[^\w.-]+", "-", task)
    return folder / f"{name}.json"
