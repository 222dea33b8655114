"""A change of a model's layers: what every change knows of itself, so that nothing else has to know its kind.

A recipe's changes are listed in apply.changes_of, in the order in which they act. Which two do not go together stands
in one table, APART in src/shoal/recipe/prune.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.plan import Plan
from shoal.recipe.prune import Calibration

from ..surgery.teacher import Teacher

Tensors = Mapping[str, Tensor]
"""New tensors of one layer, by their names in it."""


@dataclass(frozen=True)
class NewTensors:
    """What a change has made of a teacher."""

    plan: Plan
    """The plan, with what was found."""
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """The teacher's layers that stay and get new tensors -> which."""
    load: Callable[[int], Tensors] = lambda _: {}
    """The new tensors of one of these layers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the student's configuration says of it beside its sizes."""


class Change(Protocol):
    """One change, as a recipe asks for it."""

    SECTION: ClassVar[str]
    """Its place in the recipe."""
    IS_ROUNDED: ClassVar[bool]
    """Whether the student's answers are the teacher's with the change in force up to rounding only."""

    @property
    def calibration(self) -> Calibration | None:
        """The text that it is decided on; None = none is read."""
        ...

    def sizes(self, teacher: Teacher, plan: Plan) -> Teacher:
        """``teacher`` by its configuration and headers as if it were changed.

        Raises:
            UserError: what shows there to be impossible.
        """
        ...

    def tensors(self, teacher: Teacher, plan: Plan, *, seed: int) -> NewTensors:
        """The new tensors, made from ``teacher`` as it is.

        Raises:
            UserError: what shows to be impossible when the model runs.
        """
        ...

    def in_force(self, model: PreTrainedModel, new: NewTensors) -> AbstractContextManager[object]:
        """A block in which the teacher ``model`` answers as it will when it is changed."""
        ...

    def words(self, teacher: PreTrainedModel, plan: Plan) -> str:
        """What a dry run says of it; ``teacher`` is without weights."""
        ...
