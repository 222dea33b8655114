"""Settings and text without secrets: what is printed, passed on, or leaves the machine, goes through here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

HIDDEN = "(hidden)"
_NAME = (
    r"(?:token|secret|password|passwd|credential|authorization|[_-](?:pass|pwd|key)|(?:api|secret|access|private)key)s?"
)
_SECRET_KEY = re.compile(rf"^(?!.*_tokens$).*{_NAME}$", re.IGNORECASE)  # num_tokens is a count
_LONG = re.compile(r"(?=[a-z_]*[A-Z0-9-])[\w-]{16,}|://")
"""What every form of a secret holds: text without it does not load detect-secrets, which takes .2 s."""
_UNLISTED = re.compile(
    r"\b(?:hf_|api_org_|wandb_v1_|github_pat_|AIza|sk-)[\w-]{16,}|(?<=://)[^/\s@]+(?=@)|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
"""Forms that detect-secrets (1.5) does not know, or knows a part of."""
_NUMBER = r" *[-+]?[\d_.]+(?:e[-+]?\d+)? *"
_SECRET_ARGUMENT = re.compile(
    rf"(?P<key>(?<!num_){_NAME}=)(?!{_NUMBER}$).+|"
    rf"(?P<entry>(?<!num_){_NAME}['\"]?: *)(?!{_NUMBER}[,}}\]])(\"[^\"]*\"|'[^']*'|[^ ,}}\]]+)",
    re.IGNORECASE,
)
"""`trainer.hub_token=x` and `trainer={hub_token: x}`, but not `num_tokens=80_000`."""
SHORTEST_SECRET = 8
"""Characters of the shortest value of the environment that is hidden; a shorter one is part of innocent words."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that move the cursor, colour what follows or turn its direction; line ends and tabs do not."""


def printable(text: str) -> str:
    """``text`` that does nothing to a terminal: control characters by their numbers, ESC as `\\x1b`."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def shortened(text: str, longest: int = 1000) -> str:
    """``text`` without the middle of lines that nobody reads: of a word of the command, or of a setting."""
    half = longest // 2
    return "\n".join(line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}" for line in text.split("\n"))


def redacted(value: Any) -> Any:
    """Settings without anything that looks like a secret, by key, by form, or because the environment holds it."""
    secrets = [secret for name, secret in os.environ.items() if _SECRET_KEY.search(name)]  # as HF_TOKEN
    return _redacted(value, [secret for secret in secrets if len(secret) >= SHORTEST_SECRET])


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets."""
    words = redacted(arguments)
    return [_SECRET_ARGUMENT.sub(lambda match: (match["key"] or match["entry"]) + HIDDEN, word) for word in words]


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
    value = _UNLISTED.sub(HIDDEN, value)
    if _LONG.search(value):
        for found in {secret for detector in _detectors() for secret in detector.analyze_string(value)}:
            # the pattern of a JSON Web Token ends before its signature
            value = re.sub(re.escape(found.strip()) + r"[\w.+/=-]*", HIDDEN, value)
    return value


@cache
def _detectors() -> tuple[Any, ...]:
    """What finds secrets by their form. Not by their entropy, which hashes have too, and an address is no secret."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector
    from detect_secrets.plugins.ip_public import IPPublicDetector

    kinds = get_mapping_from_secret_type_to_class().values()
    return tuple(kind() for kind in kinds if issubclass(kind, RegexBasedDetector) and kind is not IPPublicDetector)
