"""Similarity of layers as manifolds (MKA). K sampled tokens, D hidden, L layers."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from .hidden_metrics import HiddenMetric
from .metric import Layers, Yields
from .observation import Observation, Reading

SIGMA = 8.0
"""Width of the kernel, in the state's median distances."""
DENSITY_EXPONENT = 0.5
BINS = 4
"""Parts that each coordinate is cut into; tokens fall into BINS**2 cells."""


class MkaSimilarity(HiddenMetric):
    """1 - S(h_l, h_{l+1}): how little of its input's manifold a layer's output keeps (MKA, arXiv:2406.16330).

    Of each state, over a fixed sample of tokens, a diffusion map: kernel exp(-(d/8)^0.5) of Euclidean distances,
    divided by the densities to the power 0.5, normalised, its two leading coordinates behind the constant one. Then
    S_ij = MI_ij / sqrt(H_i H_j).

    Where the source leaves it open, this is what is done. Distances are in units of the state's median distance: the
    residual stream grows a hundredfold, and in absolute units every token of a late layer is an island. Each coordinate
    is cut into four parts of equally many tokens, and MI and H are entropies of the sixteen cells, so that S lies in
    [0, 1] and depends on no coordinate's sign or scale. The sample is 256 tokens evenly spaced over the calibration
    data, no document's first token among them if possible, since its norm is an outlier; it costs (L+1) x 256 states
    of memory. With 256 tokens chance alone gives an S of about 0.15, alike for all layers.
    """

    yields: ClassVar[Yields] = "layers"
    reads: ClassVar[frozenset[Reading]] = frozenset({"sample"})
    dtype: ClassVar[torch.dtype] = torch.float32

    def sums_shape(self) -> tuple[int, ...]:
        return (self.size.sample, self.size.num_layers + 1, self.size.width)

    def add(self, seen: Observation) -> None:
        self.sums[seen.view.slots_K] = seen.sample_KLD
        self.count += len(seen.view.slots_K)

    def scores(self) -> Layers:
        cells = [_cells(_diffusion_map(self.sums[:, state].double())) for state in range(self.size.num_layers + 1)]
        return tuple(1 - _similarity(before, after) for before, after in itertools.pairwise(cells))


def _diffusion_map(states_KD: Tensor) -> np.ndarray:
    """The two leading coordinates (K, 2) behind the constant one."""
    distances = torch.cdist(states_KD, states_KD, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(0).numpy()
    median = np.median(distances[np.triu_indices(len(distances), 1)]) if len(distances) > 1 else 0.0
    kernel = np.exp(-np.sqrt(distances / (SIGMA * (median or 1.0))))  # (K, K); one token or equal states: no median
    density = kernel.sum(1)
    kernel /= np.outer(density, density) ** DENSITY_EXPONENT
    # D^-1/2 K D^-1/2 has the eigenvalues of the random walk D^-1 K and is symmetric, so that eigh solves it;
    # times D^-1/2 its eigenvectors become the walk's
    scale = 1 / np.sqrt(kernel.sum(1))
    size = len(kernel)
    first = max(0, size - 3)  # eigenvalues come in increasing order; the largest one's coordinate is constant
    values, vectors = linalg.eigh(kernel * np.outer(scale, scale), subset_by_index=(first, size - 1))
    coordinates = np.zeros((size, 2))
    for place, index in enumerate(range(len(values) - 2, -1, -1)):
        coordinates[:, place] = values[index] * vectors[:, index] * scale
    return coordinates


def _cells(coordinates_K2: np.ndarray) -> np.ndarray:
    """Which of BINS**2 cells a token lies in."""
    # by rank, so that every part holds equally many tokens whatever the coordinate's scale
    ranks = coordinates_K2.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    bins = ranks * BINS // len(ranks)
    return bins[:, 0] * BINS + bins[:, 1]


def _similarity(first_cells: np.ndarray, second_cells: np.ndarray) -> float:
    """Mutual information over the geometric mean of the entropies; 1 where both have only one cell."""
    joint = np.zeros((BINS**2, BINS**2))  # share of the tokens in each pair of cells
    np.add.at(joint, (first_cells, second_cells), 1 / len(first_cells))
    first, second, both = (_entropy(shares) for shares in (joint.sum(1), joint.sum(0), joint.ravel()))
    if first * second == 0:  # all tokens in one cell
        return 1.0 if first == second else 0.0
    return float(np.clip((first + second - both) / np.sqrt(first * second), 0, 1))


def _entropy(shares: np.ndarray) -> float:
    return float(-np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
