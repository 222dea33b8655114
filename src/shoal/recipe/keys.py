"""The keys of a recipe, by one walk over its types: what a place may hold, and what docstrings say of it."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from yaml import YAMLError

from shoal.recipe.recipe import Recipe
from shoal.recipe.section import Section, adapter, types_of
from shoal.yaml_text import read_yaml


def alternatives(hint: Any) -> Iterator[Any]:
    """The types of a choice between types, without what is said beside them."""
    if get_origin(hint) is Annotated:
        yield from alternatives(get_args(hint)[0])
    elif get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            yield from alternatives(each)
    else:
        yield hint


@cache
def type_at(place: str) -> Any:
    """The type of what stands at a place, such as `distill.losses.0.weight`: Any within a free mapping, None where a
    recipe has no such key."""
    hint: Any = Recipe
    for part in place.split("."):
        kinds = list(alternatives(hint))
        if any(get_origin(kind) is dict for kind in kinds):
            return Any
        if part.isdecimal():
            found = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
        else:
            hints = (types_of(kind) for kind in kinds if _is_section(kind))
            found = [known[part] for known in hints if part in known]
        if not found:
            return None
        hint = Union[tuple(found)]  # noqa: UP007
    return hint


@cache
def documented(section: Any) -> dict[str, str]:
    """Key of a class of sections -> its docstring, or that of the class above."""
    told: dict[str, str] = {}
    for kind in filter(_is_section, reversed(section.__mro__)):
        told |= _docstrings(kind.__module__).get(kind.__name__, {})
    return told


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Class of a module -> its fields -> what the string below each says."""
    told: dict[str, dict[str, str]] = {}
    for part in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(part, ast.ClassDef):
            told[part.name] = {
                field.target.id: inspect.cleandoc(below.value.value)
                for field, below in pairwise(part.body)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(below.value.value, str)
            }
    return told


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def place_of(name: str, sections: Sequence[str]) -> str | None:
    """The key that ``name`` is, whole or without the first of ``sections`` that has it; None = there is none."""
    places = (name, *(f"{section}.{name}" for section in sections))
    return next((place for place in places if type_at(place) is not None), None)


def short_name(place: str, sections: Sequence[str]) -> str:
    """The shortest name that place_of takes for ``place``."""
    section, _, rest = place.partition(".")
    return rest if section in sections and place_of(rest, sections) == place else place


def flow_text(hint: Any, text: str) -> str:
    """The value ``text`` of a key as YAML takes it: `a,b` is a list where the key may be one."""
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    is_list = [get_origin(kind) is tuple for kind in kinds]
    if any(is_list) and (all(is_list) or "," in text) and text[:1] not in ("[", "{", '"', "'") and text != "null":
        return f"[{text}]"
    return text


def may_be(hint: Any, text: str) -> bool:
    """Whether a key of this type takes the value ``text``, other than as text."""
    if bool not in alternatives(hint):
        return False
    try:
        adapter(hint).validate_python(read_yaml(flow_text(hint, text)), strict=False)
    except (ValidationError, YAMLError):
        return False
    return True
