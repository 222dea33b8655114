"""What names a model: a folder, a Hub id or demo:<name>. Nothing is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.yaml_text import own_yaml

DEMO_PREFIX = "demo:"
DEMO_MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = own_yaml(__file__)
"""Name -> package that contains the file, the file, the first digits of its SHA-256, part of its config.json."""
HUB = "https://huggingface.co/"
ADAPTER_CONFIG = "adapter_config.json"


def names_model(name: str) -> bool:
    """Whether ``name`` is that of a model: a checkpoint's folder, demo:<name>, or what can only be a Hub id."""
    folder = Path(name).expanduser()
    if folder.exists():
        return any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG))
    # a path beside others that are there is a misspelt folder; recipes are .yaml, and runs/ holds runs
    return name.startswith((DEMO_PREFIX, HUB)) or (
        re.fullmatch(r"[\w-][^/]*/[^/]+(?<!\.yaml)(?<!\.yml)", name) is not None
        and folder.parent.name != "runs"
        and not folder.parent.is_dir()
    )


def model_within(folder: Path) -> str:
    """The newest model in a folder of a Trainer, or of the Hub's cache; empty if there is none."""
    found = [file.parent for end in ("checkpoint-*", "snapshots/*") for file in folder.glob(f"{end}/config.json")]
    return str(max(found, key=lambda model: model.stat().st_mtime)) if found else ""


def name_of_model(model: str) -> str:
    """A name for folders and files: the end of a Hub id, a path or demo:<name>."""
    end = re.split(r"[/:]", model.rstrip("/"))[-1]
    return re.sub(r"[^\w.-]+", "-", end).strip(".-") or "model"


def refuse_no_model(name: str, revision: str | None = None) -> None:
    """Refuse a name that can be no model's: a demo model that there is not, and the path of nothing; and a revision of
    what is not on the Hub."""
    if name.startswith(DEMO_PREFIX):
        if name.removeprefix(DEMO_PREFIX) not in DEMO_MODELS:
            known_models = ", ".join(DEMO_PREFIX + known for known in DEMO_MODELS)
            raise UserError(f"model {name!r}: no demo model has this name; shipped are {known_models}")
    elif name.startswith(HUB):
        owner_and_name = "/".join(name.removeprefix(HUB).split("/")[:2])
        raise UserError(f"model {name!r}: is an address; give the model's id, {owner_and_name}")
    elif Path(name).expanduser().is_file():
        raise UserError(f"model {name!r}: is a file; give the folder of a checkpoint, a Hub id or demo:<name>")
    elif (name.count("/") > 1 or name.startswith((".", "/", "~"))) and not Path(name).expanduser().exists():
        raise UserError(f"model {name!r}: no such folder; give an existing folder, a Hub id or demo:<name>")
    if revision is not None and (name.startswith(DEMO_PREFIX) or Path(name).expanduser().exists()):
        raise UserError(f"model {name!r}: is not on the Hub, so it has no revision {revision!r}; remove the revision")
