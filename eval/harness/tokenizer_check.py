"""Whether all roles cut text into the same tokens: scores of models that read different prompts are not comparable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.models.checkpoint_files import tokenizer_fingerprint
from shoal.models.load import load_tokenizer

PROBE = "The naïve café cost 1,234.50 € in 2024; def f(x):\n\treturn  x**2  # 東京 🙂 \u200bend\n\n  A. B) C"
"""Something of everything that rules of splitting and normalising treat apart."""


def require_same_tokenizer(folders: Mapping[str, Path], *, trust_remote_code: bool = False) -> None:
    """Refuse roles whose tokenizers differ in anything that shapes tokens; files may say the same in other words.

    Raises:
        UserError: naming the folder and what differs.
    """
    (first, reference), *others = folders.items()
    for role, folder in others:
        if difference := tokenizer_difference(folder, reference, trust_remote_code=trust_remote_code):
            raise UserError(
                f"{folder}: the tokenizer of {role} has {difference} than that of {first} ({reference}); scores of the "
                f"two would be of different prompts. Copy the tokenizer files of {first} there, or make it again with "
                "`shoal run`"
            )


def tokenizer_difference(folder: Path, reference: Path, *, trust_remote_code: bool = False) -> str:
    """What is another in one tokenizer than in that of ``reference``; empty where text becomes equal tokens."""
    if tokenizer_fingerprint(folder) == tokenizer_fingerprint(reference):
        return ""
    own, other = (_tokens(load_tokenizer(path, trust_remote_code=trust_remote_code)) for path in (folder, reference))
    return next((f"another {what}" for what, value in own.items() if value != other[what]), "")


def _tokens(tokenizer: Any) -> dict[str, Any]:
    special = ("bos_token", "eos_token", "unk_token")  # padding is masked, so its token may differ
    named = {name: getattr(tokenizer, name) for name in special}
    return {"vocabulary": tokenizer.get_vocab(), **named, "way of splitting text": tokenizer.encode(PROBE)}
