"""What users of other tools type for a key of a recipe, and what it is here."""

from __future__ import annotations

from pathlib import Path

from shoal.yaml_text import own_yaml

_ROWS: dict[str, list[str]] = own_yaml(__file__)
FIELD_WORDS: dict[str, str] = {word: key for key, words in _ROWS.items() for word in words}
"""Word of another tool, in small letters with `_` -> key here."""
TRAINING_ARGUMENTS = frozenset(Path(__file__).with_name("training_arguments.txt").read_text(encoding="utf-8").split())
"""Fields of transformers.TrainingArguments, which takes seconds to load."""


def field_word(word: str) -> str | None:
    """The key that ``word`` of another tool is here; None = nobody is known to call anything so."""
    word = word.lower().replace("-", "_")
    own = f"distill.trainer.{word}" if word in TRAINING_ARGUMENTS else None
    return FIELD_WORDS.get(word, own)
