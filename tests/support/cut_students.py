"""Plans of students, and the names of what they train."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.recipe.edits import Edits


def plan(*drop: int, num_layers: int = 10, edits: tuple[dict[str, Any], ...] = ()) -> PruningPlan:
    return PruningPlan(
        Provenance({}), num_layers=num_layers, drop=drop, reason="", edits=TypeAdapter(Edits).validate_python(edits)
    )


def names(student: Any) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}
