"""`python -m shoal.artifacts.schemas`: JSON schemas of the files that scripts may rely on, made from their types.

What is below `internal` in a file is left out, and so are the private numbers of a score.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from shoal.artifacts.artifact import Artifact
from shoal.artifacts.evaluation import Scores, Speed
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.recipe.evaluate import CONFIGS_DIR
from shoal.yaml_text import own_yaml

FOLDER = CONFIGS_DIR / "schemas"
PUBLIC: tuple[type[Artifact], ...] = (Plan, Importance, Training, Scores, Speed)
PRIVATE = {"TaskScore": ("items", "prompts", "matching"), "BatchSpeed": ("samples",), "SpeedScore": ("samples",)}
"""Fields inside of others that may change with every version."""
ADDED: dict[str, Any] = own_yaml(__file__)
"""What Artifact.body adds to the fields: of every kind `made`, and of some by their names what follows from others."""


def schema_of(kind: type[Artifact]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the public part of an artifact's file."""
    Artifact.__pydantic_config__ = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)
    said = TypeAdapter(kind).json_schema(mode="serialization")
    own = {key: value for key, value in said["properties"].items() if key not in (*kind.INTERNAL, "provenance")}
    own |= ADDED.get(kind.__name__, {})
    parts = said.get("$defs", {})
    for name in PRIVATE.keys() & parts.keys():
        for key in PRIVATE[name]:
            parts[name]["properties"].pop(key)
            parts[name]["required"] = [each for each in parts[name]["required"] if each != key]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": kind.schema(),
        "description": " ".join((kind.__doc__ or "").partition("Example:")[0].split()),
        "type": "object",
        "properties": {"schema": {"const": kind.schema()}, "made": ADDED["made"], **own},
        "required": ["schema", "made", *(key for key in said["required"] if key in own)],
        "$defs": _named_in(own, parts),
    }


def _named_in(schema: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Those of ``parts`` that ``schema`` refers to, and the ones that they refer to."""
    found = {name: part for name, part in parts.items() if f'"#/$defs/{name}"' in json.dumps(schema)}
    return {name: part for own in found for name, part in {own: parts[own], **_named_in(parts[own], parts)}.items()}


def text_of(kind: type[Artifact]) -> str:
    """The schema's file."""
    return json.dumps(schema_of(kind), indent=1, ensure_ascii=False) + "\n"


def file_name(kind: type[Artifact]) -> str:
    """`plan-1.schema.json`."""
    return f"{kind.schema().removeprefix('shoal/').replace('/', '-')}.schema.json"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in PUBLIC:
        (FOLDER / file_name(each)).write_text(text_of(each), encoding="utf-8")
