"""What a search over plans has found: how they rank before and after each had the same short training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from shoal.artifacts.artifact import Artifact
from shoal.recipe.edits import Edits

PERPLEXITY = "perplexity"
"""The column that is there whatever the tasks are."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    ci_low: float
    ci_high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is more than noise."""
        return not self.ci_low <= 0 <= self.ci_high


@dataclass(frozen=True)
class Correlation:
    """How far two rankings of the plans agree; None where one side does not tell any plans apart."""

    kendall: float | None
    """tau-b: 1 = no pair of plans changed places."""
    spearman: float | None


@dataclass(frozen=True)
class Column:
    """One task, by which plans can be ranked."""

    task: str
    ability: str
    protocol: str
    metric: str
    n: int
    chance: float
    higher_is_better: bool
    teacher: Interval
    weight: float
    """Weight of this column in what ranks the plans; 0 = not in it."""
    no_retention: str
    """Reason why the share that is kept of the teacher's score above chance means nothing here; empty where it does."""
    agreement: Correlation
    """Rank correlation of the plans' scores before the heal with those after it."""
    column: str = ""
    """How its items relate to healing text; see TaskScore."""


@dataclass(frozen=True)
class PlanScore:
    """One plan on one task."""

    task: str
    before: Interval
    after: Interval
    kept_before: Interval | None
    """Share kept of the teacher's score above chance."""
    kept_after: Interval | None


@dataclass(frozen=True)
class Standing:
    """Where one plan stands among the others, before or after the heal."""

    value: Interval
    """Score that it is ranked by, in the ranking's unit."""
    rank: int
    """1 = best; equal values share a rank."""
    likelihood: Interval | None
    """Mean share kept of the teacher's scores above chance, over the tasks with this protocol; None = none of them has
    such a share."""
    generation: Interval | None
    behind: Interval
    """Difference of its value from that of the first plan, over the same items."""


@dataclass(frozen=True)
class PlanStanding:
    """One plan before and after the heal."""

    name: str
    before: Standing
    after: Standing
    scores: tuple[PlanScore, ...]


@dataclass(frozen=True)
class Ranking:
    """How plans rank before and after the heal, and whether the first ranking held."""

    unit: Literal["retention", "nats"]
    """retention: share kept of the teacher's score above chance, higher is better; nats: lower is better."""
    columns: tuple[Column, ...]
    plans: tuple[PlanStanding, ...]
    """Plans, the best after the heal first."""
    agreement: dict[str, Correlation]
    """Correlation of the ranking before the heal with that after it, by `overall`, `likelihood` and `generation`."""
    num_items: int
    """Different items behind what the plans are ranked by."""
    winner_before: str
    winner_after: str
    difference: Interval
    """Value of winner_after less that of winner_before, both after the heal, over the same items."""

    @property
    def held(self) -> bool:
        """Whether the plan that was first before the heal is first after it."""
        return self.winner_before == self.winner_after


@dataclass(frozen=True)
class HealedPlan:
    """One plan that was searched, and the layers it comes to."""

    name: str
    settings: dict[str, Any]
    """Settings as the section prune would hold them."""
    drop: tuple[int, ...]
    edits: Edits
    reason: str
    num_layers: int
    """Layers of the student."""
    same_as: str | None
    """The plan that comes to the same layers and was healed in its place."""


@dataclass(frozen=True)
class SearchResult(Artifact):
    """search.json: the plans, how they rank before and after the heal, and the winner."""

    FILE: ClassVar[str] = "search.json"

    num_tokens: int
    """Tokens of healing per plan, rounded up to whole steps."""
    plans: tuple[HealedPlan, ...]
    """Plans in the order of the recipe."""
    ranking: Ranking

    @property
    def winner(self) -> HealedPlan:
        """The best plan after the heal."""
        return next(plan for plan in self.plans if plan.name == self.ranking.winner_after)
