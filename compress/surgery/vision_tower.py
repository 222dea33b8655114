"""The blocks of a vision tower above the deepest state that is read, which a student does without to the last bit.

LLaVA and its kin read the tower's states by `vision_feature_layer`: one entry or several, of which entry 0 is the
embedding, entry n the state after block n, and negative ones count from the end. The usual -2 leaves the last block to
be computed for nobody. Which state serves best is another question (arXiv:2504.21447 finds deep ones good for reading
letters and lower ones for counting): to read another one the projector has to be trained anew, which shoal does not.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import UserError

FIELD = "vision_feature_layer"
READERS = ("llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "vipllava")
"""Model types whose code was read: they take states from the tower by FIELD and nothing else from it."""
TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose last state is that of the last block, as it is; others norm it, which a block in the middle is not."""
BLOCK = re.compile(r"(?:^|\.)(?:vision|image|video)_tower\.(?:\w+\.)*layers\.(\d+)\.")
"""A stored tensor of a block; LLaVA and Video-LLaVA have no other layers in their towers."""


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
    for entry, state in zip(entries, states, strict=True):
        if not 0 <= state <= tower.num_hidden_layers:
            raise UserError(
                f"config.{FIELD}: {entry} is no state of a vision tower of {tower.num_hidden_layers} blocks; mend "
                "config.json"
            )
    return tuple(states)


def tower_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the tower that images pass; states_read has to know the model."""
    lists = (
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and BLOCK.search(f"{name}.0.") and "video_tower" not in name
    )
    return next(lists)


def blocks_read(config: PreTrainedConfig) -> int | None:
    """How many blocks of the tower are read where others stand above them; None = nothing can go."""
    states, tower = states_read(config), getattr(config, "vision_config", None)
    return max(states) if states and tower is not None and max(states) < tower.num_hidden_layers else None


def without_unread_blocks(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of ``config`` whose tower ends with the last block that is read, every entry of FIELD counted from 0."""
    student: Any = copy.deepcopy(config)
    if (blocks := blocks_read(config)) is not None:
        states = states_read(config)
        student.vision_config.num_hidden_layers = blocks
        setattr(student, FIELD, states[0] if isinstance(getattr(config, FIELD), int) else list(states))
    return student


def is_above(name: str, blocks: int) -> bool:
    """Whether the stored tensor ``name`` is of a block of a tower behind its first ``blocks``."""
    block = BLOCK.search(name)
    return block is not None and int(block[1]) >= blocks
