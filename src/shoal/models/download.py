"""Checkpoints from the Hub, and what shows of a model before libraries are loaded that take seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download

from shoal.errors import NO_ANSWER, NO_HUB, UserError
from shoal.model_names import ADAPTER_CONFIG, DEMO_MODELS, DEMO_PREFIX, refuse_no_model
from shoal.models.checkpoint_files import WITH_MODEL, check_checkpoint, check_config, json_or_empty
from shoal.progress import doing

_WITH_MODEL = [f"{name}*" for name in WITH_MODEL]
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", *_WITH_MODEL, "README.md")
"""Files of a checkpoint on the Hub that are downloaded."""
CONFIGS = ("config.json", ADAPTER_CONFIG)
"""Those of them that say what a model is."""
NOT_DOWNLOADED: dict[type[Exception] | tuple[type[Exception], ...], str] = {
    errors.HFValidationError: "neither a folder nor a Hub id nor demo:<name>; give one of these",
    errors.GatedRepoError: "is gated; accept its terms on the Hub and run `hf auth login`",
    errors.RepositoryNotFoundError: (
        "not found on the Hub; check the spelling, and if the repository is private, run `hf auth login`"
    ),
    errors.RevisionNotFoundError: "has no such revision on the Hub; check the spelling",
    NO_ANSWER: NO_HUB,
    Exception: "no such folder, and the Hub cannot be reached ({}); give a local path, or demo:smollm2-135m, "
    "which needs no network",
}
"""What huggingface_hub raises -> what it means, the most special first."""

HUB = (errors.HFValidationError, errors.HTTPError, errors.RevisionResolutionError)  # pyright: ignore[reportPrivateImportUsage]
FAILURES = (*NO_ANSWER, *HUB, OSError, ImportError)
"""What it raises; ImportError for a proxy whose package is missing."""


def config_of(name: str, revision: str | None, *, with_weights: bool = True) -> tuple[dict[str, Any], Path | None]:
    """config.json of model ``name``, and the folder in which it lies; None of a demo model, or on the Hub.
    ``with_weights``: the headers of a folder's weight files are checked, too.

    Raises:
        UserError: as download, or a folder as check_config and check_checkpoint.
    """
    if name.startswith(DEMO_PREFIX):
        refuse_no_model(name)
        return DEMO_MODELS[name.removeprefix(DEMO_PREFIX)][-1], None
    folder = Path(name).expanduser()
    if not (is_here := folder.exists()):
        folder = download(name, revision, patterns=CONFIGS)
        if not any((folder / file).is_file() for file in CONFIGS):
            raise UserError(
                f"model {name!r}: {folder} has no config.json; give a model for transformers, or where its download "
                "was cut short, remove that folder and download it again with a network, without HF_HUB_OFFLINE"
            )
    check_checkpoint(folder) if is_here and with_weights else check_config(folder)
    return json_or_empty(folder / "config.json"), folder if is_here else None


def download(name: str, revision: str | None, *, patterns: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """The folder with what the Hub has of model ``name``.

    Raises:
        UserError: no such model, or no network.
    """
    refuse_no_model(name)
    unwanted = ["consolidated*", "original/*"]
    try:
        with doing(f"downloading {name} from the Hub"):
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=unwanted)
            )
    except FAILURES as error:
        meaning = next(words for kind, words in NOT_DOWNLOADED.items() if isinstance(error, kind))
        reason = repr(error) if isinstance(error, NO_ANSWER) else str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: {meaning.format(reason)}") from error
