"""A comparison of runs as plain values, for scripts: compare.json."""

from __future__ import annotations

import math
from typing import Any

from shoal.artifacts.evaluation import TaskScore

from .comparable import dtype_of
from .compare import Cell, Model, RunComparison
from .standings import standings, task_groups

TASK_FIELDS = ("task", "ability", "protocol", "metric", "version", "num_fewshot", "n", "chance", "column")


def as_data(comparison: RunComparison) -> dict[str, Any]:
    """The comparison as plain values: runs, tasks, models with one cell per task, where they stand, notes."""
    groups = task_groups(comparison)
    return {
        "schema": 2,
        "runs": [
            {"letter": c.letter, "name": c.name, "folder": str(c.run.folder), "is_checkpoint": c.is_model}
            for c in comparison.contenders
        ],
        "tasks": [
            _task(task) | {"teacher_above_chance": task.task not in comparison.silent} for task in comparison.tasks
        ],
        "models": [_model(model) for model in comparison.models],
        "ranked_by": list(groups.that_rank),
        "standings": [
            {
                "run": own.model.contender.letter,
                "role": own.model.role,
                "mean": _numbers(own.mean),
                "against": _numbers(own.against),
                "kept": {title: _numbers(value) for title, value in own.kept.items()},
                "form_gap": _numbers(own.form),
            }
            for own in standings(comparison, groups)
        ],
        "num_differences": comparison.num_differences,
        "left_out": list(comparison.left_out),
        "notes": list(comparison.notes),
    }


def _task(task: TaskScore) -> dict[str, Any]:
    return {field: getattr(task, field) for field in TASK_FIELDS}


def _model(model: Model) -> dict[str, Any]:
    evaluation, ratio = model.evaluation, model.speed_ratio
    return {
        "run": model.contender.letter,
        "role": model.role,
        "dtype": dtype_of(model.contender, model.role),
        "num_layers": evaluation.num_layers,
        "num_parameters": evaluation.num_parameters,
        "num_bytes": evaluation.num_bytes,
        "decode_ratio": ratio and ratio.value,
        "decode_ratio_of_rounds": ratio and ratio.limits,
        "compared_with": model.rival,
        "cells": [_cell(cell) for cell in model.cells],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    score, tested = cell.score, {"adjusted_p": cell.adjusted_p, "verdict": cell.verdict}
    return {
        **{field: _finite(getattr(score, field)) for field in ("task", "score", "ci_low", "ci_high")},
        "kept": _numbers(cell.kept),
        "difference": cell.difference and {**(_numbers(cell.difference) or {}), **tested},
    }


def _numbers(value: Any) -> dict[str, Any] | None:
    """The fields of an interval, a retention or a difference."""
    return value and {key: _finite(number) for key, number in vars(value).items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
