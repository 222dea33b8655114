"""What of the student's samples teaches nothing, because it has fallen into a loop there.

Given two copies of a piece a teacher mostly expects the third, and then agrees with all that follows. Where it does
not, it teaches the way out. So it is asked, and before the loss: every micro-batch's loss is divided by the learnt
tokens of the whole step, of which none can be taken away once the loss of the first is made. For that the teacher reads
the rows that hold a loop a second time, without gradients: little beside the sampling, which is a forward for every
written token, and nothing where no text loops.

B rows, S sequence, N tokens of loops.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.data.packing import IGNORED
from shoal.data.repetition import Loop, loop_at_end
from shoal.recipe.distill import OnPolicy
from shoal.runtime import together

from ..objective.host_batch import ON_HOST, OnHost, on_host, queued

log = logging.getLogger(__name__)

LONGEST_PERIOD = 64
"""Most tokens of a piece whose copies make a loop."""
GOES_ALONG = math.log(0.5)
"""Mean log-probability of a loop's tokens, in nats, above which the teacher itself would go on with it."""
MANY_LOOPS = 0.3
"""Share of looping texts in the first on-policy step above which the student should have learnt more before."""
LogProbs = Callable[[Mapping[str, Any], Tensor], Tensor]
"""A micro-batch and N places in its flattened rows, on the host; the teacher's log-probabilities, in nats, of the
tokens there, (N,)."""


@dataclass(frozen=True)
class Sample:
    """A text of the student as it stands in a row: what did not fit there does not count."""

    row: int
    start: int
    """Place of its first written token in the row."""
    tokens: list[int]
    loop: Loop | None
    """What it ends in."""

    @property
    def kept_tokens(self) -> int:
        """Tokens up to the end of the loop's second copy; all, where there is none."""
        return len(self.tokens) if self.loop is None else self.loop.start + 2 * self.loop.period

    @property
    def repeats(self) -> slice:
        """Places behind that in the row."""
        return slice(self.start + self.kept_tokens, self.start + len(self.tokens))


def samples_in(host: OnHost) -> list[Sample]:
    """The texts in a micro-batch of samples: between two of them stands a prompt, which is not learnt."""
    samples = []
    for row, labels_S in enumerate(host.labels_BS.numpy()):
        borders = np.flatnonzero(np.diff(labels_S != IGNORED, prepend=False, append=False))
        for start, stop in borders.reshape(-1, 2).tolist():
            tokens = labels_S[start:stop].tolist()
            samples.append(Sample(row, start, tokens, loop_at_end(tokens, longest_period=LONGEST_PERIOD)))
    return samples


def confirmed(batch: Mapping[str, Any], samples: Sequence[Sample], log_probs: LogProbs) -> list[Sample]:
    """The samples, those loops left out that the teacher would not go on with. ``log_probs`` is called once, for the
    rows that hold a loop, or for any row where none does."""
    looping = [sample for sample in samples if sample.loop is not None]
    rows = sorted({sample.row for sample in looping}) or [0]
    host = on_host(batch)
    assert host.input_ids_BS is not None
    planes = {"input_ids": host.input_ids_BS, "position_ids": host.position_ids_BS, "labels": host.labels_BS}
    part = {name: plane[rows] for name, plane in planes.items()}
    device, width = batch["input_ids"].device, host.labels_BS.shape[1]
    places = [torch.arange(width)[sample.repeats] + width * rows.index(sample.row) for sample in looping]
    of_part = {**{name: queued(plane, device) for name, plane in part.items()}, ON_HOST: on_host(part)}
    log_probs_N = log_probs(of_part, torch.cat([torch.arange(0), *places])).cpu()
    means = [of_loop.mean().item() for of_loop in log_probs_N.split([len(of_loop) for of_loop in places])]
    refused = {id(sample) for sample, mean in zip(looping, means, strict=True) if mean <= GOES_ALONG}
    return [replace(sample, loop=None) if id(sample) in refused else sample for sample in samples]


def without_repeats(batch: dict[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """The micro-batch without labels behind the second copy of any loop."""
    host = on_host(batch)
    labels_BS = host.labels_BS.clone()
    for sample in samples:
        labels_BS[sample.row, sample.repeats] = IGNORED
    device = batch["labels"].device
    return {**batch, "labels": queued(labels_BS, device), ON_HOST: replace(host, labels_BS=labels_BS)}


class LoopCounts:
    """What the curves tell of samples, counted since they were last read. The same on every rank."""

    def __init__(self, settings: OnPolicy) -> None:
        self._settings = settings
        self._num_steps = 0
        self._counts = Counter[str]()

    def observe(self, own: Sequence[Sample], *, end_ids: Sequence[int], step: int) -> None:
        """Count a step, of which this rank has these samples; every rank calls this.

        Warns of a first on-policy step full of loops.
        """
        facts = [(sample.loop is not None, sample.tokens[-1] in end_ids, sample.kept_tokens) for sample in own]
        loops, ended, learnt = zip(*(fact for of_rank in together(lambda: facts) for fact in of_rank), strict=True)
        counts = {"steps": 1, "texts": len(loops), "loops": sum(loops), "ended": sum(ended), "learnt": sum(learnt)}
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

    def read_curves(self) -> dict[str, float]:
        """Of the steps since the last reading: shares of texts that end in a loop and with an end token, and learnt
        tokens per step. Nothing where there was none."""
        counts, self._counts = self._counts, Counter[str]()
        if not counts["steps"]:
            return {}
        return {
            "on_policy/loop_rate": counts["loops"] / counts["texts"],
            "on_policy/end_rate": counts["ended"] / counts["texts"],
            "on_policy/kept_tokens": counts["learnt"] / counts["steps"],
        }

    def state(self) -> dict[str, Any]:
        """What steps have changed, for a checkpoint."""
        return {"num_steps": self._num_steps, "counts": dict(self._counts)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        self._num_steps, self._counts = state["num_steps"], Counter(state["counts"])
