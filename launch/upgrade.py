"""`python -m shoal.launch.upgrade OLD.yaml > NEW.yaml`: a recipe of before 0.1 in the words of now.

What is more than another word is told on stderr, a line each, and left out; so are comments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shoal.errors import EXIT_USER_ERROR, UserError
from shoal.recipe.gone import gone, moved
from shoal.recipe.recipe import apply_override, parse_recipe, read_settings
from shoal.redaction import printable


def upgraded(old: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The recipe ``old`` in the words of now, and `place: what to write` of all that could not be said."""
    new, told = dict[str, Any](), list[str]()
    for place, value in settings(old):
        if (now := moved(place, value)) is not None:
            apply_override(new, f"{now[0]}={yaml.safe_dump(now[1], default_flow_style=True)}")
        elif words := gone(place) or gone(f"{place}.{value}"):
            told.append(f"{place}: {words}")
        else:
            apply_override(new, f"{place}={yaml.safe_dump(value, default_flow_style=True)}")
    try:
        parse_recipe(new, source="the rest")
    except UserError as error:
        told += str(error).split("\n")
    return new, told


def settings(said: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe that is no section, and every section that is gone or empty, with its place."""
    for key, value in said.items():
        place = before + key
        if isinstance(value, dict) and value and moved(place, value) is None and gone(place) is None:
            yield from settings(value, f"{place}.")
        else:
            yield place, value


def main(words: list[str]) -> int:
    """Write the new recipe to stdout; the exit code is 2 where there is none, 1 where something was left out."""
    try:
        if len(words) != 1 or not Path(words[0]).is_file():
            raise UserError(f"name one recipe file of an older version (got {' '.join(words) or 'none'})")
        new, told = upgraded(read_settings(words[0])[0])
    except UserError as error:
        sys.stderr.write(printable(f"shoal: error: {error}\n"))
        return EXIT_USER_ERROR
    sys.stdout.write(yaml.safe_dump(new, sort_keys=False, allow_unicode=True))
    sys.stderr.writelines(printable(f"{line}\n") for line in told)
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
