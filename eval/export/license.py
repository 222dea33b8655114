"""Under which license a model made from another may be passed on: that of its base, as far as it is stated there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from shoal.models.checkpoint_files import DEMO_PREFIX

DEMO_LICENSES = {"smollm2-135m": "apache-2.0"}


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
    """The license of ``model`` that the card in ``folder`` states; else `other`, with the license file there.

    ``folder`` None = the model itself where it is a local folder, else what the Hub's cache holds of ``hub_id``.
    """
    if model.startswith(DEMO_PREFIX):
        return License(DEMO_LICENSES.get(model.removeprefix(DEMO_PREFIX)), source="the base model's card")
    folder = folder or Path(model).expanduser()
    if not folder.is_dir() and hub_id is not None:
        cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    stated = _from_card(folder / "README.md")
    file = license_file(folder)
    if stated.identifier or file is None:
        return stated
    return License(
        "other", "license-of-the-base-model", file.name, f"the file {file.name} that came with the base model"
    )


def license_file(folder: Path) -> Path | None:
    """The file that holds the license's text in a checkpoint's folder."""
    return next(filter(Path.is_file, sorted(folder.glob("LICENSE*"))), None)


def _from_card(readme: Path) -> License:
    if not readme.is_file():
        return License()
    try:
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):  # a card nobody can parse states nothing
        return License()
    identifier, name, link = (_single_text(data.get(field)) for field in ("license", "license_name", "license_link"))
    return License(identifier, name, link, "the base model's card")


def _single_text(value: Any) -> str | None:
    """A field's text; cards also write a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and value else None
