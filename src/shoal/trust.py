"""What of a run directory is believed, since it may have come from somebody else.

Results are data, and reading them runs nothing. Three things are more: DeepSpeed unpickles checkpoints, which runs what
they hold, recipe.yaml can name code to run, and a link leads what is written to another place. So checkpoints and
recipe.yaml carry a signature made with a key that no run directory holds, and links that lead out are refused; who
knows better says so in the environment, not in a recipe, which may have come along.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from shoal.atomic_files import cache_dir
from shoal.errors import UserError

log = logging.getLogger(__name__)

WANDB_LOG = "debug-core.log"
"""W&B puts this link to a log in the user's cache into its own folder, and nobody writes through it."""
CONSENT = "SHOAL_TRUSTED_RUNS"
"""Environment variable: run directories, or folders of them, that the user vouches for; separated as in PATH."""
KEY_BYTES = 32


def is_trusted(path: Path) -> bool:
    """Whether the user vouches for ``path`` or a folder that it lies in."""
    named = (Path(entry).expanduser().resolve() for entry in os.environ.get(CONSENT, "").split(os.pathsep) if entry)
    return any(path.resolve().is_relative_to(folder) for folder in named)


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with this user's signature; with none where the key cannot be had, which is said once."""
    key = _key_at(cache_dir())
    return document if key is None else {**document, "signature": _signature(document, key)}


def is_signed(document: dict[str, Any]) -> bool:
    """Whether ``document`` is as this user has signed it."""
    signature = document.get("signature")
    if not isinstance(signature, str):
        return False
    key = _key_at(cache_dir())
    rest = {name: value for name, value in document.items() if name != "signature"}
    return key is not None and hmac.compare_digest(signature.encode(), _signature(rest, key).encode())


def refuse_links(run_dir: Path) -> None:
    """Refuse a run directory in which something leads elsewhere, before anything is written there.

    Raises:
        UserError: it holds a link out of it, or what is neither file nor folder.
    """
    if is_trusted(run_dir):
        return
    root = run_dir.resolve()
    for entry in _entries(root):
        if entry.name == WANDB_LOG and Path(entry.path).relative_to(root).parts[0] == "wandb":
            continue
        if entry.is_symlink():
            target = Path(entry.path).resolve()
            if not target.is_relative_to(root):
                raise UserError(
                    f"{entry.path}: is a link that leads out of the run directory, to {target}, where shoal would "
                    "write. Put what it leads to in its place, or choose another run_dir; if the link is yours, set "
                    f"the environment variable {CONSENT}={root}"
                )
        elif not (entry.is_file() or entry.is_dir()):
            raise UserError(f"{entry.path}: is neither file nor folder; remove it, or choose another run_dir")


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Everything in ``folder`` at any depth, links not followed."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return  # not there yet, gone meanwhile or not to be read: whoever writes there says so
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path)


def _signature(document: dict[str, Any], key: bytes) -> str:
    plain = json.loads(json.dumps(document))  # as it will be read
    return hmac.new(key, json.dumps(plain, sort_keys=True).encode(), hashlib.sha256).hexdigest()


@cache
def _key_at(folder: Path) -> bytes | None:
    """This user's key in ``folder``, made on first use; None where that cannot be."""
    file = folder / f"checkpoint-key-{os.geteuid()}"
    try:
        if not file.exists():
            _make_key(file)
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as handle:
            status, key = os.fstat(handle.fileno()), handle.read(KEY_BYTES + 1)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and len(key) == KEY_BYTES:
            return key
        problem = "is not a key of yours"
    except OSError as error:
        problem = error.strerror or str(error)
    log.warning(
        "%s: %s; checkpoints and recipe.yaml are written without a signature, and going on from them will need %s. Set "
        "SHOAL_CACHE to a folder of yours",
        file,
        problem,
        CONSENT,
    )
    return None


def _make_key(file: Path) -> None:
    """Whole or not at all, readable by nobody else; of two processes that make it at once both get the first one's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
            handle.write(secrets.token_bytes(KEY_BYTES))
        os.link(temporary, file)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)
