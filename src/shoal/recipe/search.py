"""Heal, then choose: what a search over plans is told, and what it finds.

Scores of a cut model say little about what a short training makes of it, so plans are compared after each of them has
had the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from shoal.artifacts.artifact import Artifact
from shoal.atomic_files import fingerprint
from shoal.recipe.edits import Edits
from shoal.recipe.section import Positive, Section, Shapes, Text

NAME = r"^[A-Za-z0-9][\w.-]*$"
LONGEST_NAME = 48
PERPLEXITY = "perplexity"
"""The column that is there whatever the tasks are."""


@dataclass(frozen=True)
class SearchPlan(Section):
    """One plan to be healed. What is not said here is as in the section prune, as far as it goes together."""

    name: Annotated[str, Field(pattern=NAME)] | None = None
    """Name of its run directory, RUN_DIR/search/NAME; None = made of its settings."""
    drop: tuple[int, ...] | None = None
    metric: str | None = None
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = field(default_factory=dict)
    num_drop: Positive | None = None
    """Layers to drop; where neither it nor ratio is said and prune.drop names layers, as many as those."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    contiguous: bool | None = None
    protect: tuple[int | Literal["cornerstone"], ...] | None = None
    spare: tuple[Text, ...] | None = None
    edits: Edits | None = None

    def __post_init__(self) -> None:
        if self.drop is not None:
            for name in ("metric", "weights", "num_drop", "ratio", "contiguous", "spare"):
                if getattr(self, name):
                    raise ValueError(f"{name} has no effect beside drop; give one of them")
        if self.num_drop is not None and self.ratio is not None:
            raise ValueError("num_drop and ratio are both given; give one of them")
        if self.weights and (self.metric is not None or self.contiguous):
            other = "metric" if self.metric is not None else "contiguous"
            raise ValueError(f"weights and {other} do not go together; give one of them")

    @property
    def says(self) -> dict[str, Any]:
        """What this plan sets itself, but for its name."""
        values = {key: value for key, value in vars(self).items() if key != "name"}
        return {key: value for key, value in values.items() if value is not None and value != {}}

    @property
    def called(self) -> str:
        """Its name, or one made of how its layers are chosen."""
        if self.name is not None:
            return self.name
        if self.drop is not None:
            made = "-".join(["drop", *map(str, self.drop)])
            return made if len(made) <= LONGEST_NAME else f"drop-{len(self.drop)}-{fingerprint(list(self.drop))[:8]}"
        parts = ["mix", *self.weights] if self.weights else [self.metric or "own"]
        if self.contiguous is not None:
            parts.append("run" if self.contiguous else "single")
        parts += [f"{amount:g}" for amount in (self.num_drop, self.ratio) if amount is not None]
        return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-._") or "own"


@dataclass(frozen=True)
class Search(Section):
    """Several plans, each healed for the same few tokens, ranked by what they can do then."""

    plans: Annotated[tuple[SearchPlan, ...], Field(min_length=2), Shapes.BY_CONTENT]
    """Plans that come to the same layers are healed once. `{}` = the plan of the section prune."""
    num_tokens: Annotated[Positive, Shapes.BY_CONTENT] = 50_000
    """Tokens of healing per plan; everything else is as in the section distill."""
    tasks: Annotated[tuple[str, ...], Shapes.BY_CONTENT] = ()
    """Tasks that plans are scored on; none = eval.tasks."""
    limit: Annotated[Positive | None, Shapes.BY_CONTENT] = None
    """Items of every task; None = as eval.limit and eval.limits say."""
    rank_by: Annotated[tuple[Text, ...], Shapes.SEARCH] = ()
    """Tasks, abilities or `ability/protocol` whose mean ranks the plans, each name counting the same; none = the mean
    of what is kept of likelihood scores and of what is kept of generated text."""


def contradictions(search: Search, trainer: Mapping[str, Any]) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express; ``trainer`` = distill.trainer."""
    names: dict[str, int] = {}
    for index, plan in enumerate(search.plans):
        if plan.called in names:
            yield (
                f"search.plans.{index}: is called {plan.called!r} as plan {names[plan.called]} is; give one of them "
                "another name"
            )
        names.setdefault(plan.called, index)
    if "max_steps" in trainer:
        yield "search.num_tokens: has no effect beside distill.trainer.max_steps; leave that out"
    if twice := sorted({name for name in search.rank_by if search.rank_by.count(name) > 1}):
        yield f"search.rank_by: names {twice[0]!r} twice; name every column once"


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
    """Of this column in what ranks the plans; 0 = not in it."""
    no_retention: str
    """Why the share that is kept of the teacher's score above chance means nothing here; empty where it does."""
    agreement: Correlation
    """Of the plans' scores before the heal with those after it."""


@dataclass(frozen=True)
class PlanScore:
    """One plan on one task."""

    task: str
    before: Interval
    after: Interval
    kept_before: Interval | None
    """Of the teacher's score above chance."""
    kept_after: Interval | None


@dataclass(frozen=True)
class Standing:
    """Where one plan stands among the others, before or after the heal."""

    value: Interval
    """What it is ranked by, in the ranking's unit."""
    rank: int
    """1 = best; equal values share a rank."""
    likelihood: Interval | None
    """Mean share kept of the teacher's scores above chance, over the tasks with this protocol; None = none of them has
    such a share."""
    generation: Interval | None
    behind: Interval
    """Its value less that of the first, over the same items."""


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
    """The best after the heal first."""
    agreement: dict[str, Correlation]
    """`overall`, `likelihood`, `generation`: of the ranking before the heal with that after it."""
    num_items: int
    """Different items behind what the plans are ranked by."""
    winner_before: str
    winner_after: str
    difference: Interval
    """After the heal: the value of winner_after less that of winner_before, over the same items."""

    @property
    def held(self) -> bool:
        """Whether the plan that was first before the heal is first after it."""
        return self.winner_before == self.winner_after


@dataclass(frozen=True)
class HealedPlan:
    """What was searched: one plan and the layers it comes to."""

    name: str
    settings: dict[str, Any]
    """As the section prune would hold them."""
    drop: tuple[int, ...]
    edits: Edits
    reason: str
    num_layers: int
    """Of the student."""
    same_as: str | None
    """The plan that comes to the same layers and was healed in its place."""


@dataclass(frozen=True)
class SearchResult(Artifact):
    """search.json: the plans, how they rank before and after the heal, and the winner."""

    FILE: ClassVar[str] = "search.json"

    num_tokens: int
    """Of healing per plan, rounded up to whole steps."""
    plans: tuple[HealedPlan, ...]
    """In the order of the recipe."""
    ranking: Ranking

    @property
    def winner(self) -> HealedPlan:
        """The best plan after the heal."""
        return next(plan for plan in self.plans if plan.name == self.ranking.winner_after)
