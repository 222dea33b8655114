"""The push to the Hugging Face Hub: first the local export is made whole, then it goes up in one resumable call."""

from __future__ import annotations

import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, whichever this version stands on
)
from huggingface_hub.utils._http import default_client_factory

from shoal.atomic_files import write_text, written_file
from shoal.errors import UserError
from shoal.progress import doing

log = logging.getLogger(__name__)

FIGURES_DIR = "figures"
ANSWER_S = 180.0
"""Seconds until the Hub has to answer, or an upload to move on; huggingface_hub itself waits for ever."""
REMEDIES = {
    401: "the Hub does not accept the token; run `hf auth login` with one that may write",
    403: "the token may not write there; run `hf auth login` with one that may, or choose another export.hub_repo",
    404: "no such account or organisation; check the spelling of export.hub_repo",
}


LEFT_OUT = ["*.tmp", "*.old"]
REPLACED = ["model*.safetensors", "model.safetensors.index.json", "figures/*"]
"""Files of an earlier upload that go: weights in other files would be loaded in place of these, or beside them."""


def push(folder: Path, card: str, repo: str, *, private: bool, endpoint: str | None = None) -> str:
    """The URL of the Hub repository that now holds checkpoint, card and figures.

    Card and figures, which a run keeps beside ``folder``, are written into it before anything is sent, so that a failed
    push leaves a complete export. After a failure, what is already on the Hub is not sent a second time: unchanged
    files are skipped, and large ones are stored by content.

    Raises:
        UserError: no token, a refusal, an unreachable Hub or a failed upload; with the command that goes on from there.
    """
    complete_export(folder, card, folder.parent / FIGURES_DIR)
    token = get_token()
    if token is None:
        reason = "no Hugging Face token was found; run `hf auth login`"
        raise UserError(_failure(folder, repo, reason, private=private, endpoint=endpoint))
    api = HfApi(endpoint=endpoint, token=token)
    try:
        log.info("pushing %s to %s", folder, repo)
        set_client_factory(_bounded_client)
        with doing(f"pushing to {repo}"):
            url = str(api.create_repo(repo, private=private, exist_ok=True))
            if private and api.repo_info(repo).private is False:  # the Hub does not hide a repository that is there
                raise UserError(
                    f"export.private: {repo} is there already and public; make it private on the Hub, set "
                    "export.private: false, or name another export.hub_repo"
                )
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Checkpoint, model card and figures from shoal",
                ignore_patterns=LEFT_OUT,
                delete_patterns=REPLACED,
            )
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # RuntimeError: what huggingface_hub and hf_xet raise for a failed transfer; ValueError: a refused name or card
        reason = _reason(error).replace(token, "(hidden)")
        raise UserError(_failure(folder, repo, reason, private=private, endpoint=endpoint)) from error
    finally:
        set_client_factory(default_client_factory)
    return url


def _bounded_client() -> Any:
    """What huggingface_hub sends with, where no request waits longer than ANSWER_S for a sign of the other side."""
    client = default_client_factory()
    client.timeout = ANSWER_S
    return client


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


def retry_command(folder: Path, repo: str, *, private: bool, endpoint: str | None = None) -> str:
    """The command that pushes the export without shoal."""
    words = ["hf", "upload", repo, str(folder), ".", *(["--private"] if private else [])]
    for option, patterns in (("--exclude", LEFT_OUT), ("--delete", REPLACED)):
        words += [word for pattern in patterns for word in (option, pattern)]
    prefix = f"HF_ENDPOINT={shlex.quote(endpoint)} " if endpoint else ""
    return prefix + shlex.join(words)


def _failure(folder: Path, repo: str, reason: str, *, private: bool, endpoint: str | None) -> str:
    command = retry_command(folder, repo, private=private, endpoint=endpoint)
    if_private = " (which fills a public repository that is there already)" if private else ""
    return (
        f"export to {repo}: {reason}. The local export is complete at {folder}; push it again with the same shoal "
        f"command or{if_private} with: {command}"
    )


def _reason(error: BaseException) -> str:
    """What went wrong in one line, from the deepest HTTP answer in the chain of causes."""
    status, text = None, ""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
        text = str(cause).strip().split("\n")[0] or type(cause).__name__
        cause = cause.__cause__
    if status in REMEDIES:
        return REMEDIES[status]
    if status is not None:
        return f"the Hub answered with HTTP status {status}"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached ({text[:200]})"
    return f"{text[:300]}"
