"""The DeepSpeed configuration that `distill.deepspeed` names, as it stands in its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.recipe.evaluate import CONFIGS_DIR

PRECISIONS = ("bf16", "fp16", "torch_autocast")
"""Sections that say what is computed in."""
SECTIONS = ("zero_optimization", *PRECISIONS, "offload_optimizer", "offload_param")
MIXED = {"bfloat16": "bf16-mixed", "float16": "fp16-mixed"}
"""Words of distill.precision for what autocast casts to."""
COMPUTED_IN = {"bf16": "bfloat16", "fp16": "float16"}


def read_deepspeed(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """A copy of the configuration: a mapping, the JSON file at a path, or that of a name in configs/deepspeed.

    Raises:
        UserError: there is no such file, it holds no JSON mapping, or a section of it is none.
    """
    if source is None:
        return {}
    if isinstance(source, dict):
        return _with_sections(json.loads(json.dumps(source)))
    for file in (Path(source), CONFIGS_DIR / f"deepspeed/{source}.json"):
        if file.is_file():
            try:
                config = dict(json.loads(file.read_bytes()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{file}: holds no JSON mapping ({error}); mend it, or name a shipped one") from error
            return _with_sections(config)
    shipped = ", ".join(sorted(file.stem for file in (CONFIGS_DIR / "deepspeed").glob("*.json")))
    raise UserError(f"distill.deepspeed: no file {source!r}; shipped ones are {shipped}")


def precisions_said(config: Mapping[str, Any]) -> list[str]:
    """What ``config`` says itself, in the words of distill.precision."""
    cast_to = str(config.get("torch_autocast", {}).get("dtype")).removeprefix("torch.")
    words = {"bf16": "bf16-true", "fp16": "fp16-true", "torch_autocast": MIXED.get(cast_to, cast_to)}
    return [words[key] for key in PRECISIONS if config.get(key, {}).get("enabled")]


def computed_in(precision: str) -> str:
    """Name of torch's for what a word of distill.precision multiplies in."""
    return COMPUTED_IN.get(precision[:4], "float32")


def trained_in(config: Mapping[str, Any], fastest: str) -> str:
    """The precision of a training, by its word, on a device that multiplies fast in ``fastest``, where nothing names
    one.

    float16 needs its losses scaled, and the optimizers of ZeRO 1 to 3 clip gradients as if they were not (DeepSpeed
    0.19): there it is float32.
    """
    is_sharded = config.get("zero_optimization", {}).get("stage", 0)
    return "float32" if fastest == "float16" and is_sharded else MIXED.get(fastest, fastest)


def _with_sections(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without sections that are null, or whose precision is `auto`, which is the recipe's.

    Raises:
        UserError: a section that is no mapping, or autocast to no precision.
    """
    for parts in (config, config.get("zero_optimization") or {}):
        for name in filter(parts.__contains__, SECTIONS):
            section = parts[name]
            if section is not None and not isinstance(section, dict):
                raise UserError(
                    f"distill.deepspeed: {name} must be a mapping (got {section!r}), as DeepSpeed's documentation "
                    "writes it; mend it, or leave it out"
                )
            if section is None or section.get("enabled") == "auto":
                del parts[name]
    cast = config.get("torch_autocast", {})
    if cast.get("enabled") and str(cast.get("dtype")).removeprefix("torch.") not in MIXED:
        raise UserError(
            f"distill.deepspeed: torch_autocast.dtype must be one of {', '.join(MIXED)} (got {cast.get('dtype')!r})"
        )
    return config
