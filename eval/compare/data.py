"""A comparison of runs as plain values, for scripts: compare.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import Interval
from shoal.atomic_files import write_json

from .comparable import Contender, dtype_of
from .compare import Cell, Model, RunComparison
from .standings import Standing, controls, standings, task_groups

TASK_FIELDS = (
    *("task", "ability", "protocol", "metric", "version", "num_fewshot"),
    *("matching", "n", "chance", "ceiling", "higher_is_better", "family", "level", "column", "twin_of"),
)


def write_json_file(comparison: RunComparison, path: Path) -> None:
    """The whole comparison with every number, for scripts; infinite ends of intervals are null."""
    write_json(path, as_data(comparison), setting="--json")


def as_data(comparison: RunComparison) -> dict[str, Any]:
    """The comparison as plain values: runs, tasks, models with one cell per task, where they stand, notes."""
    inputs = {f"{m.contender.letter} {m.role}": m.evaluation.provenance.fingerprint for m in comparison.models}
    provenance, groups = Provenance(inputs), task_groups(comparison)
    return {
        "schema": 1,
        "provenance": {**vars(provenance), "fingerprint": provenance.fingerprint},
        "runs": [_run_data(contender) for contender in comparison.contenders],
        "tasks": [
            {key: value for key, value in vars(task).items() if key in TASK_FIELDS}
            | {"teacher_above_chance": task.task not in comparison.silent}
            for task in comparison.tasks
        ],
        "models": [_model_data(model) for model in comparison.models],
        "groups": {title: [task.task for task in tasks] for title, tasks in groups.tasks.items()},
        "ranked_by": list(groups.that_rank),
        "standings": [_standing_data(standing) for standing in standings(comparison, groups)],
        "controls": [
            {
                "run": letter,
                "what": effect,
                "change": {title: _interval_data(value) for title, value in changes.items()},
            }
            for (letter, effect), changes in controls(comparison, groups).items()
        ],
        "precision": comparison.precision or None,
        "num_differences": comparison.num_differences,
        "left_out": list(comparison.left_out),
        "notes": list(comparison.notes),
    }


def _run_data(contender: Contender) -> dict[str, Any]:
    run = contender.run
    return {
        "letter": contender.letter,
        "name": contender.name,
        "model": run.model if run.recipe else None,
        "is_checkpoint": contender.is_model,
        "teacher": contender.teacher,
        "cut": run.plan.in_words() if run.plan else None,
        "training_tokens": run.training.num_tokens if run.training else None,
        "training_seconds": run.training.seconds if run.training else None,
    }


def _model_data(model: Model) -> dict[str, Any]:
    evaluation, ratio = model.evaluation, model.speed_ratio
    return {
        "run": model.contender.letter,
        "role": model.role,
        "dtype": dtype_of(model.contender, model.role),
        "content": model.content,
        "num_layers": evaluation.num_layers,
        "num_parameters": evaluation.num_parameters,
        "num_bytes": evaluation.num_bytes,
        "decode_tokens_per_s": model.speed.decode_tokens_per_s if model.speed else None,
        "decode_ratio": ratio.value if ratio else None,
        "decode_ratio_of_rounds": ratio.limits if ratio else None,
        "compared_with": model.rival,
        "cells": [_cell_data(cell) for cell in model.cells],
    }


def _standing_data(standing: Standing) -> dict[str, Any]:
    return {
        "run": standing.model.contender.letter,
        "role": standing.model.role,
        "mean": _interval_data(standing.mean),
        "against": _interval_data(standing.against),
        "kept": {title: _interval_data(value) for title, value in standing.kept.items()},
        "form_gap": _interval_data(standing.form),
    }


def _interval_data(interval: Interval | None) -> dict[str, Any] | None:
    return interval and {key: _finite(value) for key, value in vars(interval).items()}


def _cell_data(cell: Cell) -> dict[str, Any]:
    data: dict[str, Any] = {
        "task": cell.score.task,
        "score": _finite(cell.score.score),
        "ci_low": _finite(cell.score.ci_low),
        "ci_high": _finite(cell.score.ci_high),
        "kept": None,
        "difference": None,
    }
    if cell.kept:
        data["kept"] = {key: _finite(value) for key, value in vars(cell.kept).items()}
    if cell.difference:
        difference = {key: _finite(value) for key, value in vars(cell.difference).items()}
        data["difference"] = {**difference, "adjusted_p": cell.adjusted_p, "verdict": cell.verdict}
    return data


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
