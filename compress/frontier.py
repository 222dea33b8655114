"""What cuts of a model keep against what they leave of its size and its time per token, by the scores at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from shoal.artifacts.importance import Importance, SweepColumn
from shoal.formatting import aligned, bytes_text
from shoal.recipe.prune import Prune

from .layer_sizes import LayerSizes
from .plan import cuts_by_size
from .sweeps.expected_loss import expected_change

MOST_ROWS = 12
"""Lines of the table; of more cuts evenly spaced ones are shown."""


@dataclass(frozen=True)
class FrontierPoint:
    """One cut."""

    drop: tuple[int, ...]
    num_bytes: int
    """Of the student's weights in its files."""
    speedup: float
    """Expected speed of writing over the teacher's: one sequence, if reading weights and cache takes all the time."""
    score: float
    """What the metric says of the cut: see Frontier.metric."""
    kept: Mapping[str, float]
    """Ability -> expected share of the score above chance, the mean of its swept tasks, 0 at least. From sums of single
    removals unless just this cut was measured: a rough guess and rather too high."""


@dataclass(frozen=True)
class Frontier:
    """The cuts that a metric finds best, from the whole model to the smallest."""

    metric: str
    """What the scores are, in words."""
    points: tuple[FrontierPoint, ...]
    length: int
    """Tokens behind the one that is written, for speeds."""


def frontier(prune: Prune, importance: Importance, sizes: LayerSizes) -> Frontier:
    """Cuts as the metric of ``prune`` chooses them, whatever number of layers it asks for.

    Raises:
        UserError: as cuts_by_size.
    """
    metric, cuts = cuts_by_size(prune, importance, sizes.stored.layers)
    layers, length = range(sizes.num_layers), sizes.length
    whole = sizes.read(1, length)
    points = [
        FrontierPoint(
            cut.layers,
            sizes.stored.of([layer for layer in layers if layer not in cut.layers]),
            whole / (whole - sum(sizes.layer_read(layer, 1, length) for layer in cut.layers)),
            cut.score,
            _kept(importance, cut.layers),
        )
        for cut in cuts
    ]
    return Frontier(metric, tuple(points), length)


def _kept(importance: Importance, drop: Sequence[int]) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for column in importance.atlas.columns if importance.atlas else ():
        if column.higher_is_better and not column.no_retention and not column.disputed:
            shares.setdefault(column.ability, []).append(_share(importance, column, drop))
    return {ability: fmean(values) for ability, values in shares.items()}


def _share(importance: Importance, column: SweepColumn, drop: Sequence[int]) -> float:
    change = expected_change(importance, column, drop).value if drop else 0.0
    return max(0.0, 1 + change / (column.intact.value - column.chance))


def frontier_lines(front: Frontier, chosen: Sequence[int]) -> list[str]:
    """The table; the row of the plan that drops ``chosen`` ends in its name."""
    points = _thinned(front.points, chosen)
    abilities = list(points[0].kept)
    rows = [("dropped", "weights on disk", "decode", front.metric, *(f"keeps of {name}" for name in abilities), "")]
    rows += [
        (
            str(len(point.drop)),
            bytes_text(point.num_bytes),
            f"{point.speedup:.2f} x",
            f"{point.score:.4g}" if point.drop else "",
            *(f"{100 * point.kept[name]:.0f} %" for name in abilities),
            "<- this plan" if {*point.drop} == {*chosen} else "",
        )
        for point in points
    ]
    guess = "; what is kept is added up over removals of single layers, before any distillation" if abilities else ""
    return [f"frontier: what the metric would drop, and what is left of size and time{guess}", *aligned(rows)]


def _thinned(points: Sequence[FrontierPoint], chosen: Sequence[int]) -> list[FrontierPoint]:
    last = len(points) - 1
    shown = (
        {round(step * last / (MOST_ROWS - 1)) for step in range(MOST_ROWS)} if last >= MOST_ROWS else {*range(last + 1)}
    )
    return [point for index, point in enumerate(points) if index in shown or {*point.drop} == {*chosen}]
