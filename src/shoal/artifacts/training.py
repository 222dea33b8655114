"""distill.json: how a student was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.artifacts.artifact import Artifact, Json, Tabular


@dataclass(frozen=True, repr=False)
class Training(Tabular, Artifact):
    """distill.json: the training of the student, written after distilled/. The control's is control/distill.json.

    Example:
        >>> shoal.Training.load("runs/mine").num_tokens
    """

    FILE: ClassVar[str] = "distill.json"
    INTERNAL = ("settings",)
    model: ClassVar[Any] = None
    """The trained student; None unless this is the result of shoal.distill."""

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
        """Attach ``model``, and return self."""
        object.__setattr__(self, "model", model)
        return self

    def title(self) -> str:
        """Steps, tokens and seconds, in one line."""
        return f"{self.num_steps:,} steps, {self.num_tokens:,} tokens, {self.seconds:,.0f} s"

    def rows(self) -> list[dict[str, Any]]:
        """One row per logged step, with the number of tokens up to this step."""
        per_step = self.num_tokens / max(1, self.num_steps)
        return [{"step": row["step"], "num_tokens": round(row["step"] * per_step), **row} for row in self.history]
