"""A report as a reader has it."""

from __future__ import annotations

from pathlib import Path

from results import provenance

from shoal.artifacts.search import (
    Column,
    Correlation,
    HealedPlan,
    Interval,
    PlanStanding,
    Ranking,
    SearchResult,
    Standing,
)
from shoal.eval.report.document import to_markdown
from shoal.eval.report.findings import compare, read_result, read_run
from shoal.eval.report.report import build_document


def told(folder: Path) -> str:
    """report.md of the folder, without drawing its figures."""
    run = read_run(folder)
    return to_markdown(build_document(run, compare(run), {}, read_result(SearchResult, folder / SearchResult.FILE)))


def searched() -> SearchResult:
    none = Correlation(None, None)

    def standing(value: float, rank: int, behind: float) -> Standing:
        return Standing(Interval(value, value, value), rank, None, None, Interval(behind, behind, behind))

    column = Column(
        *("perplexity", "language", "rolling", "nats_per_token", 9, 0.0, False),
        *(Interval(2, 2, 2), 1.0, "it has no chance level", none),
    )
    plans = tuple(
        HealedPlan(name, {}, drop, (), f"named {name}", 6, None) for name, drop in (("own", (1, 2)), ("low", (3, 4)))
    )
    standings = (
        PlanStanding("low", standing(3.0, 2, 0.1), standing(2.5, 1, 0.0), ()),
        PlanStanding("own", standing(2.9, 1, 0.0), standing(2.7, 2, 0.2), ()),
    )
    ranking = Ranking("nats", (column,), standings, {"overall": none}, 9, "own", "low", Interval(-0.2, -0.3, -0.1))
    return SearchResult(provenance(), 1000, plans, ranking)
