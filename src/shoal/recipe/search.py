"""Plans that are healed before one is chosen: the recipe's section `search`, and what it must not say.

Scores of a cut model say little about what a short training makes of it, so plans are compared after each of them has
had the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from shoal.atomic_files import fingerprint
from shoal.recipe.edits import Edits
from shoal.recipe.prune import NOT_BESIDE_DROP, Weight
from shoal.recipe.section import Positive, Section, Shapes, Text

NAME = r"^[A-Za-z0-9][\w.-]*$"
LONGEST_NAME = 48


@dataclass(frozen=True)
class SearchPlan(Section):
    """One plan to be healed. What is not said here is as in the section prune, as far as it goes together."""

    name: Annotated[str, Field(pattern=NAME)] | None = None
    """Name of its run directory, RUN_DIR/search/NAME; None = made of its settings."""
    drop: tuple[int, ...] | None = None
    """As prune.drop."""
    metric: str | None = None
    """As prune.metric."""
    weights: dict[str, Weight] = field(default_factory=dict)
    """As prune.weights."""
    num_drop: Positive | None = None
    """Layers to drop; where neither it nor ratio is said and prune.drop names layers, as many as those."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """As prune.ratio."""
    contiguous: bool | None = None
    """As prune.contiguous."""
    protect: tuple[int | Literal["cornerstone"], ...] | None = None
    """As prune.protect."""
    protect_heads: Annotated[float, Field(gt=0, le=1)] | None = None
    """As prune.protect_heads."""
    spare: tuple[Text, ...] | None = None
    """As prune.spare."""
    edits: Edits | None = None
    """As prune.edits."""

    def __post_init__(self) -> None:
        if self.drop is not None:
            for name in NOT_BESIDE_DROP:
                if self.says.get(name):
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
            name = "-".join(["drop", *map(str, self.drop)])
            return name if len(name) <= LONGEST_NAME else f"drop-{len(self.drop)}-{fingerprint(list(self.drop))[:8]}"
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
    """Tasks, abilities or `ability/protocol` whose mean ranks the plans, each name counting the same; none = what is
    kept outside the form of training text: the mean over the columns twin, out and public, in each of likelihood and
    of generated text."""


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
