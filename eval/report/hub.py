"""The push to the Hugging Face Hub: first the local export is made whole, then it goes up in one resumable call."""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, whichever this version stands on
)

from shoal.atomic_files import write_text, written_file
from shoal.errors import NO_ANSWER, NO_HUB, NO_TOKEN, UserError
from shoal.progress import doing

from .report import FIGURES_DIR

log = logging.getLogger(__name__)

REMEDIES = {
    401: "the Hub does not accept the token; run `hf auth login` with one that may write",
    403: "the token may not write there; run `hf auth login` with one that may, or choose another export.hub_repo",
    404: "no such account or organisation; check the spelling of export.hub_repo",
}
RETRY = "The local export is complete at {}; the same command pushes it again"
REPLACED = ["model*.safetensors", "model.safetensors.index.json", "figures/*"]
"""Files of an earlier upload that go: weights in other files would be loaded in place of these, or beside them."""


def push(
    folder: Path,
    card: str,
    repo: str,
    *,
    private: bool,
    endpoint: str | None = None,
    retry: str = RETRY,
    **further: Any,
) -> str:
    """The URL of the Hub repository that now holds checkpoint, card and figures.

    Card and figures, which a run keeps beside ``folder``, are written into it before anything is sent, so that a failed
    push leaves a complete export. After a failure, what is already on the Hub is not sent a second time. ``further``
    are arguments of HfApi.create_repo and HfApi.upload_folder, ``retry`` says how it is tried again.

    Raises:
        UserError: an argument of neither, no token, a refusal, an unreachable Hub, a failed upload, or a public
            repository for a private model.
    """
    of_repo, of_upload = (inspect.signature(call).parameters for call in (HfApi.create_repo, HfApi.upload_folder))
    if unknown := next((name for name in further if name not in {**of_repo, **of_upload}), None):
        raise UserError(f"{unknown}: huggingface_hub's create_repo and upload_folder have no such argument; remove it")
    complete_export(folder, card, folder.parent / FIGURES_DIR)
    token = further.pop("token", None) or get_token()
    sent = {"commit_message": "Checkpoint, model card and figures from shoal", **further}
    failed = f"export to {repo}: {{}}. {retry.format(folder)}"
    if token is None:
        raise UserError(failed.format(NO_TOKEN))
    api = HfApi(endpoint=endpoint, token=token)
    try:
        with doing(f"pushing to {repo}"):
            url = str(api.create_repo(repo, private=private, exist_ok=True, **_of(further, of_repo)))
            is_public = api.repo_info(repo).private is False  # the Hub does not hide a repository that is there
            if not (private and is_public):
                api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    ignore_patterns=["*.tmp"],
                    delete_patterns=REPLACED,
                    **_of(sent, of_upload),
                )
    except (HTTPError, OSError, RuntimeError, ValueError, *NO_ANSWER) as error:
        # RuntimeError: what huggingface_hub and hf_xet raise for a failed transfer; ValueError: a refused name or card
        raise UserError(failed.format(_reason(error).replace(token, "(hidden)"))) from error
    if private and is_public:
        raise UserError(
            f"export.private: {repo} already exists and is public; make it private on the Hub, set export.private: "
            "false, or name another export.hub_repo"
        )
    return url


def _of(further: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in further.items() if name in known}


def complete_export(folder: Path, card: str, figures: Path) -> None:
    """Put the card and the figures it shows next to the checkpoint; each file appears whole or not at all.

    Raises:
        UserError: ``folder`` holds no checkpoint, or the disk is full.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json, so there is no checkpoint to export; run `shoal distill` first")
    write_text(folder / "README.md", card)
    drawn = sorted([*figures.glob("*.png"), *figures.glob("*.svg")])
    for old in {*(folder / FIGURES_DIR).glob("*")} - {folder / FIGURES_DIR / figure.name for figure in drawn}:
        old.unlink()
    for figure in drawn:
        with written_file(folder / FIGURES_DIR / figure.name) as temporary:
            shutil.copyfile(figure, temporary)


def _reason(error: BaseException) -> str:
    """What went wrong in one line, by the Hub's answer where there was one."""
    cause: BaseException | None = error
    last = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return REMEDIES.get(status, f"the Hub answered with HTTP status {status}")
        last, cause = cause, cause.__cause__
    if isinstance(last, NO_ANSWER):
        return NO_HUB.format(repr(last))
    text = str(last).strip().split("\n")[0][:300] or type(last).__name__
    return f"the Hub cannot be reached ({text})" if isinstance(error, HTTPError) else text
