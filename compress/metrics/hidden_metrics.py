"""Importance metrics computed from raw hidden states. T tokens, M documents, D hidden, L layers.

h_l is the input of layer l, h_{l+1} its output, before any final norm; D_l = h_{l+1} - h_l what it adds. A metric keeps
additive sums only, so that batches and ranks add up to the same scores.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_body, decoder_layers, state_of, watched

from ..edits.sublayers import probe_ids, probing
from .metric import Layers, Metric, Need, Result, Runs, Yields
from .observation import Observation, Reading, cosine

SMALLEST_NORM = 1e-6
"""Lower bound of a state's norm where something is divided by it."""


class HiddenMetric(Metric):
    """One number per layer or run from raw hidden states, all such metrics out of one forward pass."""

    needs: ClassVar[Need] = "hidden"
    reads: ClassVar[frozenset[Reading]]
    dtype: ClassVar[torch.dtype] = torch.float64
    """Dtype of the sums."""

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        refuse_other_states(model)

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
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


HIDDEN_METRICS: dict[str, type[HiddenMetric]] = {
    "block_influence": BlockInfluence,
    "angular": Angular,
    "update_norm": UpdateNorm,
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
