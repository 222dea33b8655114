"""distill.json: how a student was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.artifacts.artifact import Artifact, Json, Tabular


@dataclass(frozen=True, repr=False)
class Training(Tabular, Artifact):
    """distill.json: how the student was trained; written when distilled/ is complete. Of the control: control/.

    Example:
        >>> shoal.Training.load("runs/mine").num_tokens
    """

    FILE: ClassVar[str] = "distill.json"
    INTERNAL = ("settings",)
    model: ClassVar[Any] = None
    """The trained student, where it is in memory: of what shoal.distill gives."""

    num_steps: int
    num_tokens: int
    """Tokens that the student was trained on, over all ranks."""
    seconds: float
    history: tuple[dict[str, float], ...]
    """Logged values by step: `step`, `loss`, each loss term, `learning_rate`, `grad_norm`, ..."""
    settings: dict[str, Json]
    """Training arguments and DeepSpeed configuration as resolved."""
    data: dict[str, Json]
    """Documents, tokens, truncations and drops by source."""
    peak_memory_bytes: int
    """Bytes at the peak of the largest rank."""

    def of(self, model: Any) -> Training:
        """The same, which knows its model."""
        object.__setattr__(self, "model", model)
        return self

    def title(self) -> str:
        """How long it was."""
        return f"{self.num_steps:,} steps, {self.num_tokens:,} tokens, {self.seconds:,.0f} s"

    def rows(self) -> list[dict[str, Any]]:
        """One row per logged step, with the tokens trained on until then."""
        per_step = self.num_tokens / max(1, self.num_steps)
        return [{"step": row["step"], "num_tokens": round(row["step"] * per_step), **row} for row in self.history]
