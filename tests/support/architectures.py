"""Tiny random models of every decoder-only family of transformers, several layer kinds mixed where a family has them.

architectures.yaml has the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoal.yaml_text import read_yaml

TABLES = read_yaml(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SHAPE: dict[str, Any] = TABLES["shape"]
"""Toy dimensions by their usual names; a configuration gets those that its class declares."""
SLIDING_WINDOW = SHAPE["sliding_window"]
INITIALIZER_RANGE = SHAPE["initializer_range"]
"""At which greedy text varies, so that equal texts mean something."""
CLIP, LLAMA, MROPE, QWEN_VISION = (TABLES["shared"][name] for name in ("clip", "llama", "mrope", "qwen_vision"))


@dataclass(frozen=True)
class Architecture:
    """One row: how a tiny model is made, and what is known about cutting it."""

    settings: dict[str, Any] = field(default_factory=dict)
    """On top of SHAPE; None leaves a field at its class's default."""
    model_type: str = ""
    """Key of CONFIG_MAPPING; empty = the row's name."""
    refuses: str = ""
    """Regular expression of the message with which some cuts are refused; empty = every cut is exact."""
    drops: Sequence[Sequence[int]] = ()
    """Cuts to examine besides single layers and random sets: those that are exact where most are refused."""
    padding: str = ""
    """Why padded batches are not compared: the teacher itself gives other text for a padded row; empty = compared."""
    images: dict[str, Any] = field(default_factory=dict)
    """Arguments that hold one random image: name -> its numbers, or {random: shape of random ones}."""
    cache: str = ""
    """Why text with a KV cache is not compared with text without: the teacher itself differs; empty = compared."""


ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture() for name in TABLES["plain"]},
    **{name: Architecture(**row) for name, row in TABLES["rows"].items()},
}
NOT_CUT: dict[str, str] = {name: why for why, names in TABLES["not_cut"].items() for name in names}
"""Model types of the causal-LM mapping that have no row, and why."""


def census(names: Iterable[str]) -> list[Any]:
    """Cases of a test over families that this transformers has, of which `make test` runs a few."""
    names = [name for name in names if (ARCHITECTURES[name].model_type or name) in CONFIG_MAPPING]
    return [name if name in TABLES["few"] else pytest.param(name, marks=pytest.mark.prove) for name in names]


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of row ``name`` with toy dimensions; None in settings or overrides = unset."""
    row = ARCHITECTURES[name]
    return _toy(CONFIG_MAPPING[row.model_type or name], row.settings | overrides)


def _toy(family: Any, settings: dict[str, Any]) -> PreTrainedConfig:
    known = family.default_config_fields().keys() | family.attribute_map.keys()
    values = {key: value for key, value in SHAPE.items() if key in known}
    if "kv_lora_rank" in known:  # latent attention has no groups of heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= settings
    for part, part_family in family.sub_configs.items():
        part_settings = dict(values.get(part, {}))
        if part_family is AutoConfig:
            part_family = CONFIG_MAPPING[part_settings.pop("model_type")]
        values[part] = _toy(part_family, part_settings)
    config = family(**{key: value for key, value in values.items() if value is not None})
    if isinstance(getattr(config, "eos_token_id", None), list):
        config.eos_token_id = 2  # several by default, none of which the toy's vocabulary has
    return config


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of row ``name`` in eval mode and float32; ``overrides`` go into its configuration.

    Norms and biases are randomised too: at their usual 1 and 0 a forgotten copy of them would pass every test.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with_images = bool(ARCHITECTURES[name].images)
        automatic = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
        model = automatic.from_config(tiny_config(name, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
