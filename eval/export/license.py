"""Under which license a model made from another may be passed on: that of its base, as far as it is stated there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from shoal.models.checkpoint_files import DEMO_PREFIX

DEMO_LICENSES = {"smollm2-135m": "apache-2.0"}
TEXTS = (
    ("apache license version 2.0", "apache-2.0"),
    ("mit license", "mit"),
    ("permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    ("llama 3.3 community license agreement", "llama3.3"),
    ("llama 3.2 community license agreement", "llama3.2"),
    ("llama 3.1 community license agreement", "llama3.1"),
    ("meta llama 3 community license agreement", "llama3"),
    ("llama 2 community license agreement", "llama2"),
    ("gemma terms of use", "gemma"),
)
"""Words near the top of a license's text -> its name on the Hub."""
TOP_CHARACTERS = 600
"""Characters that are searched; further down a license may name others."""


@dataclass(frozen=True)
class License:
    """What is known of a license; identifier None = nothing is stated."""

    identifier: str | None = None
    """Name on the Hub; `other` for a license that the Hub has no name for."""
    name: str | None = None
    link: str | None = None
    source: str = ""
    """Place where the license is stated, for a reader."""


def base_license(model: str, *, hub_id: str | None, revision: str | None, folder: Path | None) -> License:
    """The license of ``model`` from the card in ``folder``, else from the license file there.

    ``folder`` None = the model itself where it is a local folder, else what the Hub's cache holds of ``hub_id``.
    """
    if model.startswith(DEMO_PREFIX):
        return License(DEMO_LICENSES.get(model.removeprefix(DEMO_PREFIX)), source="the base model's card")
    folder = folder or Path(model).expanduser()
    if not folder.is_dir() and hub_id is not None:
        cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    stated = _from_card(folder / "README.md")
    return stated if stated.identifier else _from_text(folder)


def license_file(folder: Path) -> Path | None:
    """The file that holds the license's text in a checkpoint's folder."""
    files = sorted(file for file in folder.glob("LICENSE*") if file.is_file()) if folder.is_dir() else []
    return files[0] if files else None


def _from_card(readme: Path) -> License:
    if not readme.is_file():
        return License()
    try:
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):  # a card nobody can parse states nothing
        return License()
    identifier, name, link = (_single_text(data.get(field)) for field in ("license", "license_name", "license_link"))
    return License(identifier, name, link, "the base model's card")


def _from_text(folder: Path) -> License:
    file = license_file(folder)
    if file is None:
        return License()
    top = " ".join(file.read_text(encoding="utf-8", errors="replace").split()).lower()[:TOP_CHARACTERS]
    identifier = next((name for words, name in TEXTS if words in top.replace(", version", " version")), None)
    source = f"the file {file.name} that came with the base model"
    if identifier is None:
        return License("other", "license-of-the-base-model", file.name, source)
    return License(identifier, source=source)


def _single_text(value: Any) -> str | None:
    """A field's text; cards also write a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and value else None
