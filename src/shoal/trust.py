"""What of a run directory is believed, since it may have come from somebody else.

Results are data, and reading them runs nothing. But DeepSpeed unpickles checkpoints, which runs what they hold, and
recipe.yaml can name code to run. So both carry a signature made with a key that no run directory holds; who knows
better says so in the environment, not in a recipe, which may have come along.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
from functools import cache
from pathlib import Path
from typing import Any

from shoal.atomic_files import cache_dir

log = logging.getLogger(__name__)

CONSENT = "SHOAL_TRUSTED_RUNS"
"""Environment variable: run directories, or folders of them, that the user vouches for; separated as in PATH."""
KEY_BYTES = 32


def is_trusted(path: Path) -> bool:
    """Whether the user vouches for ``path`` or a folder that it lies in."""
    entries, own = filter(None, os.environ.get(CONSENT, "").split(os.pathsep)), Path(os.path.realpath(path))
    return any(own.is_relative_to(os.path.realpath(os.path.expanduser(entry))) for entry in entries)


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with this user's signature; with none where the key cannot be had, which is said once."""
    key = _key_at(cache_dir())
    return document if key is None else {**document, "signature": _signature(document, key)}


def is_signed(document: dict[str, Any]) -> bool:
    """Whether ``document`` is as this user has signed it."""
    signature, key = document.get("signature"), _key_at(cache_dir())
    if not isinstance(signature, str) or key is None:
        return False
    rest = {name: value for name, value in document.items() if name != "signature"}
    return hmac.compare_digest(signature.encode(), _signature(rest, key).encode())


def _signature(document: dict[str, Any], key: bytes) -> str:
    plain = json.loads(json.dumps(document))  # as it will be read
    return hmac.new(key, json.dumps(plain, sort_keys=True).encode(), hashlib.sha256).hexdigest()


@cache
def _key_at(folder: Path) -> bytes | None:
    """This user's key in ``folder``, made on first use; of processes that make it at once all get the first one's."""
    file = folder / f"checkpoint-key-{os.geteuid()}"
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
                handle.write(secrets.token_bytes(KEY_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)
            temporary.unlink()
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as handle:
            key = handle.read()
            if os.fstat(handle.fileno()).st_uid == os.geteuid() and len(key) == KEY_BYTES:
                return key
        problem = "is not your key"
    except OSError as error:
        problem = error.strerror
    log.warning("%s: %s; nothing is signed, and resuming from it will need %s. Set SHOAL_CACHE", file, problem, CONSENT)
    return None
