"""`make size`: how large the project is, against limits that it may not pass; exit code 1 above one of them.

What is new has to pay for its room: where a limit is reached, something goes first.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from shoal.yaml_text import own_yaml

ROOT = Path(__file__).parents[1]
LIMITS: dict[str, int] = own_yaml(__file__)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def tracked(pattern: str) -> list[Path]:
    """The files of the repository that ``pattern`` names, each once: no link into the rooms."""
    listed = subprocess.run(["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {(ROOT / name).resolve() for name in filter(None, listed.stdout.split("\0")) if (ROOT / name).is_file()}
    return sorted(file for file in files if file.is_relative_to(ROOT.resolve()))


def functions(trees: Mapping[Path, ast.AST]) -> list[tuple[int, int, str]]:
    """Lines, parameters by name (without self and cls, *args and **kwargs) and place of every function, inner ones and
    methods too."""
    found = []
    for file, tree in trees.items():
        for own in (node for node in ast.walk(tree) if isinstance(node, FUNCTION)):
            given = own.args.posonlyargs + own.args.args
            named = len(given) + len(own.args.kwonlyargs) - bool(given and given[0].arg in ("self", "cls"))
            found.append(((own.end_lineno or 0) - own.lineno + 1, named, f"{file}:{own.lineno} {own.name}"))
    return found


def num_late_imports(tree: ast.AST) -> int:
    """Imports inside functions."""
    inside = [node for own in ast.walk(tree) if isinstance(own, FUNCTION) for node in ast.walk(own)]
    return len({id(node) for node in inside if isinstance(node, ast.Import | ast.ImportFrom)})


def declaring(section: Any) -> set[Any]:
    """The classes that declare the keys of ``section`` and of the sections in it, each once."""
    from shoal.recipe.messages import sections_in

    inner = [each for hint in get_type_hints(section, include_extras=True).values() for each in sections_in(hint)]
    return {own for own in section.__mro__ if is_dataclass(own)}.union(*map(declaring, inner))


def measured() -> tuple[dict[str, float], list[tuple[int, int, str]]]:
    """Every figure of LIMITS as it is now, and what functions gives."""
    from shoal.launch.help.explain import places
    from shoal.recipe.not_together import NOT_TOGETHER
    from shoal.recipe.recipe import Recipe
    from shoal.recipe.trainer_arguments import REFUSED_ARGUMENTS

    everything = tracked("*.py")
    files = [file for file in everything if file.relative_to(ROOT.resolve()).parts[0] != "tests"]
    texts = {file.relative_to(ROOT.resolve()): file.read_text(encoding="utf-8") for file in files}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    own = functions(trees)
    lengths = sorted(length for length, *_ in own)
    lines = {file: len(text.splitlines()) for file, text in texts.items()}
    rooms = [tree for file, tree in trees.items() if file.parts[0] not in ("launch", "lab", "benchmarks")]
    pages = [file for file in tracked("*.md") if not file.is_symlink()]
    tests = [file for file in everything if file not in files]
    figures = {
        "lines of Python outside tests": sum(lines.values()),
        "of them in lab/": sum(count for file, count in lines.items() if file.parts[0] == "lab"),
        "files of Python outside tests": len(files),
        "lines of tests": sum(len(file.read_text(encoding="utf-8").splitlines()) for file in tests),
        "recipe keys": sum(len(own.__annotations__) for own in declaring(Recipe)),
        "places that a recipe can set": sum("properties" not in own for _, own in places()),
        "rows of settings that do not go together": len(NOT_TOGETHER),
        "training arguments that are refused": len(REFUSED_ARGUMENTS),
        "raise UserError": sum(len(re.findall(r"\braise UserError\b", text)) for text in texts.values()),
        "late imports outside launch/ and lab/": sum(map(num_late_imports, rooms)),
        "lines of a function, median": statistics.median(lengths),
        "lines of a function, 90 of 100": lengths[int(0.9 * len(lengths))],
        "lines of a function, most": lengths[-1],
        "parameters of a function, most": max(many for _, many, _ in own),
        "words of Markdown": sum(len(file.read_text(encoding="utf-8").split()) for file in pages),
    }
    return figures, own


def main() -> None:
    """Print every figure beside its limit, and end with 1 where one is passed."""
    figures, own = measured()
    for name, limit in LIMITS.items():
        print(f"{figures[name]:>8,.0f} of {limit:>7,}  {name}{'  TOO LARGE' if figures[name] > limit else ''}")
    for name, column in (("longest functions", 0), ("most parameters", 1)):
        most = sorted(own, key=lambda row: row[column:], reverse=True)[:5]
        print(f"{name}: {', '.join(f'{row[2]} {row[column]}' for row in most)}")
    sys.exit(any(figures[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    main()
