"""Importance metrics computed from raw hidden states. T tokens, M documents, D hidden, L layers, K sampled tokens.

h_l is the input of layer l, h_{l+1} its output, before any final norm; D_l = h_{l+1} - h_l what it adds. A metric keeps
additive sums only, so that batches and ranks add up to the same scores.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
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
SILENCE = 1e-6
"""Term that keeps AVSS's share of silent units away from zero, where the score divides by it."""
METRICS_OF_OTHERS = "metrics of hidden states are not defined for this architecture: use metrics of loss or weights"
"""What to do about layers that hand on other states than one vector per token."""


@dataclass(frozen=True)
class PassSize:
    """Sizes that the sums of a pass are made for."""

    num_layers: int
    """L"""
    width: int
    """D"""
    sample: int
    """K"""


class HiddenMetric(Metric):
    """One number per layer or run from raw hidden states, all such metrics out of one forward pass."""

    needs: ClassVar[Need] = "hidden"
    reads: ClassVar[frozenset[Reading]]
    dtype: ClassVar[torch.dtype] = torch.float64
    """Dtype of the sums."""

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        refuse_other_states(model)

    def __init__(self, size: PassSize) -> None:
        self.size = size
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
        return (self.size.num_layers,)

    def add(self, seen: Observation) -> None:
        self.sums += self.of_tokens_LT(seen)[:, seen.view.real_T].sum(1)
        self.count += int(seen.view.real_T.sum())

    @abstractmethod
    def of_tokens_LT(self, seen: Observation) -> Tensor:
        """The number of every layer at every token, padding included."""

    def scores(self) -> Layers:
        return tuple(self._mean().tolist())


class BlockInfluence(_TokenMean):
    """1 - mean over tokens of cos(h_l, h_{l+1}) (ShortGPT, Men et al. 2024, arXiv:2403.03853, equation 1)."""

    reads: ClassVar[frozenset[Reading]] = frozenset({"products"})

    def of_tokens_LT(self, seen: Observation) -> Tensor:
        return 1 - cosine(seen.products_LT, seen.before_squares_LT, seen.after_squares_LT)


class UpdateNorm(_TokenMean):
    """Mean over tokens of |D_l| / |h_l|, the relative size of what the layer adds.

    Euclidean norms, the denominator at least 1e-6 (arXiv:2512.14064; relative L2 also among the metrics of
    llm_depth_pruning). A size only: it does not see where the update points.
    """

    reads: ClassVar[frozenset[Reading]] = frozenset({"updates"})

    def of_tokens_LT(self, seen: Observation) -> Tensor:
        return seen.update_squares_LT.sqrt() / seen.before_squares_LT.sqrt().clamp(min=SMALLEST_NORM)


class _Pairs(HiddenMetric):
    """A mean of one number per pair of the L+1 states."""

    yields: ClassVar[Yields] = "runs"

    def sums_shape(self) -> tuple[int, ...]:
        return (self.size.num_layers + 1, self.size.num_layers + 1)

    def scores(self) -> Runs:
        means = self._mean()  # (L+1, L+1): entry [l, l + n] is that of the run of n layers from l
        return tuple(tuple(means.diagonal(length).tolist()) for length in range(1, self.size.num_layers + 1))


class Angular(_Pairs):
    """(1/pi) mean over documents of arccos cos(h_l, h_{l+n}) at the last token, for every run of n layers from l.

    Gromov et al. 2024, arXiv:2403.17887, equation 7.
    """

    reads: ClassVar[frozenset[Reading]] = frozenset({"last"})

    def add(self, seen: Observation) -> None:
        states_MLD = seen.last_MLD  # L + 1 states
        # float64: the arc cosine of a float32 cosine next to 1 would be rounding (see observation.py)
        gram_MLL = states_MLD @ states_MLD.mT
        squares_ML = gram_MLL.diagonal(dim1=1, dim2=2)
        cosines_MLL = cosine(gram_MLL, squares_ML[:, :, None], squares_ML[:, None, :])
        self.sums += (cosines_MLL.arccos() / torch.pi).sum(0)
        self.count += len(states_MLD)


class StreamlineCosine(_Pairs):
    """1 - mean over tokens of (0.5 + 0.5 cos(h_l, h_{l+n})), for every run of n layers from l.

    LLM-Streamline (Chen et al. 2024, arXiv:2403.19135) removes the run of the largest mean cosine; taken from 1, so
    that here too the lowest goes first. All states of a batch are kept until its end.
    """

    reads: ClassVar[frozenset[Reading]] = frozenset({"cosines"})

    def add(self, seen: Observation) -> None:
        count = int(seen.view.real_T.sum())
        self.sums += 0.5 * (count - seen.cosine_sums_LL())  # the sum over tokens of 1 - (0.5 + 0.5 cos)
        self.count += count

    def _mean(self) -> Tensor:
        return super()._mean().clamp(0, 1)  # float32 cosines of equal states round to a little above 1


class AvssOutput(HiddenMetric):
    """Activation variance over sparsity of the layer's output (AVSS, arXiv:2411.02117). A weak baseline.

    With a = h_{l+1}: s2_l = mean over documents of the variance over hidden units of the document's mean a;
    S_l = share of units, over all tokens, with |a| < 0.001 times the root mean square of the token's a. The score is
    s2_l / (S_l + 1e-6), divided by its sum over layers. The published fixed threshold of 1e-5 finds nothing in half
    precision and divides by zero. Layers are ranked by score; the authors' code cuts a cumulative sum in layer order,
    which takes early layers whatever they score. The residual stream grows with depth, and this score with it.
    """

    yields: ClassVar[Yields] = "layers"
    reads: ClassVar[frozenset[Reading]] = frozenset({"output_spread"})
    spread: ClassVar[Reading] = "output_spread"

    def sums_shape(self) -> tuple[int, ...]:
        """Per layer variances and silent units; in the last row documents and tokens."""
        return (self.size.num_layers + 1, 2)

    def add(self, seen: Observation) -> None:
        self.sums[:-1] += seen.spread_L2(self.spread)
        self.sums[-1] += torch.tensor([len(seen.view.last_M), int(seen.view.real_T.sum())])

    def scores(self) -> Layers:
        documents, tokens = self.sums[-1].tolist()
        variances = self.sums[:-1, 0] / documents
        silent = self.sums[:-1, 1] / (tokens * self.size.width)
        ratios = variances / (silent + SILENCE)
        # every ratio is 0 where all states are equal; the smallest float64 then divides in the sum's place
        return tuple((ratios / ratios.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist())


class AvssUpdate(AvssOutput):
    """AVSS of what the layer adds, a = D_l, else as avss_output: free of the residual stream's growth."""

    reads: ClassVar[frozenset[Reading]] = frozenset({"update_spread"})
    spread: ClassVar[Reading] = "update_spread"


def refuse_other_states(model: PreTrainedModel) -> None:
    """Refuse a model whose layers hand on other states than (B, S, D), by a run over a few tokens.

    Raises:
        UserError: with what that rules out.
    """
    ids_1S = probe_ids(model)

    def after(layer: int, _: Any, __: Any, output: Any) -> None:
        refuse_other_shape(layer, state_of(output), ids_1S.shape)

    with probing(model), watched(decoder_layers(model), after=after):
        decoder_body(model)(input_ids=ids_1S, use_cache=False)


def refuse_other_shape(layer: int, state: Tensor, shape: torch.Size, remedy: str = METRICS_OF_OTHERS) -> None:
    """Refuse a state of ``layer`` that is not (B, S, D); ``shape`` is (B, S)."""
    if state.shape[:-1] != shape:
        raise UserError(
            f"measure: layer {layer} works on states of shape {tuple(state.shape)}, not one vector per token; {remedy}"
        )
