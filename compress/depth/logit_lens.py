"""The logit lens: what the model would say if it stopped before a layer. V vocabulary, D hidden, T tokens, L layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .runs import Readout

TOP = 5


def lens_terms(readout: Readout, states_LTD: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(L, T) KL(p_l || p_final) in nats and (L, T) share of top-5 tokens in common, float64 on the CPU.

    ``states_LTD`` are L states before the layers and last the one behind the last layer. The intermediate distribution
    comes first in the divergence (arXiv:2512.14064).
    """
    *inputs, final_TD = states_LTD
    divergence = torch.empty(len(inputs), len(final_TD), dtype=torch.float64)
    overlap = torch.empty_like(divergence)
    for chunk in readout.chunks(len(final_TD)):
        final_TV = readout(final_TD[chunk]).log_softmax(-1)
        final_top = final_TV.topk(TOP, dim=-1).indices  # (T, 5)
        for layer, state_TD in enumerate(inputs):
            log_TV = readout(state_TD[chunk]).log_softmax(-1)
            top = log_TV.topk(TOP, dim=-1).indices
            # (T, 5, 5) -> is each token of one list in the other -> share of the five
            overlap[layer, chunk] = (top[:, :, None] == final_top[:, None, :]).any(-1).double().mean(-1).cpu()
            # summed in float64: a difference of two near-equal distributions, over a large vocabulary
            divergence[layer, chunk] = (log_TV.exp() * (log_TV - final_TV)).sum(-1, dtype=torch.float64).cpu()
    return divergence, overlap


def output_changes(readout: Readout, intact_TD: Tensor, changed: Sequence[Tensor]) -> Tensor:
    """(N, T) Euclidean distance between the intact next-token probabilities and those of each of N changed states."""
    distances = torch.zeros(len(changed), len(intact_TD), dtype=torch.float64)
    for chunk in readout.chunks(len(intact_TD)):
        intact_TV = readout(intact_TD[chunk]).softmax(-1)
        for index, changed_TD in enumerate(changed):
            difference_TV = readout(changed_TD[chunk]).softmax(-1) - intact_TV
            distances[index, chunk] = difference_TV.norm(dim=-1).double().cpu()
    return distances
