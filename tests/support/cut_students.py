"""Plans of students, and the names of what they train."""

from __future__ import annotations

from typing import Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan, PlannedChange


def plan(*drop: int, num_layers: int = 10, changes: tuple[PlannedChange, ...] = ()) -> Plan:
    return Plan(Provenance({}), num_layers, drop, "", changes=changes)


def names(student: Any) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}
