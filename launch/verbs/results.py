"""What a verb has made, to be printed: a table for a reader, rows for a program."""

from __future__ import annotations

from typing import Any

from shoal.artifacts.evaluation import CONTROL, ROLES, Scores
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.formatting import aligned, interval_text

from .run import Run

TABLES: dict[str, type[Importance | Plan | Training]] = {"importance": Importance, "plan": Plan, "training": Training}
"""Name in a result -> what it is a table of."""
OF_VERBS = {"measure": "importance", "prune": "plan", "distill": "training", "eval": "scores", "record": "", "push": ""}
"""Verb -> what of a result it has made; of all others it is everything."""


def result(verb: str, run: Run) -> dict[str, Any]:
    """What ``verb`` has made, JSON-ready: the run directory, and rows as those of the results in Python."""
    made = OF_VERBS.get(verb)
    told: dict[str, Any] = {"run_dir": str(run.dir)}
    for name, kind in TABLES.items():
        if made in (name, None) and (run.dir / kind.FILE).is_file():
            told[name] = kind.load(run.dir / kind.FILE).rows()
    if made in ("scores", None):
        told["scores"] = [{"role": role, **row} for role, scores in _scores(run).items() for row in scores.rows()]
    return told


def scores_text(run: Run) -> str:
    """The scores of all models of the run, a line per task, with 95 % intervals."""
    scores, cells = _scores(run), dict[tuple[str, str], dict[str, str]]()
    for role, own in scores.items():
        for row in own.rows():
            interval = interval_text((row["score"], row["ci_low"], row["ci_high"]), ".3f")
            cells.setdefault((row["task"], row["metric"]), {})[role] = interval
    lines = [(*key, *(told.get(role, "") for role in scores)) for key, told in cells.items()]
    return "\n".join(aligned([("task", "metric", *scores), *lines], left=(0, 1)))


def _scores(run: Run) -> dict[str, Scores]:
    asked = [role for role in ROLES if role != CONTROL or run.recipe.eval.control]
    files = {role: run.dir / "eval" / f"{role}.json" for role in asked}
    return {role: Scores.load(file) for role, file in files.items() if file.is_file()}
