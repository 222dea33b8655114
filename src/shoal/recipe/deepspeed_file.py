"""The DeepSpeed configuration that `distill.deepspeed` names, as it stands in its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.recipe.suites import CONFIGS_DIR


def read_deepspeed(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """A copy of the configuration: a mapping, the JSON file at a path, or that of a name under configs/.

    Raises:
        UserError: there is no such file, or it holds no JSON mapping.
    """
    if source is None:
        return {}
    if isinstance(source, dict):
        return json.loads(json.dumps(source))
    candidates = [Path(source), CONFIGS_DIR / source, CONFIGS_DIR.parent / source]
    if source.startswith("configs/"):
        candidates.append(CONFIGS_DIR / source.removeprefix("configs/"))
    for file in candidates:
        if file.is_file():
            try:
                config = json.loads(file.read_bytes())
            except json.JSONDecodeError as error:
                raise UserError(f"{file}: is not valid JSON ({error}); mend it, or name a shipped one") from error
            if not isinstance(config, dict):
                raise UserError(f"{file}: must be a JSON mapping (got {config!r}); mend it, or name a shipped one")
            return config
    shipped = ", ".join(sorted(f"deepspeed/{file.name}" for file in (CONFIGS_DIR / "deepspeed").glob("*.json")))
    raise UserError(f"distill.deepspeed: no file {source!r}; shipped ones are {shipped}")


def precisions_named(config: dict[str, Any]) -> list[str]:
    """The sections by which ``config`` says itself what is computed in."""
    return [key for key in ("bf16", "fp16", "torch_autocast") if config.get(key, {}).get("enabled")]
