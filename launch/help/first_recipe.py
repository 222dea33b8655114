"""`shoal init`: a commented recipe for a model and this machine, from the model's configuration alone."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from shoal.atomic_files import write_text
from shoal.compress.free_layers import default_count
from shoal.data.default_text import CALIBRATION, LICENCES, PUBLIC_TASKS, TRAINING, DefaultText, default_text
from shoal.formatting import count_text
from shoal.machine import device_name, fast_dtype, ranks_to_start
from shoal.model_names import name_of_model
from shoal.models.anatomy import text_config
from shoal.models.load import loaded_dtype, num_parameters, without_data
from shoal.models.resolve import find_config
from shoal.progress import doing
from shoal.recipe.distill import TrainingSource
from shoal.recipe.prune import CutByScore
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import as_dict
from shoal.runtime import device
from shoal.yaml_text import read_yaml

from .explain import UNBROKEN, as_yaml, first_sentence, meaning, places

WIDTH = 110
"""Columns of the file."""


@dataclass(frozen=True)
class Machine:
    """What there is to train on."""

    device: torch.device
    name: str
    """Name that the manufacturer gives the device."""
    ranks: int
    dtype: str
    """Precision that the device multiplies fast in."""
    flops: float
    """FLOP/s of a training that are to be expected of all ranks together."""


def init(asked: argparse.Namespace) -> str:
    """Write a first recipe to the file ``asked.out``, and say where."""
    from shoal.train.preflight.throughput import machine_rate

    file, here = asked.out, device()
    with doing(f"looking at {asked.model}"):
        ranks = ranks_to_start(None)
        machine = Machine(here, device_name(here), ranks, fast_dtype(here).dtype, machine_rate(ranks))
        text = first_recipe(asked.model, machine, revision=asked.revision)
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
    text = default_text(parameters)
    raw = _proposal(model, revision, config, parameters, machine, text)
    stored = str(loaded_dtype(config)).removeprefix("torch.")
    head = (
        f"{model}: {layers} layers, {count_text(parameters)} parameters, stored in {stored}.",
        f"Written for {machine.ranks} x {machine.name}, computes in {machine.dtype}.",
        f"Training text, {text.kind}: {text.reason}.",
        "`shoal distill FILE --dry-run` shows whether training fits, and the cheapest setting that fits.",
        "`shoal explain KEY` explains a key; `shoal list` shows the names of tasks, metrics and losses.",
    )
    lines = [*(line for words in head for line in _comment(words)), "", *_commented(raw, _notes(raw, machine))]
    parse_recipe(read_yaml(recipe := "\n".join(lines) + "\n"))
    return recipe


def _proposal(
    model: str, revision: str | None, config: PreTrainedConfig, parameters: int, machine: Machine, text: DefaultText
) -> dict[str, Any]:
    """The recipe as a plain mapping."""
    decoder, on_cpu, is_public = text_config(config), machine.device.type == "cpu", text.kind == "public"
    longest = getattr(decoder, "max_position_embeddings", None) or 512
    count, sequence_length = decoder.num_hidden_layers, min(512 if on_cpu else 2048, longest)
    rows, metric = 2 if on_cpu else machine.ranks * max(1, 32 // machine.ranks), CutByScore().default_metric
    return {
        "model": model,
        **({} if revision is None else {"revision": revision}),
        "run_dir": f"runs/{name_of_model(model)}",
        "measure": {
            "data": _entries(CALIBRATION[text.kind]),
            "num_tokens": 8192 if on_cpu else 131_072,
            "sequence_length": sequence_length,
        },
        "prune": {"metric": metric, "num_drop": default_count(count), "protect": [0, -1] if count > 2 else [0]},
        "distill": {
            "data": _entries(TRAINING[text.kind]),
            "losses": "forward_kl",
            "num_tokens": text.num_tokens(parameters, machine.flops, control=is_public),
            "sequence_length": sequence_length,
            "batch_size": rows,
            **({"packing": "bfd"} if is_public else {}),
            "trainable": "from_first_cut",
            "deepspeed": "zero0" if machine.ranks == 1 else "zero2",
            # what had the lowest KL: 2e-4 at 270 million parameters, 2e-5 at 494, both in steps of 1,024 tokens
            "trainer": {"learning_rate": 2e-4 if parameters < 3e8 else 2e-5 if on_cpu else 1e-4},
        },
        "eval": {"tasks": [*PUBLIC_TASKS], "limit": 200, "control": True} if is_public else {"tasks": "quick"},
    }


def _entries(sources: Sequence[TrainingSource]) -> list[dict[str, Any]]:
    """Sources as a recipe says them."""
    names = {"path", "name", "weight", "losses"} if len(sources) > 1 else {"path", "name"}
    plain = [{key: value for key, value in as_dict(each).items() if key in names and value} for each in sources]
    return [{**each, "losses": each["losses"][0]["kind"]} if "losses" in each else each for each in plain]


def _notes(raw: dict[str, Any], machine: Machine) -> dict[str, str]:
    """What stands behind a value: place, or path of a source -> words."""
    alone = "of training" if "control" not in raw["eval"] else "of training student and control"
    hour = f"an hour {alone} on {machine.ranks} x {machine.name}, as estimated"
    few, tokens = f"longer than {hour}, in which almost nothing is recovered", raw["distill"]["num_tokens"]
    return {**LICENCES, "distill.num_tokens": few if tokens == DefaultText.FEWEST else f"at most {hour}"}


def _commented(raw: dict[str, Any], notes: dict[str, str]) -> list[str]:
    """The lines of a recipe, each key below what it means; sections apart, a list of mappings with an entry a line.
    Behind values stand the ``notes`` on their places or on what they name."""
    said, lines = {place: _comment(first_sentence(meaning(own))) for place, own in places()}, list[str]()
    for key, value in raw.items():
        if not isinstance(value, dict):
            lines += [*said[key], f"{key}: {as_yaml(value)}"]
            continue
        lines += ["", *said[key], f"{key}:"]
        for inner, own in value.items():
            if isinstance(own, list) and own and isinstance(own[0], dict):
                entry = [f"{inner}:", *(_noted(f"  - {as_yaml(each)}", notes.get(each.get("path"))) for each in own)]
            else:
                entry = [_noted(f"{inner}: {as_yaml(own)}", notes.get(f"{key}.{inner}"))]
            lines += [f"  {line}" for line in [*said[f"{key}.{inner}"], *entry]]
    return lines


def _noted(line: str, note: str | None) -> str:
    return line if note is None else f"{line}   # {note}"


def _comment(words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent="# ", subsequent_indent="# ", **UNBROKEN)
