"""Metrics of the language-model loss under variants of the model: single drops, greedy orders, subnetworks.

L(S) is the mean negative log-likelihood per token, in nats, of the model without the layers S (see variant_losses).
All are measured over one memory of losses, so that what two metrics ask of the same variant is computed once.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedModel

from shoal.components import Component
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, text_config

from ..edits.sublayers import sublayers
from ..variants.variants import INTACT, Variant, without
from .greedy import greedy_order, half_components, layer_components
from .metric import Calibration, Estimates, Layers, Metric, Need, Order, Result, Yields
from .shapley import Absent, Game, local_shapley, present_absent
from .variant_losses import VariantLosses

log = logging.getLogger(__name__)

PROTECTED = (0, -1)
"""Layers that greedy orders never try, which prune.protect guards by default too: were one removed and then passed over
when the plan is made, all that goes after it would have been chosen for another model."""
ABSENT_SHARE = 0.1
"""Share of the layers that are absent from a random subnetwork (the source's f = 0.9)."""
WINDOW = 3
"""Layers that leave the full model in one walk of local Shapley values."""
SUBNETWORKS_PER_LAYER = 8
"""Subnetworks measured for every layer of the model. INFERRED; errors fall with its root."""
LARGEST_EXPONENT = math.log(1e300)
"""Largest loss in nats per token whose exponential is still a float64."""


class LossMetric(Metric):
    """Numbers from losses under variants."""

    needs: ClassVar[Need] = "loss"

    @classmethod
    @abstractmethod
    def scores(cls, losses: VariantLosses, model: PreTrainedModel, calibration: Calibration) -> Result:
        """All ranks call it and get the same."""


class SingleDropPerplexity(LossMetric):
    """exp L({l}): perplexity without layer l alone (Shortened LLaMA, arXiv 2402.02834)."""

    yields: ClassVar[Yields] = "layers"

    @classmethod
    def scores(cls, losses: VariantLosses, model: PreTrainedModel, calibration: Calibration) -> Layers:
        singles = [frozenset([layer]) for layer in range(len(decoder_layers(model)))]
        drop_losses = losses(_without_each(singles), what="single drops")
        worst = max(drop_losses)
        if worst > LARGEST_EXPONENT:
            raise UserError(
                f"measure.metrics: single_drop_perplexity: without layer {drop_losses.index(worst)} the loss is "
                f"{worst:.4g} nats per token, whose perplexity no number can hold; use sleb, which ranks by the loss "
                "itself"
            )
        return tuple(map(math.exp, drop_losses))


class Sleb(LossMetric):
    """Layer after layer: min over l of L(gone + {l}), given what is gone (SLEB's M3, arXiv 2402.09025)."""

    yields: ClassVar[Yields] = "order"

    @classmethod
    def scores(cls, losses: VariantLosses, model: PreTrainedModel, calibration: Calibration) -> Order:
        return greedy_order(
            layer_components(len(decoder_layers(model)), protected=PROTECTED),
            lambda variants: losses(variants, what="sleb"),
            num_removals=calibration.num_drop,
            name="sleb",
        )


class BlockPruner(LossMetric):
    """As sleb, over attention and MLP of every layer as components of their own (BlockPruner, arXiv 2406.10594).

    Two halves go for every layer that measure.num_drop names.
    """

    yields: ClassVar[Yields] = "order"

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        for half in _halves(model):
            if refusal := sublayers(model)[half.layers[0]].refusal:
                raise UserError(f"measure.metrics: {name}: {refusal}; here use sleb, which removes whole layers")

    @classmethod
    def scores(cls, losses: VariantLosses, model: PreTrainedModel, calibration: Calibration) -> Order:
        return greedy_order(
            _halves(model),
            lambda variants: losses(variants, what="blockpruner"),
            num_removals=None if calibration.num_drop is None else 2 * calibration.num_drop,
            name="blockpruner",
        )


def _halves(model: PreTrainedModel) -> tuple[Component, ...]:
    return half_components(len(decoder_layers(model)), protected=PROTECTED)


class PresentAbsent(LossMetric):
    """E[L | l absent] - E[L | l present] over random subnetworks of nine tenths of the layers.

    A difference in means over subnetworks of one size, as the code published with arXiv 2407.16286 computes it; no
    value of a coalition game.
    """

    yields: ClassVar[Yields] = "layers"

    @classmethod
    def scores(cls, losses: VariantLosses, model: PreTrainedModel, calibration: Calibration) -> Estimates:
        num_layers = len(decoder_layers(model))
        estimates = present_absent(
            _game(losses, "present_absent"),
            num_layers,
            num_absent=max(1, round(ABSENT_SHARE * num_layers)),
            num_subnetworks=SUBNETWORKS_PER_LAYER * num_layers,
            seed=calibration.seed,
        )
        return _logged("present_absent", estimates)


class LocalShapley(LossMetric):
    """Mean of L(S + {l}) - L(S) over random S of at most two layers: layer l's Shapley value near the full model.

    A walk that has come to the loss of guessing uniformly, log V, is not gone on with (arXiv 2409.14381; the estimator
    is INFERRED).
    """

    yields: ClassVar[Yields] = "layers"

    @classmethod
    def scores(cls, losses: VariantLosses, model: PreTrainedModel, calibration: Calibration) -> Estimates:
        num_layers = len(decoder_layers(model))
        chance = -math.log(text_config(model.config).vocab_size)  # games are worth the negative loss
        intact = losses([INTACT])[0]
        if -intact <= chance:
            log.warning(
                "local_shapley: the intact model's loss, %.4g nats per token, is that of guessing (%.4g) or worse; "
                "no walk is cut short there",
                intact,
                -chance,
            )
            chance = -math.inf
        estimates = local_shapley(
            _game(losses, "local_shapley"),
            num_layers,
            window=min(WINDOW, num_layers - 1),
            num_subnetworks=SUBNETWORKS_PER_LAYER * num_layers,
            seed=calibration.seed,
            chance=chance,
        )
        return _logged("local_shapley", estimates)


LOSS_METRICS: dict[str, type[LossMetric]] = {
    "single_drop_perplexity": SingleDropPerplexity,
    "sleb": Sleb,
    "blockpruner": BlockPruner,
    "present_absent": PresentAbsent,
    "local_shapley": LocalShapley,
}


def loss_scores(model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> dict[str, Result]:
    """Scores and orders by the named LOSS_METRICS.

    Raises:
        UserError: no token that can be predicted, losses that are not finite, more removals than layers that may go, or
            a layer whose halves cannot be taken out.
    """
    losses = VariantLosses(model, calibration)
    return {name: LOSS_METRICS[name].scores(losses, model, calibration) for name in names}


def _game(losses: VariantLosses, name: str) -> Game:
    def game(absent: Sequence[Absent]) -> list[float]:
        return [-loss for loss in losses(_without_each(absent), what=name)]

    return game


def _without_each(absent: Sequence[Absent]) -> list[Variant]:
    return [without(layers, Component(tuple(sorted(layers))).name) for layers in absent]


def _logged(name: str, estimates: Estimates) -> Estimates:
    log.info(
        "%s from %d subnetworks, in nats per token with standard errors: %s",
        name,
        estimates.num_subnetworks,
        ", ".join(
            f"layer {layer} {value:.4g} +- {error:.2g}"
            for layer, (value, error) in enumerate(zip(estimates.values, estimates.standard_errors, strict=True))
        ),
    )
    return estimates
