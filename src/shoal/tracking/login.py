"""What this machine says of W&B: whether somebody is logged in, and whether W&B is to be offline here.

Read from where W&B's own client looks (wandb 0.31: sdk/lib/wbauth, sdk/lib/settings_file.py), without loading it.
"""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

CLOUD = "https://api.wandb.ai"
"""Address of the server where nothing names another one."""


def has_key() -> bool:
    """Whether there is a key: in the environment, in the file that `wandb login` writes, or in W&B's settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = _settings()
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or CLOUD
    if settings.get("api_key") and settings.get("base_url", CLOUD).rstrip("/") == server.rstrip("/"):
        return True
    try:
        login = netrc.netrc(_netrc_file()).authenticators(urlsplit(server).netloc)
    except (OSError, ValueError, netrc.NetrcParseError):  # not there, or nothing that W&B could read
        return False
    return login is not None and bool(login[2])


def wanted_mode() -> str | None:
    """The mode that WANDB_MODE asks for, else `wandb offline` in W&B's settings; None = nobody asks."""
    return os.environ.get("WANDB_MODE") or _settings().get("mode") or None


def _netrc_file() -> str:
    if named := os.environ.get("NETRC"):
        return os.path.expanduser(named)
    files = [os.path.expanduser(f"~/{name}") for name in (".netrc", "_netrc")]
    return next(filter(os.path.exists, files), files[0])


def _settings() -> dict[str, str]:
    """W&B's settings of this user, under those of the current folder."""
    folder = Path(os.environ.get("WANDB_DIR", "."))
    local = folder / (".wandb" if (folder / ".wandb").exists() else "wandb") / "settings"
    settings = Path(os.path.expanduser(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb"))) / "settings"
    values: dict[str, str] = {}
    for file in (settings, local):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
            values |= dict(parser.items("default"))
        except (OSError, ValueError, configparser.Error):  # which W&B takes for empty, too
            continue
    return values
