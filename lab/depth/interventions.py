"""What becomes of the output, and of later layers, when something along the depth is changed: a layer skipped, or a
state erased at earlier tokens.

R rows (a prompt with one cut position each), S sequence, D hidden, L layers, T chosen tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .residual_flow import MIN_NORM
from .runs import DepthRuns, Intact, Prompt, Readout, TokenBatch, batch_of_prompts, output_changes

SITES = ("layer", "attention", "mlp")
POSITION_STEP = 8
"""Cut positions are multiples of this."""
MIN_TOKENS = POSITION_STEP + 2
"""A shorter prompt has no position with a token before and behind it."""


@dataclass
class DepthEffects:
    """Largest effects over prompts and cut positions."""

    skip_LL: Tensor
    """[s, l]: relative change of layer l's update at tokens from the cut on, when layer s is skipped before it."""
    skip_output_L: Tensor
    """Change of the next-token probabilities from the cut on; 0 for the last layer, behind which nothing mixes."""
    erasure_output_L: Tensor
    """Change of the next-token probabilities behind the one token whose state before layer l is erased."""


@dataclass(frozen=True)
class _Rows:
    """Prompts cut at one position each."""

    batch: TokenBatch
    intact: Intact
    before_RS: Tensor
    """Tokens 1 to t - 1; the first token is never touched."""
    at_RS: Tensor
    """Token t."""
    from_RS: Tensor
    """Real tokens from t on."""


def cut_positions(prompts: Sequence[Prompt], num_positions: int, *, seed: int) -> list[tuple[Prompt, int]]:
    """Every prompt with up to ``num_positions`` cuts t, drawn from 8, 16, ... so that a token lies behind each."""
    drawn = random.Random(seed)
    cuts = []
    for prompt in prompts:
        candidates = range(POSITION_STEP, len(prompt) - 1, POSITION_STEP)
        chosen = sorted(drawn.sample(candidates, min(num_positions, len(candidates))))
        cuts += [(prompt, position) for position in chosen]
    return cuts


@torch.no_grad()
def measure_effects(
    runs: DepthRuns,
    readout: Readout | None,
    cuts: Sequence[tuple[Prompt, int]],
    means_LD: Tensor,
    *,
    batch_size: int,
    progress: Callable[[], object],
) -> DepthEffects:
    """The largest effects over ``cuts``; without a readout only those on later layers, and 0 for those on the output.

    ``means_LD`` is what an erased state becomes: the mean state before every layer. Skipping layer s at tokens 1 to
    t - 1 leaves its other outputs as they are, so the run starts behind s with its input in the place of its output.
    ``progress`` is called once per run.
    """
    num_layers = runs.num_layers
    shapes = ((num_layers, num_layers), num_layers, num_layers)
    effects = DepthEffects(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    cuts = sorted(cuts, key=lambda cut: len(cut[0]))  # little padding
    for start in range(0, len(cuts), batch_size):
        rows = _rows(runs, cuts[start : start + batch_size])
        # not the last layer: nothing behind it mixes tokens, so later ones never see that it was skipped
        skipped = [_skip(runs, rows, layer, effects.skip_LL[layer], progress) for layer in range(num_layers - 1)]
        final_TD = rows.intact.states[-1][rows.from_RS]
        if readout is None:
            continue
        behind_T = (rows.from_RS & ~rows.at_RS)[rows.from_RS].cpu()  # of the tokens in final_TD, those after the cut
        erased = [_erase(runs, rows, layer, means_LD[layer], progress) for layer in range(num_layers)]
        changes = output_changes(readout, final_TD, [*skipped, *erased])
        _keep_largest(effects.skip_output_L[:-1], changes[: num_layers - 1])
        _keep_largest(effects.erasure_output_L, changes[num_layers - 1 :][:, behind_T])
    return effects


def _rows(runs: DepthRuns, cuts: Sequence[tuple[Prompt, int]]) -> _Rows:
    batch = batch_of_prompts([prompt for prompt, _ in cuts])
    cut_R1 = torch.tensor([[position] for _, position in cuts])
    index_S = torch.arange(batch.real_BS.shape[1])
    masks = ((index_S >= 1) & (index_S < cut_R1), index_S == cut_R1, (index_S >= cut_R1) & batch.real_BS)
    return _Rows(batch, runs.intact(batch), *(mask.to(runs.model.device) for mask in masks))


def _skip(runs: DepthRuns, rows: _Rows, layer: int, largest_L: Tensor, progress: Callable[[], object]) -> Tensor:
    """Adds to ``largest_L``; returns the last layer's output at the tokens from the cut on, (T, D)."""
    states = rows.intact.states
    # what leaves the skipped layer: its input at tokens before the cut, its real output elsewhere
    entering_RSD = torch.where(rows.before_RS[..., None], states[layer], states[layer + 1])

    def compare(later: int, before_RSD: Tensor, after_RSD: Tensor) -> None:
        intact_TD = _update(states[later], states[later + 1], rows.from_RS)
        change_T = (_update(before_RSD, after_RSD, rows.from_RS) - intact_TD).norm(dim=-1)
        relative_T = change_T / intact_TD.norm(dim=-1).clamp_min(MIN_NORM)
        _keep_largest(largest_L[later], relative_T.cpu().double())

    final_RSD = runs.run_from(layer + 1, entering_RSD, rows.intact.calls, compare)
    progress()
    return final_RSD[rows.from_RS]


def _erase(runs: DepthRuns, rows: _Rows, layer: int, mean_D: Tensor, progress: Callable[[], object]) -> Tensor:
    state_RSD = rows.intact.states[layer]
    entering_RSD = torch.where(rows.at_RS[..., None], mean_D.to(state_RSD), state_RSD)
    final_RSD = runs.run_from(layer, entering_RSD, rows.intact.calls)
    progress()
    return final_RSD[rows.from_RS]


def _update(before_RSD: Tensor, after_RSD: Tensor, chosen_RS: Tensor) -> Tensor:
    return after_RSD[chosen_RS].float() - before_RSD[chosen_RS].float()


def _keep_largest(largest: Tensor, candidates: Tensor) -> None:
    """Over the last dimension; not a number stays not a number."""
    largest.copy_(torch.maximum(largest, candidates.amax(-1)))
