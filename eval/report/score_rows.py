"""The before/after table as plain values, for programs: a row per role and task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..harness.rates import NAMES
from .findings import compare, read_run

COLUMNS = (
    *("role", "task", "ability", "protocol", "metric", "score", "ci_low", "ci_high", "n", "chance"),
    *("retention", "retention_low", "retention_high", "higher_is_better", "num_fewshot", "version"),
    *("family", "level", *NAMES, "column", "form_gap", "form_gap_low", "form_gap_high"),
)


def score_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Every score of a run that may stand in one table, with its 95 % interval and the share of the teacher's it keeps.

    A twin's row has its form gap: the score of the same items in the form that training text may have, minus its own.

    Raises:
        UserError: there is nothing in the run directory, or it cannot be read.
    """
    rows = []
    for row in compare(read_run(run_dir)).rows:
        for role, score in row.scores.items():
            kept = row.retained.get(role)
            share = (kept.value, kept.ci_low, kept.ci_high) if kept else (None, None, None)
            gap = row.form.gaps.get(role) if row.form else None
            form = (gap.difference, gap.ci_low, gap.ci_high) if gap else (None, None, None)
            rows.append(
                (
                    *(role, score.task, score.ability, score.protocol, score.metric),
                    *(score.score, score.ci_low, score.ci_high, score.n, score.chance),
                    *(*share, score.higher_is_better, score.num_fewshot, score.version),
                    *(score.family, score.level, *map(score.rates.get, NAMES), score.column, *form),
                )
            )
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in rows]
