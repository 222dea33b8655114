"""A pilot: the first steps of a training, after which the rest of the tokens is shared by what each source regains.

A large damage may be one that no token of its source brings back, and a small one may be gone soon. So the student is
looked at three times on the samples that damage was measured on: before the first step, after half of the pilot, and
after all of it. With x tokens of a source in the whole pilot (x / 2 in its first half, since shares are constant in it)
and g its nats regained since the first look,

    g(x) = A (1 - exp(-x / tau))

goes through both later points: g(x) / g(x / 2) = 1 + exp(-x / (2 tau)). What one more token regains is the slope of g
at x. Where that ratio is 2 or more nothing levels off yet, and the slope is g(x) / x; where it is 1 or less all that
comes back has come back, and the slope is 0. The rest of the tokens is shared by weight times slope, as it was by
weight times damage.

What is seen is written down before the checkpoint of its step, and the rows behind the pilot are packed from it, so
that a training that was killed anywhere goes on as if it had not been.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from shoal.artifacts.artifact import differences
from shoal.artifacts.shares import Pilot, PilotPoint
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.recipe.distill import Distill
from shoal.runtime import agreed, barrier, is_main

from .damage import shares_of
from .student.spec import TrainSpec

log = logging.getLogger(__name__)

MILLION = 1e6


@dataclass(frozen=True)
class Beginning(PackedRows):
    """The rows of a pilot, for a loader that counts the steps of the whole training and reads a little ahead."""

    length: int = 0
    """Rows of the whole training; behind those that there are they begin again, and no step comes to that."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return super().__getitem__(row % len(self.input_ids_NS))

    @classmethod
    def of(cls, rows: PackedRows, *, length: int) -> Beginning:
        """``rows`` as the first of ``length``."""
        return cls(**{each.name: getattr(rows, each.name) for each in fields(PackedRows)}, length=length)


def pilot_steps(spec: TrainSpec) -> int:
    """Optimizer steps of the pilot: an even number.

    Raises:
        UserError: no step would be left after them.
    """
    assert spec.settings.data_pilot is not None
    steps = 2 * math.ceil(spec.settings.data_pilot / (2 * spec.tokens_per_step))
    if steps >= spec.num_steps:
        raise UserError(
            f"distill.data_pilot: {spec.settings.data_pilot} tokens are {steps} steps (an even number), and the "
            f"training has {spec.num_steps}; lower it or raise distill.num_tokens"
        )
    return steps


def pilot_rows(spec: TrainSpec) -> int:
    """Rows of the pilot."""
    return pilot_steps(spec) * spec.tokens_per_step // spec.settings.sequence_length


def known_pilot(file: Path, inputs: dict[str, Any], *, step: int) -> Pilot | None:
    """The pilot of this training in ``file``, if it is over or as far as it had come at optimizer step ``step``; None =
    it begins.

    Raises:
        UserError: it is gone or another training's, and training has gone on without it.
    """

    def read() -> Pilot | None:
        if not file.is_file() or differences(inputs, Pilot.read(file).provenance.inputs):
            return None
        return Pilot.read(file)

    pilot = agreed(read)
    if step and (pilot is None or (not pilot.shares and step >= pilot.num_steps)):
        raise UserError(
            f"{file}: is gone or another training's, and the checkpoint of step {step} goes on from it; delete the "
            "folder checkpoints to train from the beginning, or choose another run_dir"
        )
    if pilot is None or pilot.shares:
        return pilot
    if not step:
        return None
    return replace(pilot, points=tuple(point for point in pilot.points if point.step <= step))


def slope(half: float, whole: float, num_tokens: int) -> float:
    """Nats that one more token regains, with ``half`` and ``whole`` regained by half of ``num_tokens`` and by all."""
    if whole <= 0 or num_tokens == 0:
        return 0.0
    left = whole / half - 1 if half > 0 else 1.0  # exp(-x / (2 tau))
    if left >= 1:
        return whole / num_tokens
    if left <= 0:
        return 0.0
    tau = num_tokens / (-2 * math.log(left))
    return whole / (1 - left**2) / tau * left**2


class PilotWatch(TrainerCallback):
    """Looks at the student before the pilot, in its middle and at its end, where training stops with a checkpoint."""

    def __init__(
        self,
        pilot: Pilot,
        file: Path,
        by_weight: Distill,
        settings: Distill,
        *,
        counts: dict[str, dict[str, int]],
        look: Callable[[PreTrainedModel], list[float]],
    ) -> None:
        """``pilot`` is what there is of it so far, and goes to ``file``. ``by_weight`` has the recipe's weights of the
        sources, ``settings`` the pilot's shares; ``counts`` are those of the pilot's rows. ``look`` gives nats per
        token by source."""
        self.pilot, self._file, self._look_at = pilot, file, look
        self._weights, self._shares = ([source.weight for source in each.data] for each in (by_weight, settings))
        self._tokens = tuple(counts[name]["tokens"] for name in pilot.sources)
        self.through: Callable[[Callable[[PreTrainedModel], list[float]]], list[float]]
        """Calls a look with the student whole and plain, which the trainer can make."""

    @property
    def is_over(self) -> bool:
        """Whether the shares of the steps after the pilot are known."""
        return bool(self.pilot.shares)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.pilot.num_steps // 2, self.pilot.num_steps):
            self._look(state.global_step)
        if state.global_step == self.pilot.num_steps:
            control.should_save = True
            control.should_training_stop = True

    def _look(self, step: int) -> None:
        point = PilotPoint(step, tuple(self.through(self._look_at)))
        self.pilot = replace(self.pilot, points=(*self.pilot.points, point))
        if step == self.pilot.num_steps:
            self.pilot = self._finished(self.pilot)
        if is_main():
            self.pilot.write(self._file)
        barrier()

    def _finished(self, pilot: Pilot) -> Pilot:
        before, half, whole = (point.nats for point in pilot.points)
        slopes = [
            slope(first - middle, first - last, tokens)
            for first, middle, last, tokens in zip(before, half, whole, self._tokens, strict=True)
        ]
        # where nothing was regained there is nothing to go by
        shares = shares_of(self._weights, slopes) if any(slopes) else self._shares
        for name, first, last, value, share in zip(pilot.sources, before, whole, slopes, shares, strict=True):
            log.info(
                "data: %s: %.3f nats per token before the pilot, %.3f after it, %.3g more regained per million tokens: "
                "%.1f %% of the tokens from here on",
                *(name, first, last, MILLION * value, 100 * share),
            )
        per_million = tuple(MILLION * value for value in slopes)
        return replace(pilot, tokens=self._tokens, slopes=per_million, shares=tuple(shares))
