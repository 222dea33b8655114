"""`shoal init`: a commented recipe for a model and this machine, from the model's configuration alone."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from shoal.atomic_files import write_text
from shoal.compress.plan import DEFAULT_METRIC, default_count
from shoal.errors import UserError
from shoal.formatting import count_text
from shoal.machine import device_name, fast_dtype, ranks_to_start
from shoal.model_names import name_of_model, refuse_revision
from shoal.models.anatomy import text_config
from shoal.models.load import loaded_dtype, num_parameters, without_data
from shoal.models.resolve import find_config
from shoal.progress import doing
from shoal.recipe.recipe import parse_recipe
from shoal.runtime import device
from shoal.yaml_text import read_yaml

from .explain import UNBROKEN, as_yaml, first_sentence, meaning, places

WIDTH = 110
"""Columns of the file."""
SMALL = 500_000_000
"""Parameters below which a model is trained with ten times the default learning rate, as the demo model is."""


@dataclass(frozen=True)
class Machine:
    """What there is to train on."""

    device: torch.device
    name: str
    """Name that the manufacturer gives the device."""
    ranks: int
    dtype: str
    """Precision that the device multiplies fast in."""


def init(asked: argparse.Namespace) -> str:
    """Write a first recipe, and say where."""
    refuse_revision(asked.model, asked.revision)
    if asked.out == "":
        raise UserError("--out: is empty; name a file, or leave it out")
    file = Path(asked.out or f"{name_of_model(asked.model)}.yaml").expanduser()
    if file.exists():
        raise UserError(f"{file}: is there already; name another file with --out, or remove it")
    with doing(f"looking at {asked.model}"):
        here = Machine(device(), device_name(device()), ranks_to_start(None), fast_dtype(device()).dtype)
        text = first_recipe(asked.model, here, revision=asked.revision)
    write_text(file, text, setting="--out")
    return f"{file} is written; read it, then: shoal run {shlex.quote(str(file))}"


def first_recipe(model: str, machine: Machine, *, revision: str | None = None) -> str:
    """The text of a recipe for ``model`` on ``machine``, with a comment on every key.

    Raises:
        UserError: a model that is not there, or is no causal language model.
    """
    config = find_config(model, revision=revision)
    layers = text_config(config).num_hidden_layers
    parameters = num_parameters(without_data(config))
    raw = _proposal(model, revision, config, parameters, machine)
    stored = str(loaded_dtype(config)).removeprefix("torch.")
    head = (
        f"{model}: {layers} layers, {count_text(parameters)} parameters, stored in {stored}.",
        f"Written for {machine.ranks} x {machine.name}, computes in {machine.dtype}.",
        "`shoal distill --dry-run` tells whether training fits, and the cheapest setting that does.",
        "`shoal explain KEY` says all of a key, and which others there are; `shoal list` what can be named.",
    )
    text = "\n".join([*(line for words in head for line in _comment(words)), "", *_commented(raw)]) + "\n"
    parse_recipe(read_yaml(text))
    return text


def _proposal(
    model: str, revision: str | None, config: PreTrainedConfig, parameters: int, machine: Machine
) -> dict[str, Any]:
    """The recipe as a plain mapping."""
    text, on_cpu = text_config(config), machine.device.type == "cpu"
    longest = getattr(text, "max_position_embeddings", None) or 512
    length = min(512 if on_cpu else 2048, longest)
    rows = 2 if on_cpu else machine.ranks * max(1, 32 // machine.ranks)
    return {
        "model": model,
        **({} if revision is None else {"revision": revision}),
        "run_dir": f"runs/{name_of_model(model)}",
        "measure": {"data": "python_docs", "num_tokens": 8192 if on_cpu else 131_072, "sequence_length": length},
        "prune": {
            "metric": DEFAULT_METRIC,
            "num_drop": default_count(text.num_hidden_layers),
            "protect": [0, -1] if text.num_hidden_layers > 2 else [0],
        },
        "distill": {
            "data": [
                {"path": "docstrings", "weight": 0.7},
                {"path": "ability_texts", "weight": 0.3, "losses": "cross_entropy"},
            ],
            "losses": "forward_kl",
            "num_tokens": 80_000 if on_cpu else 10_000_000,
            "sequence_length": length,
            "batch_size": rows,
            "trainable": "from_first_cut",
            "deepspeed": "zero0" if machine.ranks == 1 else "zero2",
            "trainer": {"learning_rate": 1e-3 if parameters < SMALL else 1e-4},
        },
        "eval": {"tasks": "quick"},
    }


def _commented(raw: dict[str, Any]) -> list[str]:
    """The lines of a recipe, each key below what it means; sections apart, a list of mappings with an entry a line."""
    said, lines = {place: _comment(first_sentence(meaning(own))) for place, own in places()}, list[str]()
    for key, value in raw.items():
        if not isinstance(value, dict):
            lines += [*said[key], f"{key}: {as_yaml(value)}"]
            continue
        lines += ["", *said[key], f"{key}:"]
        for inner, own in value.items():
            if isinstance(own, list) and own and isinstance(own[0], dict):
                entry = [f"{inner}:", *(f"  - {as_yaml(each)}" for each in own)]
            else:
                entry = [f"{inner}: {as_yaml(own)}"]
            lines += [f"  {line}" for line in [*said[f"{key}.{inner}"], *entry]]
    return lines


def _comment(words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent="# ", subsequent_indent="# ", **UNBROKEN)
