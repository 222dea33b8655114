"""Whether all roles cut text into the same tokens: scores of models that read different prompts are not comparable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.models.checkpoint_files import tokenizer_fingerprint
from shoal.models.load import load_tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token")
"""Padding is masked, so its token may differ."""
PROBE = "The naïve café cost 1,234.50 € in 2024; def f(x):\n\treturn  x**2  # 東京 🙂 \u200bend\n\n  A. B) C"
"""Something of everything that rules of splitting and normalising treat apart."""


def require_same_tokenizer(folders: Mapping[str, Path], *, trust_remote_code: bool = False) -> None:
    """Refuse roles whose tokenizers differ in anything that shapes tokens; files may say the same in other words.

    Raises:
        UserError: naming the folder, what differs, and both values.
    """
    (first, reference), *others = folders.items()
    for role, folder in others:
        if difference := tokenizer_difference(folder, reference, trust_remote_code=trust_remote_code):
            field, own, of_reference = difference
            raise UserError(
                f"{folder}: {field} is {own!r} in the tokenizer of {role}, but {of_reference!r} in that of {first} "
                f"({reference}); scores of the two would be of different prompts. Copy the tokenizer files of {first} "
                "there, or make it again with `shoal run`"
            )


def tokenizer_difference(
    folder: Path, reference: Path, *, trust_remote_code: bool = False
) -> tuple[str, Any, Any] | None:
    """(field, value, value of ``reference``) of the most telling difference; None where text becomes equal tokens."""
    if tokenizer_fingerprint(folder) == tokenizer_fingerprint(reference):
        return None
    loaded = [load_tokenizer(path, trust_remote_code=trust_remote_code) for path in (folder, reference)]
    return next(_differences(*loaded), None)


def _differences(tokenizer: Any, reference: Any) -> Iterator[tuple[str, Any, Any]]:
    """(field, value, value of the reference), most telling first."""
    vocabulary, reference_vocabulary = tokenizer.get_vocab(), reference.get_vocab()
    if len(vocabulary) != len(reference_vocabulary):
        yield "number of tokens", len(vocabulary), len(reference_vocabulary)
    for token in sorted(
        vocabulary.keys() | reference_vocabulary.keys(),
        key=lambda token: reference_vocabulary.get(token, len(reference_vocabulary)),
    ):
        if vocabulary.get(token) != reference_vocabulary.get(token):
            yield f"id of token {token!r}", vocabulary.get(token), reference_vocabulary.get(token)
    for name in SPECIAL:
        if getattr(tokenizer, name) != getattr(reference, name):
            yield name, getattr(tokenizer, name), getattr(reference, name)
    own, other = (either.encode(PROBE) for either in (tokenizer, reference))
    if own != other:
        position = next(
            (i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), min(len(own), len(other))
        )
        yield (
            f"token {position} of a probing text",
            *(
                either.convert_ids_to_tokens(ids[position : position + 1])
                for either, ids in ((tokenizer, own), (reference, other))
            ),
        )
