"""Which result is meant: where it lies, and what must have made it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from shoal.artifacts.artifact import Artifact, Json, Provenance, differences
from shoal.errors import UserError

log = logging.getLogger(__name__)

A = TypeVar("A", bound=Artifact)


def step_of(checkpoint: Path) -> int:
    """The number of steps in the name of a ``checkpoint``; -1 without one."""
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def refuse_other_training(checkpoint: Path, changed: list[str]) -> None:
    """Refuse to resume from a ``checkpoint`` of another run, whose inputs were ``changed``, in words."""
    if changed:
        raise UserError(
            f"{checkpoint}: belongs to another run: {'; '.join(changed)}. Set the recipe back, choose another "
            f"run_dir, or delete {checkpoint.parent} to train from the beginning"
        )


@dataclass(frozen=True)
class Identity(Generic[A]):
    """One result of a run directory, whether it is there or not."""

    kind: type[A]
    path: Path
    inputs: dict[str, Json]
    """Everything that shapes it, as Provenance.inputs: two results are the same one exactly when these are equal."""
    stage: str
    """What makes it: `measure`, for the log and for `shoal measure`."""

    @property
    def provenance(self) -> Provenance:
        """That of the result which is made now."""
        return Provenance(self.inputs)

    def changed(self) -> list[str] | None:
        """What made the result that is there otherwise, in words: nothing where it is this one; None where there is no
        result.

        Raises:
            UserError: as Artifact.load.
        """
        if not self.path.exists():
            return None
        return differences(self.inputs, self.kind.load(self.path).provenance.inputs)

    def is_there(self) -> bool:
        """Whether the file holds exactly this result."""
        return self.changed() == []

    def is_done(self) -> bool:
        """The same, which is logged, or what changed."""
        if changed := self.changed():
            log.info("%s: %s is out of date (%s); producing it again", self.stage, self.path.name, "; ".join(changed))
        elif changed is not None:
            log.info("%s: done already (%s)", self.stage, self.path)
        return changed == []

    def require(self) -> A:
        """The result.

        Raises:
            UserError: anything else made what is there, naming the fields that differ, or as Artifact.load.
        """
        result = self.kind.load(self.path)
        if changed := differences(self.inputs, result.provenance.inputs):
            # which knows its settings: a model named once more does not
            remedy = f"Name the run directory itself, run `shoal {self.stage}` again, or set run_dir to another folder"
            raise UserError(f"{self.path}: belongs to another run: {'; '.join(changed)}. {remedy}")
        return result
