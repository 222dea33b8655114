"""How long the student's samples become, and what the curves tell of them.

A cut model's writing breaks off into a repeated end (ShortOPD, arXiv 2607.13124). What stands behind such a break
teaches little, and the time for it is lost, so samples grow with what the student can hold.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.recipe.distill import OnPolicy
from shoal.runtime import together

from .loops import Sample

log = logging.getLogger(__name__)

KEPT_SHARE = 0.9
"""Of the exponential mean, what a step leaves."""
LEAST_TOKENS = 16
"""Shortest horizon: in fewer tokens loops could hardly be told from words that come three times."""
MANY_LOOPS = 0.3
"""Share of looping texts in the first on-policy step above which the student should have learnt more before."""


class Horizon:
    """Tokens of the next samples, and counts since the last reading of the curves. The same on every rank."""

    def __init__(self, settings: OnPolicy) -> None:
        self._settings = settings
        self._mean = float(settings.longest_sample if settings.horizon is None else settings.horizon.start)
        self._num_steps = 0
        self._counts = Counter[str]()

    @property
    def new_tokens(self) -> int:
        """Most tokens that the student writes after a prompt in the next on-policy step."""
        horizon = self._settings.horizon
        if horizon is None:
            return self._settings.new_tokens
        return min(horizon.max, max(least_tokens(self._settings), math.ceil(self._mean)))

    def observe(self, own: Sequence[Sample], *, end_ids: Sequence[int], step: int) -> None:
        """Learn from a step, of which this rank has these samples; every rank calls this.

        Warns of a first on-policy step full of loops.
        """
        cuts = self._settings.loops == "cut"
        facts = [
            (
                sample.effective_length,
                sample.loop is not None,
                sample.tokens[-1] in end_ids,
                sample.kept_tokens if cuts else len(sample.tokens),
            )
            for sample in own
        ]
        lengths, loops, ended, learnt = zip(
            *(fact for of_rank in together(lambda: facts) for fact in of_rank), strict=True
        )
        counts = {"steps": 1, "texts": len(lengths), "loops": sum(loops), "ended": sum(ended), "learnt": sum(learnt)}
        self._counts.update(counts)
        rate = counts["loops"] / counts["texts"]
        if self._num_steps == 0 and rate > MANY_LOOPS:
            log.warning(
                "step %d, the first on what the student writes: %.0f %% of its texts end in a loop, so that most of "
                "them would teach little. Raise distill.on_policy.start (now %g), train longer before, or cut less",
                step + 1,
                100 * rate,
                self._settings.start,
            )
        self._num_steps += 1
        if (horizon := self._settings.horizon) is not None:
            length = np.quantile(lengths, horizon.quantile)
            self._mean = KEPT_SHARE * self._mean + (1 - KEPT_SHARE) * horizon.slack * float(length)

    def read_curves(self) -> dict[str, float]:
        """The horizon, and of the steps since the last reading: shares of texts that end in a loop and with an end
        token, and learnt tokens per step. Only the horizon where there was none."""
        counts, self._counts = self._counts, Counter[str]()
        curves = {"on_policy/horizon": float(self.new_tokens)}
        if counts["steps"]:
            curves |= {
                "on_policy/loop_rate": counts["loops"] / counts["texts"],
                "on_policy/end_rate": counts["ended"] / counts["texts"],
                "on_policy/kept_tokens": counts["learnt"] / counts["steps"],
            }
        return curves

    def state(self) -> dict[str, Any]:
        """What steps have changed, for a checkpoint."""
        return {"mean": self._mean, "num_steps": self._num_steps, "counts": dict(self._counts)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        self._mean, self._num_steps, self._counts = state["mean"], state["num_steps"], Counter(state["counts"])


def least_tokens(settings: OnPolicy) -> int:
    """Fewest tokens that the student may write after a prompt in any step."""
    return settings.new_tokens if settings.horizon is None else min(LEAST_TOKENS, settings.horizon.start)
