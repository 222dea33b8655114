"""No message, log line, help text or docstring of a recipe's key uses a word in a sense that only shoal knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import shoal.lab.sweeps  # noqa: F401  # so that its keys are among those of a recipe
from shoal.launch.arguments import VERBS
from shoal.launch.help.explain import first_sentence, meaning, places
from shoal.recipe.gone import GONE
from shoal.yaml_text import read_yaml

ROOT = Path(__file__).parents[2]
PRIVATE = read_yaml((ROOT / "tests/support/private_words.yaml").read_text(encoding="utf-8"))
FILES = [file for room in ("src/shoal", "launch", "compress", "train", "eval") for file in (ROOT / room).rglob("*.py")]
TABLES = ("src/shoal/recipe/not_together.yaml", "src/shoal/models/families.yaml", "launch/options.yaml")
KEYS = {place: meaning(own) for place, own in places()}


def strings(node: ast.AST) -> Iterator[str]:
    """All but docstrings, with `0` for what is formatted into them."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        yield from (text for child in ast.iter_child_nodes(node) for text in strings(child))


def test_no_message_no_help_and_no_key_uses_a_private_word() -> None:
    code = [text for file in FILES if "abilities" not in file.parts for text in strings(ast.parse(file.read_bytes()))]
    helps = [text for row in VERBS.values() for text in (row.help, *row.examples)]
    rows = [row for file in TABLES for row in (ROOT / file).read_text().splitlines() if not row.startswith("#")]
    told = [*(text for text in code if " " in text), *KEYS.values(), *GONE.values(), *helps, *rows]
    assert not {(text, word): plain for text in told for word, plain in PRIVATE.items() if re.search(word, text, re.I)}


def test_a_key_begins_with_a_short_sentence() -> None:
    assert not [first for text in KEYS.values() if len((first := first_sentence(text)).split()) > 14]
    assert sum(len(text.split()) for text in KEYS.values()) < 3_000
