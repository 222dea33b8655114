"""A change of a model's layers: what every change knows of itself, so that nothing else has to know its kind.

A recipe lists its changes in the order in which they act; apply.KINDS has the class of each. What does not go together
stands in one table, src/shoal/recipe/not_together.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.plan import Plan
from shoal.recipe.measure import Measure

from ..metrics.metric import Calibration
from ..surgery.teacher import Teacher

Tensors = Mapping[str, Tensor]
"""New tensors of one layer, by their names in it."""
InForce = Callable[[PreTrainedModel], AbstractContextManager[object]]
"""A block in which a teacher answers as it will when it is changed."""


@dataclass(frozen=True)
class NewTensors:
    """What a change has made of a teacher."""

    plan: Plan
    """The plan, with what was found."""
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """The teacher's layers that stay and get new tensors -> which."""
    load: Callable[[int], Tensors] = lambda _: {}
    """The new tensors of one of these layers."""
    in_force: InForce = lambda _: nullcontext()
    """In which the teacher answers as it will with these."""
    of_later: Callable[[int, Tensors], Tensors] = lambda _, tensors: tensors
    """What is left of the tensors that a later change has made for a layer of the teacher."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the student's configuration says of it beside its sizes."""


class Change(Protocol):
    """One change, as a recipe asks for it."""

    IS_ROUNDED: ClassVar[bool]
    """Whether the student's answers are the teacher's with the change in force up to rounding only."""

    def num_tokens(self, teacher: PreTrainedModel, plan: Plan, settings: Measure) -> int:
        """Tokens of text that it is decided on: as many as a measurement by ``settings`` reads, as far as these are no
        more than it gains by, and as many as it needs; ``teacher`` is without weights."""
        ...

    def sizes(self, teacher: Teacher, plan: Plan) -> Teacher:
        """``teacher`` by its configuration and headers as if it were changed.

        Raises:
            UserError: what shows there to be impossible.
        """
        ...

    def tensors(self, teacher: Teacher, plan: Plan, text: Calibration, before: InForce | None) -> NewTensors:
        """The new tensors, made from ``teacher`` as it is and decided on ``text``; ``before`` are the changes that act
        before it, None where there are none.

        Raises:
            UserError: what shows to be impossible when the model runs.
        """
        ...

    def words(self, teacher: PreTrainedModel, plan: Plan, num_tokens: int) -> str:
        """What a dry run says of it, decided on so many tokens; ``teacher`` is without weights."""
        ...
