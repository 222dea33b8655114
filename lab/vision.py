"""Vision models over rows of images, questions and answers: vision.json.

What layers are worth for answers; how alike the states of the vision tower are, and what answers lose where another one
is read, as arXiv:2504.21447 asks with models trained anew for every state. Images of a row, and so its tokens, may be
of any number and size; rows are not packed or padded.

L layers, N rows, V states (state n is the one after n blocks of the tower), P places of an image, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.artifacts.importance import Estimate
from shoal.compress.metrics.hidden_pass import HiddenPass
from shoal.compress.metrics.metric import Calibration
from shoal.compress.metrics.observation import Batch
from shoal.compress.surgery.cut_model import skipped
from shoal.compress.sweeps.table import estimates
from shoal.data.image_rows import Asked, asked, image_rows_fingerprint, load_image_rows, on_device
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.launch.verbs.run import Run
from shoal.models.anatomy import decoder_layers
from shoal.models.load import load_processor, reads_images
from shoal.progress import each
from shoal.recipe.section import DataSource, Positive, Section, Text
from shoal.stats.intervals import left_out_means

from .depth.runs import states_at
from .part import identity, made, model_of, told

FIELD = "vision_feature_layer"
READERS = ("llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "vipllava")
"""Model types whose code was read: they take states from the tower by FIELD and nothing else from it."""
TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose last state is that of the last block, as it is; others norm it, which a block in the middle is not."""
BLOCK = re.compile(r"(?:^|\.)(?:vision|image|video)_tower\.(?:\w+\.)*layers\.(\d+)\.")
"""A stored tensor of a block; LLaVA and Video-LLaVA have no other layers in their towers."""
PLACES_AT_ONCE = 1024
"""Places whose states are compared at a time: of a large picture in tiles, all of them would take gigabytes."""
UNTRAINED = (
    "the projector was trained on what is read and on no other state: what another state is worth shows once a "
    "projector is trained for it, which shoal does not do"
)


@dataclass(frozen=True)
class Settings(Section):
    """Images with questions and answers."""

    path: Text
    """A local .jsonl, .json, .csv or .parquet file of rows."""
    image: str = "image"
    """The column that names an image file, from the folder of ``path`` on."""
    prompt: str = "prompt"
    """The column of questions."""
    answer: str = "answer"
    """The column of answers, whose likelihood counts."""
    num_rows: Positive = 64
    """Rows that are read, the first ones. One takes a forward for every layer and state."""


@dataclass(frozen=True)
class Vision(Artifact):
    """vision.json; losses are nats per token of an answer, the mean over rows with its 95 % interval."""

    FILE: ClassVar[str] = "vision.json"

    num_rows: int
    block_influence: tuple[float, ...]
    """By layer 1 - cosine of its input and output, the mean over all tokens, those of images too (arXiv:2403.03853)."""
    layer_losses: tuple[Estimate, ...]
    """By layer the rise of an answer's loss where it is skipped."""
    states_read: tuple[int, ...]
    """States of the tower that the projector is given, in its order; empty where shoal does not know them."""
    similarity: tuple[tuple[float, ...], ...]
    """V x V: cosine of two states at one place of an image, the mean over all places of all images."""
    state_losses: tuple[Estimate, ...]
    """Rise of an answer's loss where this state is read in place of the deepest one that is; 0 for that one."""
    answers: Estimate
    """Loss of the answers."""

    def in_words(self) -> str:
        """The layers that answers need least, the cheapest states, and the loss of answers."""
        ordered = sorted(range(len(self.layer_losses)), key=lambda layer: self.layer_losses[layer].value)
        lines = [f"{self.num_rows} rows; layers that answers about images need least: {ordered[: len(ordered) // 4]}"]
        if self.states_read:
            read = max(self.states_read)
            others = sorted(set(range(len(self.state_losses))) - {read}, key=lambda s: self.state_losses[s].value)[:3]
            cheap = ", ".join(f"{state} ({self.state_losses[state].value:+.3f} nats)" for state in others)
            lines.append(f"states of the tower that cost least in place of {read}: {cheap}; {UNTRAINED}")
        return "\n".join([*lines, f"answers: {self.answers.value:.3f} nats per token"])


def work(run: Run, settings: Settings) -> str:
    """What images say of layers and states, in words.

    Raises:
        UserError: a model that reads no images, rows that it cannot take, or numbers that are not finite.
    """
    if not reads_images(run.config()):
        raise UserError(f"shoal lab vision: {run.recipe.model} reads no images")
    columns = settings.image, settings.prompt, settings.answer
    rows = load_image_rows("shoal lab vision", DataSource(settings.path), columns, settings.num_rows)
    inputs = identity(run, settings, rows=image_rows_fingerprint(rows))

    def seen(provenance: Provenance) -> Vision:
        processor = load_processor(run.teacher, trust_remote_code=run.recipe.trust_remote_code)
        model = model_of(run)
        items = list(asked(rows, processor, model.config))
        influence, losses_NV = layer_scores(model, items)
        intact_N = losses_NV[:, 0]
        states = states_read(model.config)
        similarity, state_losses_NV = state_scores(model, items) if states else ((), intact_N.new_zeros(len(items), 0))
        read_N = state_losses_NV[:, max(states)].unsqueeze(1) if states else 0
        return Vision(
            provenance,
            len(rows),
            influence,
            means(losses_NV[:, 1:] - intact_N.unsqueeze(1)),
            states,
            similarity,
            means(state_losses_NV - read_N),
            means(intact_N.unsqueeze(1))[0],
        )

    return told(run, made(run, Vision, inputs, seen))


@torch.no_grad()
def layer_scores(model: PreTrainedModel, items: Sequence[Asked]) -> tuple[tuple[float, ...], Tensor]:
    """Block influence by layer over ``items``, and (N, 1 + L) the losses of answers intact and without each layer."""
    losses = []
    similar = HiddenPass(model, _row(torch.zeros(1, 1, dtype=torch.long)), ["block_influence"])
    for number, item in enumerate(each(items, "vision: layers", unit="rows")):
        row = _row(item.inputs["input_ids"])
        batch = Batch.of(row, torch.tensor([0]), torch.empty(0, 2, dtype=torch.long), model.device)
        batch = replace(batch, rows_B=torch.tensor([number]))
        with similar.counting(batch):
            losses.append([_loss(model, item)])
        if similar.fault is not None:
            break
        for layer in range(len(decoder_layers(model))):
            with skipped(model, [layer]):
                losses[-1].append(_loss(model, item))
    influence: Any = similar.scores()["block_influence"]
    return influence, _finite(torch.tensor(losses, dtype=torch.float64), "without a layer")


@torch.no_grad()
def state_scores(model: PreTrainedModel, items: Sequence[Asked]) -> tuple[tuple[tuple[float, ...], ...], Tensor]:
    """(V, V) mean cosines of the tower's states, and (N, V) losses of answers where each is read in place of the
    deepest one that is.

    The cosine is that of states as they are: a direction that all places share raises it. A model that is given several
    states joined gets the others unchanged."""
    blocks, entries = tower_blocks(model), states_read(model.config)
    num_states, deepest, num_places, losses = len(blocks) + 1, max(entries), 0, []
    cosines_VV = torch.zeros(num_states, num_states, dtype=torch.float64, device=model.device)
    for item in each(items, "vision: states of the tower", unit="rows"):
        with states_at(blocks) as states:
            read = _loss(model, item)
        flat = [state.flatten(0, -2) for state in states]
        for parts in zip(*(state_PD.split(PLACES_AT_ONCE) for state_PD in flat), strict=True):
            units_PVD = normalize(torch.stack(parts, dim=1).float(), dim=-1)
            cosines_VV += (units_PVD @ units_PVD.mT).double().sum(0)
        num_places += states[0].shape[:-1].numel()
        # a list also where one is read: transformers takes a bare 0 for "no states are asked for"
        reading = [[state if entry == deepest else entry for entry in entries] for state in range(num_states)]
        own = [read if s == deepest else _loss(model, item, **{FIELD: reading[s]}) for s in range(num_states)]
        losses.append(own)
    similarity_VV = _finite((cosines_VV / num_places).cpu(), "of the vision tower's states")
    return tuple(map(tuple, similarity_VV.tolist())), _finite(torch.tensor(losses, dtype=torch.float64), "of a state")


def means(values_NK: Tensor) -> tuple[Estimate, ...]:
    """The mean of every column with its 95 % interval over the rows; of one row no interval."""
    if not values_NK.shape[1]:
        return ()
    values, num_rows = values_NK.double().numpy(), len(values_NK)
    if num_rows == 1:
        return tuple(Estimate(value, value, value) for value in values[0].tolist())
    return estimates(left_out_means(values, np.ones(num_rows)), values.mean(0), num_rows)


def _row(input_ids_1S: Tensor) -> Calibration:
    positions_1S = torch.arange(input_ids_1S.shape[1]).unsqueeze(0)
    return Calibration(PackedRows(input_ids_1S, positions_1S), batch_size=1)


@torch.no_grad()
def _loss(model: PreTrainedModel, item: Asked, **more: Any) -> Tensor:
    """The mean negative log-likelihood in nats of the answer's tokens."""
    inputs: dict[str, Any] = on_device(item.inputs, model.device, model.dtype)
    logits_SV = model(**inputs, **more, use_cache=False).logits[0, -item.num_answer - 1 : -1]
    return cross_entropy(logits_SV.double(), inputs["input_ids"][0, -item.num_answer :])


def _finite(numbers: Tensor, what: str) -> Tensor:
    if not torch.isfinite(numbers).all():
        raise UserError(f"shoal lab vision: numbers {what} are not finite; set dtype: float32, or leave rows out")
    return numbers


def states_read(config: PreTrainedConfig) -> tuple[int, ...]:
    """The states of the tower that the language model is given, each by the number of blocks before it; empty where
    shoal does not know."""
    tower: Any = getattr(config, "vision_config", None)
    known = config.model_type in READERS and getattr(tower, "model_type", None) in TOWERS
    if not known or getattr(tower, "tie_last_hidden_states", None):
        return ()
    states_read = getattr(config, FIELD)
    entries = [states_read] if isinstance(states_read, int) else list(states_read)
    states = [entry if entry >= 0 else tower.num_hidden_layers + 1 + entry for entry in entries]
    return tuple(states)


def tower_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the tower that images pass; states_read has to know the model."""
    return next(
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and BLOCK.search(f"{name}.0.") and "video_tower" not in name
    )
