"""`make size`: how large the project is, in tokens; exit code 1 above a limit of size.yaml.

A token is what Python's tokenizer gives, without comments, line ends and indents: blank lines, comments and one
statement a line cost nothing, and a packed line costs as much as a plain one. Of YAML and templates that are code
(what is done, and what is said) every word and every mark is one; facts, texts and recipes are data and count nothing.
All other figures are for information.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from shoal.yaml_text import own_yaml

ROOT = Path(__file__).resolve().parents[1]
LIMITS: dict[str, int] = own_yaml(__file__)
FREE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
"""Kinds of tokens that are not counted."""
DATA = (
    *("configs/", "benchmarks/", "mkdocs.yml", "src/shoal/abilities/", "src/shoal/data/", "src/shoal/devices.yaml"),
    *("src/shoal/figures/", "src/shoal/model_names.yaml", "src/shoal/models/families.yaml"),
    *("tests/support/architectures.yaml", "tests/launch/verbs/recipes/", "tests/system/identity.yaml"),
)
"""Where YAML holds facts, texts or recipes."""
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def tracked(*patterns: str) -> list[Path]:
    """The files of the repository that ``patterns`` name, each once and relative to it: no link into the rooms."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {(ROOT / name).resolve() for name in filter(None, listed.stdout.split("\0")) if (ROOT / name).is_file()}
    return sorted(file.relative_to(ROOT) for file in files if file.is_relative_to(ROOT))


def text_of(file: Path) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def python_tokens(file: Path) -> int:
    with tokenize.open(ROOT / file) as lines:
        return sum(token.type not in FREE for token in tokenize.generate_tokens(lines.readline))


def table_tokens(file: Path) -> int:
    """Words and marks of YAML or of a template, without its comments."""
    plain = re.sub(r"(?m)^\s*#.*$|\{#.*?#\}", "", text_of(file))
    return len(re.findall(r"\w+|[^\w\s]", plain))


def is_of_tests(file: Path) -> bool:
    return file.parts[0] == "tests"


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


def packed(tree: ast.AST) -> int:
    """Assignments of several values in one statement, and walrus operators."""
    nodes = list(ast.walk(tree))
    tuples = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)]
    return sum(isinstance(node.targets[0], ast.Tuple) for node in tuples) + sum(
        isinstance(node, ast.NamedExpr) for node in nodes
    )


def public_names(trees: Mapping[Path, ast.Module]) -> list[str]:
    """Public classes and functions that two modules or more define."""
    modules: dict[str, int] = {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
                modules[node.name] = modules.get(node.name, 0) + 1
    return sorted(name for name, count in modules.items() if count > 1)


def declaring(section: Any) -> set[Any]:
    """The classes that declare the keys of ``section`` and of the sections in it, each once."""
    from shoal.recipe.messages import sections_in

    inner = [each for hint in get_type_hints(section, include_extras=True).values() for each in sections_in(hint)]
    return {own for own in section.__mro__ if is_dataclass(own)}.union(*map(declaring, inner))


def sizes(python: Iterable[Path], tables: Iterable[Path], name: str) -> dict[str, int]:
    """Tokens of a part of the project, and the two that they are the sum of."""
    of_python = sum(map(python_tokens, python))
    of_tables = sum(map(table_tokens, tables))
    return {
        f"tokens {name}": of_python + of_tables,
        f"  in Python {name}": of_python,
        f"  in YAML and templates {name}": of_tables,
    }


def figures() -> Iterator[tuple[str, float | str]]:
    """What is measured, by its name."""
    from shoal.recipe.recipe import Recipe

    python = tracked("*.py")
    tables = [file for file in tracked("*.yaml", "*.yml", "*.jinja") if not str(file).startswith(DATA)]
    product = [file for file in python if not is_of_tests(file)]
    yield from sizes(product, [file for file in tables if not is_of_tests(file)], "outside tests").items()
    yield from sizes(filter(is_of_tests, python), filter(is_of_tests, tables), "of tests").items()
    trees = {file: ast.parse(text_of(file)) for file in product}
    lines = [line for file in product for line in text_of(file).splitlines()]
    comments = sum(line.lstrip().startswith("#") for line in lines)
    statements = sum(isinstance(node, ast.stmt) for tree in trees.values() for node in ast.walk(tree))
    own = functions(trees)
    lengths = sorted(length for length, *_ in own)
    yield "tokens a line", sum(map(python_tokens, product)) / len(lines)
    yield "lines of comments, %", 100 * comments / len(lines)
    yield "packed assignments and walrus per 1,000 statements", 1000 * sum(map(packed, trees.values())) / statements
    yield "files of Python", len(product)
    yield "recipe keys", sum(len(section.__annotations__) for section in declaring(Recipe))
    yield "raise UserError", sum(text_of(file).count("raise UserError") for file in product)
    yield "public names of two modules or more", len(public_names(trees))
    yield "lines of a function, median", statistics.median(lengths)
    yield "lines of a function, 90 of 100", lengths[int(0.9 * len(lengths))]
    yield "words of Markdown", sum(len(text_of(file).split()) for file in tracked("*.md"))
    for name, column in (("longest functions", 0), ("most parameters", 1)):
        most = sorted(own, key=lambda row: row[column:], reverse=True)[:3]
        yield name, ", ".join(f"{row[2]} {row[column]}" for row in most)


def main() -> None:
    """Print every figure, and end with 1 where one is above its limit."""
    is_too_large = False
    for name, value in figures():
        if isinstance(value, str):
            print(f"{name}: {value}")
            continue
        limit = LIMITS.get(name)
        told = f"{value:>10,.1f}" if isinstance(value, float) else f"{value:>10,}"
        if limit is not None:
            told += f" of {limit:,}"
            is_too_large = is_too_large or value > limit
        print(f"{told}  {name}{'  TOO LARGE' if limit is not None and value > limit else ''}")
    sys.exit(is_too_large)


if __name__ == "__main__":
    main()
