"""States of a vision tower: how alike they are, and what answers lose where another one is read.

N rows, V states, P places of an image (patches, and the class token where the tower has one), D hidden. The question is
that of arXiv:2504.21447, which trains a model anew for every state and finds deep ones good for reading letters and
lower ones for counting and places. Here nothing is trained: see UNTRAINED.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from shoal.data.image_rows import Asked, on_device
from shoal.errors import UserError
from shoal.models.anatomy import given_state, state_of, watched
from shoal.progress import each
from shoal.runtime import together

from ..surgery.vision_tower import FIELD, states_read, tower_blocks
from .images import REMEDY, answer_loss, refuse_no_number, rises
from .metric import Estimates, add_up_ranks, rank, world_size


@dataclass(frozen=True)
class StateScores:
    """What is found of V states."""

    similarity: tuple[tuple[float, ...], ...]
    """V x V: cosine of two states at one place, the mean over all places of all images."""
    losses: Estimates
    """Rise of an answer's loss where a state is read in place of the deepest one that is."""


PLACES_AT_ONCE = 1024
"""Places whose states are compared at a time: of a large picture in tiles, all of them would take gigabytes."""


@torch.no_grad()
def score_vision_states(model: PreTrainedModel, items: Iterable[Asked], num_rows: int) -> StateScores:
    """Cosines of the tower's states, and the rise of an answer's loss for every state read in place of the deepest one.

    The cosine is that of states as they are: a direction that all places share raises it. A model that is given
    several states joined gets the others unchanged. V forwards per row, tower included.

    ``items`` are the rows of this rank, every world_size-th of ``num_rows``; all ranks call this and get the same.

    Raises:
        UserError: a row that cannot be read, or numbers that are not finite.
    """
    blocks, device = tower_blocks(model), model.device
    num_states = len(blocks) + 1
    cosines_VV = torch.zeros(num_states, num_states, dtype=torch.float64, device=device)
    num_places = torch.zeros(1, dtype=torch.float64, device=device)
    losses_NV = torch.zeros(num_rows, num_states, dtype=torch.float64, device=device)
    entries = states_read(model.config)
    deepest = max(entries)

    def score_own_rows() -> None:
        for place, item in enumerate(each(items, "measure: states of the vision tower", unit="rows")):
            number, inputs = rank() + place * world_size(), on_device(item.inputs, device, model.dtype)
            with _states_of(blocks) as states:
                losses_NV[number, deepest] = answer_loss(model, inputs, item.num_answer)
            _add_cosines(states, cosines_VV)
            num_places.add_(states[0].shape[:-1].numel())
            states.clear()
            for state in set(range(num_states)) - {deepest}:
                # a list also where one is read: transformers takes a bare 0 for "no states are asked for"
                read = [state if entry == deepest else entry for entry in entries]
                losses_NV[number, state] = answer_loss(model, {**inputs, FIELD: read}, item.num_answer)
            if not torch.isfinite(losses_NV[number]).all():
                break

    together(score_own_rows)
    cosines_VV, num_places, losses_NV = add_up_ranks([cosines_VV, num_places, losses_NV], device)
    _refuse_fault(cosines_VV, losses_NV)
    similarity_VV = (cosines_VV / num_places).tolist()
    losses = rises(torch.cat([losses_NV[:, deepest].unsqueeze(1), losses_NV], dim=1).cpu())
    return StateScores(tuple(map(tuple, similarity_VV)), losses)


@contextmanager
def _states_of(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """What the first of ``blocks`` is given and what each of them returns, in one forward inside the block."""
    states: list[Tensor] = []

    def before(_: int, args: Any, kwargs: Any) -> None:
        states.append(given_state(args, kwargs))

    def after(_: int, args: Any, kwargs: Any, output: Any) -> None:
        states.append(state_of(output))

    with watched(blocks[:1], before=before), watched(blocks, after=after):
        yield states


def _add_cosines(states: Sequence[Tensor], cosines_VV: Tensor) -> None:
    """Add those of all pairs of ``states`` at every place, in double precision."""
    flat = [state.flatten(0, -2) for state in states]
    for parts in zip(*(state_PD.split(PLACES_AT_ONCE) for state_PD in flat), strict=True):
        units_PVD = normalize(torch.stack(parts, dim=1).float(), dim=-1)
        cosines_VV += (units_PVD @ units_PVD.mT).double().sum(0)


def _refuse_fault(cosines_VV: Tensor, losses_NV: Tensor) -> None:
    refuse_no_number(
        losses_NV, "measure.vision_states", lambda state: f" where state {state} of the vision tower is read"
    )
    if (faults := torch.nonzero(~torch.isfinite(cosines_VV.diagonal()))).numel():
        raise UserError(f"measure.vision_states: state {faults[0].item()} of the vision tower is not finite; {REMEDY}")
