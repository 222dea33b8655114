"""Importance metrics computed from raw hidden states. T tokens, M documents, D hidden, L layers, K sampled tokens.

h_l is the input of layer l, h_{l+1} its output, before any final norm; D_l = h_{l+1} - h_l what it adds. A metric keeps
additive sums only, so that batches and ranks add up to the same scores.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import linalg
from torch import Tensor
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_body, decoder_layers, state_of, watched

from ..edits.sublayers import probe_ids, probing
from .metric import Layers, Metric, Need, Result, Runs, Yields
from .observation import Observation, Reading, cosine

SMALLEST_NORM = 1e-6
"""Lower bound of a state's norm where something is divided by it."""
MKA_SIGMA = 8.0
"""Width of MKA's kernel, in the state's median distances."""
MKA_DENSITY_EXPONENT = 0.5
MKA_BINS = 4
"""Parts that each coordinate is cut into; tokens fall into MKA_BINS**2 cells."""


class HiddenMetric(Metric):
    """One number per layer or run from raw hidden states, all such metrics out of one forward pass."""

    needs: ClassVar[Need] = "hidden"
    reads: ClassVar[frozenset[Reading]]
    dtype: ClassVar[torch.dtype] = torch.float64
    """Dtype of the sums."""

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        refuse_other_states(model)

    def __init__(self, num_layers: int, width: int, sample_size: int) -> None:
        self.num_layers, self.width, self.sample_size = num_layers, width, sample_size
        self.sums: Tensor = torch.zeros(self.sums_shape(), dtype=self.dtype)
        self.count = 0
        """Tokens or documents in ``sums``."""

    @abstractmethod
    def sums_shape(self) -> tuple[int, ...]:
        """Shape of the sums, which no batch changes: ranks add theirs up."""

    @abstractmethod
    def add(self, seen: Observation) -> None:
        """Add one batch to the sums."""

    @abstractmethod
    def scores(self) -> Result:
        """The scores, once the sums are those of all batches and ranks."""

    def _mean(self) -> Tensor:
        return self.sums / self.count


class _TokenMean(HiddenMetric):
    """The mean over tokens of one number per layer."""

    yields: ClassVar[Yields] = "layers"

    def sums_shape(self) -> tuple[int, ...]:
        return (self.num_layers,)

    def add(self, seen: Observation) -> None:
        self.sums += self.of_tokens_LT(seen).sum(1)
        self.count += seen.batch.num_tokens

    @abstractmethod
    def of_tokens_LT(self, seen: Observation) -> Tensor:
        """The number of every layer at every token."""

    def scores(self) -> Layers:
        return tuple(self._mean().tolist())


class BlockInfluence(_TokenMean):
    """1 - mean over tokens of cos(h_l, h_{l+1}) (ShortGPT, Men et al. 2024, arXiv:2403.03853, equation 1)."""

    reads: ClassVar[frozenset[Reading]] = frozenset({"products"})

    def of_tokens_LT(self, seen: Observation) -> Tensor:
        products_LT, before_LT, after_LT = map(seen.of_layers, ("products", "before_squares", "after_squares"))
        return 1 - cosine(products_LT, before_LT, after_LT)


class UpdateNorm(_TokenMean):
    """Mean over tokens of |D_l| / |h_l|, the relative size of the layer's update.

    Euclidean norms, the denominator at least 1e-6 (arXiv:2512.14064; relative L2 also among the metrics of
    llm_depth_pruning). A size only: it does not see where the update points.
    """

    reads: ClassVar[frozenset[Reading]] = frozenset({"updates"})

    def of_tokens_LT(self, seen: Observation) -> Tensor:
        update_LT, before_LT = seen.of_layers("update_squares").sqrt(), seen.of_layers("before_squares").sqrt()
        return update_LT / before_LT.clamp(min=SMALLEST_NORM)


class Angular(HiddenMetric):
    """(1/pi) mean over documents of arccos cos(h_l, h_{l+n}) at the last token, for every run of n layers from l.

    Gromov et al. 2024, arXiv:2403.17887, equation 7.
    """

    yields: ClassVar[Yields] = "runs"
    reads: ClassVar[frozenset[Reading]] = frozenset({"last"})

    def sums_shape(self) -> tuple[int, ...]:
        return (self.num_layers + 1, self.num_layers + 1)

    def add(self, seen: Observation) -> None:
        states_MLD = seen.last_MLD  # L + 1 states
        # float64: the arc cosine of a float32 cosine next to 1 would be rounding (see observation.py)
        gram_MLL = states_MLD @ states_MLD.mT
        squares_ML = gram_MLL.diagonal(dim1=1, dim2=2)
        cosines_MLL = cosine(gram_MLL, squares_ML[:, :, None], squares_ML[:, None, :])
        self.sums += (cosines_MLL.arccos() / torch.pi).sum(0)
        self.count += len(states_MLD)

    def scores(self) -> Runs:
        means = self._mean()  # (L+1, L+1): entry [l, l + n] is that of the run of n layers from l
        return tuple(tuple(means.diagonal(length).tolist()) for length in range(1, self.num_layers + 1))


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
        return (self.sample_size, self.num_layers + 1, self.width)

    def add(self, seen: Observation) -> None:
        self.sums[seen.batch.slots_K] = seen.sample_KLD
        self.count += len(seen.batch.slots_K)

    def scores(self) -> Layers:
        cells = [_cells(_diffusion_map(self.sums[:, state].double())) for state in range(self.num_layers + 1)]
        return tuple(1 - _similarity(before, after) for before, after in itertools.pairwise(cells))


def _diffusion_map(states_KD: Tensor) -> np.ndarray:
    """The two leading coordinates (K, 2) behind the constant one."""
    distances = torch.cdist(states_KD, states_KD, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(0).numpy()
    median = np.median(distances[np.triu_indices(len(distances), 1)]) if len(distances) > 1 else 0.0
    kernel = np.exp(-np.sqrt(distances / (MKA_SIGMA * (median or 1.0))))  # (K, K); one token or equal states: no median
    density = kernel.sum(1)
    kernel /= np.outer(density, density) ** MKA_DENSITY_EXPONENT
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
    """Which of MKA_BINS**2 cells a token lies in."""
    # by rank, so that every part holds equally many tokens whatever the coordinate's scale
    ranks = coordinates_K2.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    bins = ranks * MKA_BINS // len(ranks)
    return bins[:, 0] * MKA_BINS + bins[:, 1]


def _similarity(first_cells: np.ndarray, second_cells: np.ndarray) -> float:
    """Mutual information over the geometric mean of the entropies; 1 where both have only one cell."""
    joint = np.zeros((MKA_BINS**2, MKA_BINS**2))  # share of the tokens in each pair of cells
    np.add.at(joint, (first_cells, second_cells), 1 / len(first_cells))
    parts = (shares[shares > 0] for shares in (joint.sum(1), joint.sum(0), joint.ravel()))
    first, second, both = (float(-np.sum(shares * np.log(shares))) for shares in parts)
    if first * second == 0:  # all tokens in one cell
        return 1.0 if first == second else 0.0
    return float(np.clip((first + second - both) / np.sqrt(first * second), 0, 1))


HIDDEN_METRICS: dict[str, type[HiddenMetric]] = {
    "block_influence": BlockInfluence,
    "angular": Angular,
    "update_norm": UpdateNorm,
    "mka_similarity": MkaSimilarity,
}


def refuse_other_states(model: PreTrainedModel) -> None:
    """Refuse a model whose layers hand on other states than (B, S, D), by a run over a few tokens.

    Raises:
        UserError: with what that rules out.
    """
    ids_1S = probe_ids(model)

    def after(layer: int, _: Any, __: Any, output: Any) -> None:
        if (shape := state_of(output).shape)[:-1] != ids_1S.shape:
            raise UserError(
                f"measure: layer {layer} works on states of shape {tuple(shape)}, not one vector per token; metrics "
                "of hidden states do not exist for this architecture: use metrics of loss or weights"
            )

    with probing(model), watched(decoder_layers(model), after=after):
        decoder_body(model)(input_ids=ids_1S, use_cache=False)
