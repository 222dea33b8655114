"""What a recipe's keys mean: docstrings, types and defaults of the dataclasses in shoal.recipe, from their source."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from shoal.errors import UserError
from shoal.formatting import listed
from shoal.recipe.messages import sections_in
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import Section, Shapes, shaped

CLOSE = 5
"""Settings that are named, at most, of those that a wrong key may mean."""
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
"""Type -> what a YAML file gives for it."""
LIMITS = {"gt": "> {:g}", "ge": ">= {:g}", "lt": "< {:.12g}", "le": "<= {:g}", "min_length": "(at least {:d})"}
"""Limit of a type, as its attribute is called -> words for it."""


@dataclass(frozen=True)
class Setting:
    """One key of a section."""

    place: str
    """Key with all sections it is in; of a section that is one of several kinds, the kind stands for its position."""
    section: type[Section]
    key: str

    @property
    def meaning(self) -> str:
        """Its docstring, as one paragraph."""
        own = [base for base in self.section.__mro__ if dataclasses.is_dataclass(base)]
        said = (_meanings(base).get(self.key) for base in own)
        # a section says what it is itself, and so does its kind
        of = [self.section] if self.key == "kind" else self.sections[:1]
        return next(filter(None, [*said, *(as_paragraph(inspect.getdoc(section) or "") for section in of)]), "")

    @property
    def hint(self) -> Any:
        """Its type."""
        return get_type_hints(self.section, include_extras=True)[self.key]

    @property
    def sections(self) -> list[type[Section]]:
        """Classes of the sections that it holds; none where it is a plain value."""
        return sections_in(self.hint)

    @property
    def values(self) -> str:
        """What may be given, in words."""
        return values_text(self.hint)

    @property
    def is_required(self) -> bool:
        """Whether a recipe without it is refused."""
        return _default(self.section, self.key) is dataclasses.MISSING

    @property
    def default(self) -> Any:
        """JSON-ready value of a recipe that does not name it, without what is default within; None where it must be
        given."""
        return None if self.is_required else _plain(_default(self.section, self.key))

    @property
    def shapes(self) -> list[str]:
        """What is made again with another value, in words; nothing for a key that shapes no number."""
        results = shaped(self.section)[self.key]
        return [_words_of_shapes()[str(each.name)] for each in results] if results else []


def as_paragraph(text: str) -> str:
    """A docstring in one line, in the words of YAML."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split())).replace("``", "`")


def first_sentence(text: str) -> str:
    """A paragraph up to the end of its first sentence, without the stop."""
    return re.split(r"(?<=[^.])\.(?: (?=[A-Z`])|$)", text, maxsplit=1)[0]


def as_yaml(value: Any) -> str:
    """A plain value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def kind_of(section: type[Section]) -> str | None:
    """The `kind:` that says a section is of this class; None where there is one class alone."""
    hint = get_type_hints(section).get("kind")
    return None if hint is None else get_args(hint)[0]


def settings_of(section: type[Section], place: str = "") -> list[Setting]:
    """Every key of a class of sections, after ``place``."""
    before = f"{place}." if place else ""
    return [Setting(before + name, section, name) for name in _fields(section)]


def all_settings(section: type[Section] = Recipe, place: str = "") -> Iterator[Setting]:
    """Every key of a recipe, those of a section after the one that holds it."""
    for setting in settings_of(section, place):
        yield setting
        for inner in setting.sections:
            kind = kind_of(inner) if len(setting.sections) > 1 else None
            yield from all_settings(inner, ".".join(filter(None, [setting.place, kind])))


def find(place: str) -> tuple[list[Setting], list[type[Section]], str]:
    """The settings that ``place`` may mean, the sections that they hold, and what stands after them: an entry of a
    plain mapping. Positions in lists may be left out, and a kind stands for the sections of that kind, of which there
    is no setting.

    Raises:
        UserError: there is no such key.
    """
    settings: list[Setting] = []
    sections: list[type[Section]] = [Recipe]
    parts, path = place.split("."), ""
    for index, part in enumerate(parts):
        own = [section for section in sections if part in _fields(section)]
        of_kind = [section for section in sections if kind_of(section) == part]
        if of_kind and len(sections) > 1:
            settings, sections = [], of_kind
        elif own:
            several = len(sections) > 1
            settings = [Setting(_joined(path, kind_of(each) if several else None, part), each, part) for each in own]
            sections = list(dict.fromkeys(inner for setting in settings for inner in setting.sections))
        elif part.isdecimal() and settings and any(tuple in _origins(setting.hint) for setting in settings):
            continue
        elif settings and any(dict in _origins(setting.hint) for setting in settings) and not sections:
            return settings, [], ".".join(parts[index:])
        else:
            raise _unknown(place)
        path = _joined(path, part)
    return settings, sections, ""


def _joined(*parts: str | None) -> str:
    return ".".join(filter(None, parts))


def _unknown(place: str) -> UserError:
    known = list(dict.fromkeys(setting.place for setting in all_settings()))
    by_leaf = {other: other.rpartition(".")[2] for other in known}
    leaf = place.rpartition(".")[2]
    same = [other for other in known if by_leaf[other] == leaf]
    close = sorted(same, key=lambda other: difflib.SequenceMatcher(None, place, other).ratio(), reverse=True)[:CLOSE]
    close = close or difflib.get_close_matches(place, known, n=CLOSE, cutoff=0.7)
    if not close:
        leaves = difflib.get_close_matches(leaf, set(by_leaf.values()), n=1, cutoff=0.7)
        close = [other for other in known if by_leaf[other] in leaves][:CLOSE]
    hint = f"did you mean {listed(close, 'or')}?" if close else "`shoal explain` lists the sections"
    return UserError(f"explain: a recipe has no key {place!r}; {hint}")


# --- types in words -----------------------------------------------------------------------------------------------


def values_text(hint: Any) -> str:
    """What a key of this type may be given: `whole number > 0 or null`, `[text, ...]`."""
    marks: list[Any] = []
    while get_origin(hint) is Annotated:
        marks += [
            inner for mark in get_args(hint)[1:] for inner in (mark.metadata if isinstance(mark, FieldInfo) else [mark])
        ]
        hint = get_args(hint)[0]
    limits = [
        words.format(getattr(mark, name)) for mark in marks for name, words in LIMITS.items() if hasattr(mark, name)
    ]
    limit = " and ".join(limits).replace("(at least 1)", "(not empty)")
    notes = [
        as_paragraph(mark.func.__doc__) for mark in marks if isinstance(mark, BeforeValidator) and mark.func.__doc__
    ]
    return " ".join(filter(None, [listed(_alternatives(hint), "or"), limit, *(f"({note})" for note in notes)]))


def _alternatives(hint: Any) -> list[str]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [as_yaml(value) for value in inner]
    if origin in (Union, UnionType):
        if any(map(is_section, inner)) and len(inner) > 2:
            return [f"a mapping whose kind is {listed([str(kind_of(each)) for each in inner], 'or')}"]
        told = [_alternatives(each) if get_origin(each) is Literal else [values_text(each)] for each in inner]
        return list(itertools.chain(*told))
    if origin is tuple:
        return [f"[{values_text(inner[0])}, ...]"]
    if origin is dict:
        return [f"{{name: {values_text(inner[1])}}}"]
    return [WORDS.get(hint, "a mapping of its settings")]


def _origins(hint: Any) -> set[Any]:
    """What a key of this type may be, without what is in it: tuple for a list, dict for a mapping of any names."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _origins(inner[0])
    return set().union(*map(_origins, inner)) if origin in (Union, UnionType) else {origin}


def is_section(hint: Any) -> bool:
    """Whether a type is a class of sections."""
    return isinstance(hint, type) and issubclass(hint, Section)


# --- docstrings ---------------------------------------------------------------------------------------------------


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))


def _documented(body: list[ast.stmt]) -> dict[str, str]:
    """Name -> the docstring that stands after its assignment."""
    docs: dict[str, str] = {}
    for node, after in itertools.pairwise(body):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            docs |= {target.id: as_paragraph(after.value.value) for target in targets if isinstance(target, ast.Name)}
    return docs


@cache
def _meanings(section: type) -> dict[str, str]:
    """The docstrings of the keys that a class defines itself; of one without, that of the type it is written with."""
    tree = _tree(section.__module__)
    (node,) = (each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == section.__name__)
    said = _documented(node.body)
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.target.id not in said:
            names = (name.id for name in ast.walk(each.annotation) if isinstance(name, ast.Name))
            if of_types := [words for name in names if (words := _type_words(section.__module__, name))]:
                said[each.target.id] = of_types[0]
    return said


def _type_words(module: str, name: str) -> str:
    """The docstring of a type's name in the module that makes it; empty where it has none."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names}:
            module = node.module or ""
    return _documented(_tree(module).body).get(name, "") if module.startswith("shoal.") else ""


@cache
def _words_of_shapes() -> dict[str, str]:
    """Member of Shapes -> what it stands for."""
    tree = _tree(Shapes.__module__)
    (node,) = (each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == Shapes.__name__)
    return {name: first_sentence(words).partition(":")[0] for name, words in _documented(node.body).items()}


# --- defaults -----------------------------------------------------------------------------------------------------


def _fields(section: Any) -> dict[str, dataclasses.Field[Any]]:
    """Key -> field, of a section or a class of sections."""
    return {field.name: field for field in dataclasses.fields(section)}


def _default(section: type[Section], key: str) -> Any:
    field = _fields(section)[key]
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    """``value`` as JSON has it, of sections only what is not default within."""
    if isinstance(value, Section):
        own = {key: getattr(value, key) for key in _fields(value)}
        return {key: _plain(each) for key, each in own.items() if key == "kind" or each != _default(type(value), key)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
