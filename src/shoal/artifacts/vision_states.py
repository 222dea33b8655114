"""vision_states.json: how alike the states of a vision tower are, and what answers lose where another one is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.artifacts.artifact import Artifact
from shoal.artifacts.tables import Tabular

UNTRAINED = (
    "The projector was trained on what is read and on no other state, and nothing here tells its part of these losses "
    "from the state's: what another state is worth shows once a projector is trained for it, which shoal does not do"
)
LEAST_COSTLY = 3
"""States that are named in words."""


@dataclass(frozen=True)
class VisionStates(Tabular, Artifact):
    """vision_states.json. State n is the one after n blocks of the tower; V states."""

    FILE: ClassVar[str] = "vision_states.json"

    states_read: tuple[int, ...]
    """What the projector is given, in its order."""
    num_rows: int
    """Images with a question and an answer."""
    similarity: tuple[tuple[float, ...], ...]
    """V x V: cosine of two states at one place of an image, the mean over all places of all images."""
    losses: tuple[float, ...]
    """Rise of the answer's mean negative log-likelihood where this state is read in place of the deepest one, the mean
    over rows in nats; 0 for that one."""
    errors: tuple[float | None, ...]
    """Standard errors of ``losses``; None = one row does not tell."""

    @property
    def deepest_read(self) -> int:
        """The state that others are read in place of."""
        return max(self.states_read)

    def rows(self) -> list[dict[str, Any]]:
        """One row per state: its cosine with the deepest one that is read, and what answers lose by it."""
        like = self.similarity[self.deepest_read]
        names = ("similarity_to_read", "loss", "loss_error")
        columns = zip(like, self.losses, self.errors, strict=True)
        return [{"state": state, **dict(zip(names, values, strict=True))} for state, values in enumerate(columns)]

    def in_words(self) -> str:
        """The states whose reading costs least, and what that does not say."""
        others = sorted(set(range(len(self.losses))) - {self.deepest_read}, key=self.losses.__getitem__)
        parts = [self._loss_text(state) for state in others[:LEAST_COSTLY]]
        read = ", ".join(map(str, self.states_read))
        return (
            f"states of the vision tower over {self.num_rows} rows: {read} of {len(self.losses) - 1} "
            f"{'is' if len(self.states_read) == 1 else 'are'} read; in place of {self.deepest_read} an answer loses "
            f"by state {', '.join(parts)} nats. {UNTRAINED}"
        )

    def _loss_text(self, state: int) -> str:
        error = self.errors[state]
        return f"{state} {self.losses[state]:+.3f}" + ("" if error is None else f" +/- {1.96 * error:.3f}")

    def contradictions(self) -> Iterator[str]:
        count = len(self.losses)
        if count < 2:
            yield f"losses: is {list(self.losses)}; a tower has a state before its first block and one behind its last"
        if not self.states_read or not all(0 <= state < count for state in self.states_read):
            yield f"states_read: is {list(self.states_read)}; it names states from 0 to {count - 1}"
        if len(self.errors) != count:
            yield f"errors: has {len(self.errors)} entries for {count} states"
        if [len(row) for row in self.similarity] != [count] * count:
            yield f"similarity: is not {count} by {count}"
