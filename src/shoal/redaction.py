"""Settings and text without secrets: what is passed on, or leaves the machine, goes through here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "(hidden)"
_NAME = r"(?:token|secret|password|passwd|(?:api|secret|access|private)[_-]?key|credential|authorization)s?"
_SECRET_KEY = re.compile(rf"^(?!.*_tokens$).*{_NAME}$", re.IGNORECASE)  # num_tokens is a count
_SECRET_VALUE = re.compile(
    r"\b(?:(?:hf_|api_org_|wandb_v1_|ghp_|github_pat_|AKIA)\w{16,}|(?:sk-|glpat-|xox[bp]-)[\w-]{16,})|(?<=://)[^/\s@]+(?=@)"
)
_NUMBER = r" *[-+]?[\d_.]+(?:e[-+]?\d+)? *"
_SECRET_ARGUMENT = re.compile(
    rf"(?P<key>(?<!num_){_NAME}=)(?!{_NUMBER}$).+|"
    rf"(?P<entry>(?<!num_){_NAME}['\"]?: *)(?!{_NUMBER}[,}}\]])(\"[^\"]*\"|'[^']*'|[^ ,}}\]]+)",
    re.IGNORECASE,
)
"""`trainer.hub_token=x` and `trainer={hub_token: x}`, but not `num_tokens=80_000`."""
SHORTEST_SECRET = 8
"""Characters of the shortest value of the environment that is hidden; a shorter one is part of innocent words."""


def redacted(value: Any) -> Any:
    """Settings without anything that looks like a secret, by key, by form, or because the environment holds it."""
    secrets = [secret for name, secret in os.environ.items() if _SECRET_KEY.search(name)]  # as HF_TOKEN
    return _redacted(value, [secret for secret in secrets if len(secret) >= SHORTEST_SECRET])


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets."""
    return [
        _SECRET_ARGUMENT.sub(lambda match: (match["key"] or match["entry"]) + HIDDEN, argument)
        for argument in redacted(arguments)
    ]


def _redacted(value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(item, str) and item and _SECRET_KEY.search(str(key)) else _redacted(item, known)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(item, known) for item in value]
    if not isinstance(value, str):
        return value
    for secret in known:
        value = value.replace(secret, HIDDEN)
    return _SECRET_VALUE.sub(HIDDEN, value)
