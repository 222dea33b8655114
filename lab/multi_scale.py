"""Train the run's student on pooled states of late layers, beside the recipe's losses.

B batch, S sequence, D hidden, N counted tokens, W windows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.launch.verbs.run import Run
from shoal.models.document_masks import document_starts
from shoal.recipe.losses import HiddenStates, StateTerm
from shoal.recipe.section import Section
from shoal.train.objective.host_batch import queued
from shoal.train.objective.layer_losses import Captured, StateLosses, Tokens, again, distances

from .local_heal import described, train

WINDOW = 4
"""Neighbouring tokens of a document whose states are averaged where a term is multi-scale."""


@dataclass(frozen=True, kw_only=True)
class MultiScale(StateTerm):
    """States as hidden_states compares them; early layers match those of tokens, the upper half of the student those
    pooled over neighbouring tokens (Wang et al. 2023, arXiv:2303.05251)."""

    kind: Literal["multi_scale"] = "multi_scale"
    map: Literal["gap_closing", "own"] = "gap_closing"
    """As hidden_states has it."""
    distance: Literal["mse", "cosine"] = "mse"
    """As hidden_states has it."""

    @property
    def plain(self) -> HiddenStates:
        """The term that compares tokens everywhere."""
        return HiddenStates(weight=self.weight, layers=self.layers, map=self.map, distance=self.distance)


@dataclass(frozen=True)
class Settings(Section):
    """What is trained on beside the recipe's losses."""

    term: MultiScale = MultiScale()
    """Layers, weight and distance of it."""


def work(run: Run, settings: Settings) -> str:
    """Train the run's student with this term into lab/multi_scale; say what became of it."""
    spec, inputs = described(run, "multi_scale", settings)
    own = spec.settings.with_losses(lambda losses: (*losses, settings.term))
    spec = dataclasses.replace(spec, settings=own, state_losses=MultiScaleLosses)
    return train(run, spec, inputs, run.dir / "lab" / "multi_scale")


@dataclass(frozen=True)
class Neighbours(Tokens):
    """Which tokens count, and which of them lie in one window."""

    per_window_W: Tensor
    """Counted tokens of every window that has some. Windows are tokens 0 to 3, 4 to 7, ... of a document."""

    @classmethod
    def of(cls, labels_BS: Tensor, position_ids_BS: Tensor, device: torch.device) -> Neighbours:
        plain, first_BS = Tokens.of(labels_BS, position_ids_BS, device), document_starts(position_ids_BS)
        # a running number of windows over the flattened tokens: one begins with a document and at every WINDOW tokens
        window = (first_BS | (position_ids_BS % WINDOW == 0)).flatten().cumsum(0)
        places = torch.tensor(plain.counted, dtype=torch.long, device=window.device)
        _, per_window_W = window[places].unique_consecutive(return_counts=True)
        return cls(plain.counted_N, plain.counted, queued(per_window_W, device))


class MultiScaleLosses(StateLosses):
    """The core's losses on states, and this one."""

    def pairs(self, term: StateTerm) -> tuple[tuple[int, int], ...]:
        return super().pairs(term.plain if isinstance(term, MultiScale) else term)

    def tokens(self, labels_BS: Tensor, position_ids_BS: Tensor, device: torch.device) -> Neighbours:
        return Neighbours.of(labels_BS, position_ids_BS, device)

    def pair_sum(
        self, term: StateTerm, pair: tuple[int, int], student: Captured, teacher: Captured, tokens: Tokens
    ) -> Tensor:
        if not isinstance(term, MultiScale):
            return super().pair_sum(term, pair, student, teacher, tokens)
        if 2 * pair[0] < len(self.plan.keep):
            return super().pair_sum(term.plain, pair, student, teacher, tokens)
        return again(_pooled_sum, *self.states(pair, student, teacher), tokens, term.distance)


def _pooled_sum(student_BSD: Tensor, teacher_BSD: Tensor, tokens: Neighbours, distance: str) -> Tensor:
    """Every counted token has the distance of its window's mean states; a window's mean is that of its counted tokens.

    Coarser targets for late layers: local multi-scale reconstruction (Wang et al. 2023, arXiv:2303.05251).
    """
    if not len(tokens.per_window_W):
        return distances(tokens.of_states(student_BSD), tokens.of_states(teacher_BSD), distance).sum()
    ours_WD, theirs_WD = (
        # unsafe: a look at the lengths would wait for the device
        torch.segment_reduce(tokens.of_states(states_BSD), "mean", lengths=tokens.per_window_W, unsafe=True)
        for states_BSD in (student_BSD, teacher_BSD)
    )
    # weighted by its counted tokens, so that a term's sum stays one over tokens
    return (distances(ours_WD, theirs_WD, distance) * tokens.per_window_W).sum()
