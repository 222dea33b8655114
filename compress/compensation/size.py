"""Memory and disk that fitting takes, told from a model without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from shoal.inference.decoder import LOGIT_ELEMENTS
from shoal.models.anatomy import decoder_layers, text_config
from shoal.models.load import num_parameters
from shoal.recipe.prune import Calibration, Compensate

from ..edits.masks import Half
from ..edits.sublayers import named_halves
from ..edits.zeroing import output_parameters
from ..variants.streamed import bytes_per_token
from .fold import num_features

COMPENSATE, NARROW = "prune.compensate", "prune.width"
"""Sections of the recipe."""
STATES = 4.5
"""Of every calibration token at one time, at a gap: the teacher's, the student's before the layer below, with the gap
open and closed, and of the held-out eighth what goes on from there."""
WIDTH = 4
"""Bytes of a number of weights and states, which are float32."""


@dataclass(frozen=True)
class Size:
    """Tokens of a batch, and bytes beside what Python and its libraries take, about."""

    tokens_at_once: int
    weights: int
    """Of the whole model."""
    fixed: int
    """Sums, logits and masks, and what is made of a layer's tensors while they are folded."""
    at_work: int
    """What a layer makes of one batch."""
    waiting: int
    """States of all tokens and folded tensors, which may wait in a file."""

    @property
    def in_memory(self) -> int:
        """With all weights in memory."""
        return self.weights + self.fixed + self.at_work + self.waiting


def fitting_size(model: PreTrainedModel, drop: Sequence[int], settings: Compensate) -> Size:
    """What fitting to a plan that drops layers ``drop`` of ``model`` takes; its tensors may be without numbers."""
    layers, hidden = decoder_layers(model), text_config(model.config).hidden_size
    kept = [layer for layer in range(len(layers)) if layer not in set(drop)]
    scaled = [layer for layer in kept if settings.method != "linear" and layer > min(drop)]
    corrected = [layer for layer in kept if settings.method != "scale" and layer + 1 in set(drop)]
    folded = {
        **{layer: _numbers(model, layer, output_names(model, layer, ("mlp",))) for layer in corrected},
        **{layer: _numbers(model, layer, output_names(model, layer)) for layer in scaled},
    }
    features = max((num_features(model, layer) for layer in corrected), default=0)
    at_once = min(settings.batch_size * settings.sequence_length, settings.num_tokens)
    largest = max(p.numel() for layer in layers for p in layer.parameters())
    sums = 8 * (4 * features**2 + 8 * features * hidden) + 12 * at_once * features
    logits = 2 * 8 * min(LOGIT_ELEMENTS, at_once * text_config(model.config).vocab_size)
    masks = 2 * settings.num_tokens * settings.sequence_length
    folding = WIDTH * max(folded.values(), default=0) + 16 * largest
    return Size(
        tokens_at_once=at_once,
        weights=WIDTH * num_parameters(model),
        fixed=sums + logits + masks + folding,
        at_work=at_once * bytes_per_token(hidden, max(max(p.shape) for layer in layers for p in layer.parameters())),
        waiting=int(STATES * settings.num_tokens * hidden * WIDTH) + WIDTH * sum(folded.values()),
    )


def measuring_size(model: PreTrainedModel, settings: Calibration) -> Size:
    """What one pass of ``model`` over calibration text takes, layer by layer; its tensors may be without numbers."""
    hidden = text_config(model.config).hidden_size
    tensors = [p for layer in decoder_layers(model) for p in layer.parameters()]
    at_once = min(settings.batch_size * settings.sequence_length, settings.num_tokens)
    return Size(
        tokens_at_once=at_once,
        weights=WIDTH * num_parameters(model),
        # masks, and a second layer whose tensors are made of the first one's
        fixed=2 * settings.num_tokens * settings.sequence_length
        + WIDTH * max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)),
        at_work=at_once * bytes_per_token(hidden, max(max(p.shape) for p in tensors)),
        waiting=WIDTH * settings.num_tokens * hidden,
    )


def goes_by_layers(size: Size, settings: Calibration) -> bool:
    """Whether the whole model takes more memory than ``settings`` allow."""
    return settings.memory_gb is not None and size.in_memory > settings.memory_gb * 2**30


def output_names(model: PreTrainedModel, layer: int, halves: Sequence[Half] = ("attention", "mlp")) -> list[str]:
    """Tensors of a layer that write to the residual stream, by their names alone."""
    named = named_halves(decoder_layers(model)[layer])
    return [name for half in halves for name in output_parameters(model, layer, named, half)]


def _numbers(model: PreTrainedModel, layer: int, names: Sequence[str]) -> int:
    own = dict(decoder_layers(model)[layer].named_parameters())
    return sum(own[name].numel() for name in names)
