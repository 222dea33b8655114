"""The DeepSpeed configuration that `distill.deepspeed` names, as it stands in its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.recipe.evaluate import CONFIGS_DIR

PRECISIONS = ("bf16", "fp16", "torch_autocast")
"""Sections that say what is computed in."""
SECTIONS = ("zero_optimization", *PRECISIONS, "offload_optimizer", "offload_param")
AUTOCAST_DTYPES = ("bfloat16", "float16")


def read_deepspeed(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """A copy of the configuration: a mapping, the JSON file at a path, or that of a name under configs/.

    Raises:
        UserError: there is no such file, it holds no JSON mapping, or a section of it is none.
    """
    if source is None:
        return {}
    if isinstance(source, dict):
        return _with_sections(json.loads(json.dumps(source)))
    for file in (Path(source), CONFIGS_DIR / source, CONFIGS_DIR / source.removeprefix("configs/")):
        if file.is_file():
            try:
                config = dict(json.loads(file.read_bytes()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{file}: holds no JSON mapping ({error}); mend it, or name a shipped one") from error
            return _with_sections(config)
    shipped = ", ".join(sorted(f"deepspeed/{file.name}" for file in (CONFIGS_DIR / "deepspeed").glob("*.json")))
    raise UserError(f"distill.deepspeed: no file {source!r}; shipped ones are {shipped}")


def precisions_named(config: dict[str, Any]) -> list[str]:
    """The sections by which ``config`` says itself what is computed in."""
    return [key for key in PRECISIONS if config.get(key, {}).get("enabled")]


def trained_in(config: dict[str, Any], fastest: str) -> str:
    """The precision of autocast for a device on which ``fastest`` is that, where nothing names one.

    float16 needs its losses scaled, and the optimizers of ZeRO 1 to 3 clip gradients as if they were not (DeepSpeed
    0.19): there it is float32.
    """
    return "float32" if fastest == "float16" and config.get("zero_optimization", {}).get("stage", 0) else fastest


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
    if cast.get("enabled") and str(cast.get("dtype")).removeprefix("torch.") not in AUTOCAST_DTYPES:
        raise UserError(
            f"distill.deepspeed: torch_autocast.dtype must be one of {', '.join(AUTOCAST_DTYPES)} (got "
            f"{cast.get('dtype')!r})"
        )
    return config
