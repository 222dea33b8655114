"""YAML as people expect it: version 1.2 scalars, no key twice, no character that no path can hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

MOST_CHARACTERS = 100_000
"""A recipe has some thousand; more takes seconds to read."""
MOST_VALUES = 100_000
"""With every alias written out: nine levels of nine aliases each are half a billion."""


def read_yaml(text: str) -> Any:
    """What the YAML ``text`` says, as plain Python values.

    Raises:
        YAMLError: it is not YAML, a mapping holds a key twice, a text holds the character NUL, or it is too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise YAMLError(f"{len(text):,} characters are more than the limit of {MOST_CHARACTERS:,}; shorten it")
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:  # `!!int x`, ten thousand brackets, ...
        raise YAMLError(f"{error}; remove explicit !!tags and deep nesting") from error


def own_yaml(module: str | Path, name: str | None = None) -> Any:
    """What the YAML file ``name`` next to the file of a ``module`` of ours says; None = it has the module's name."""
    file = Path(module).with_suffix(".yaml") if name is None else Path(module).with_name(name)
    return yaml.load(file.read_text(encoding="utf-8"), Loader=_Quick)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (with `_` between digits), and no key twice.

    PyYAML alone speaks YAML 1.1: 2e-5 is a string to it, `off` and `no` are false, 010 is 8, 1:30 is 90, and 2024-01-31
    is a date.
    """

    def get_single_node(self) -> Any:
        """The whole text as nodes, of which aliases are shared; what goes through its values meets them every time."""
        node = super().get_single_node()
        if (count := _num_values(node, {})) > MOST_VALUES:
            raise YAMLError(f"aliases expand to {count:,} values; write the values themselves")
        return node


def _num_values(node: Any, known: dict[int, int]) -> int:
    """Values of ``node`` with every alias written out; those of ``known`` nodes, by id, are counted already."""
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = isinstance(node, yaml.MappingNode)
        known[id(node)] = 1  # of a node in itself, which is refused as it is read
        known[id(node)] += sum(_num_values(part[1] if pairs else part, known) for part in parts)
    return known[id(node)]


_SCALARS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?\d[\d_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\d[\d_]*\.?[eE][-+]?\d+|(\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Kind -> how all of it looks, and the characters it may start with."""
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _starts) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_starts))


def _whole_number(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


def _text(loader: Any, node: Any) -> str:
    text = loader.construct_scalar(node)
    if "\0" in text:
        raise yaml.constructor.ConstructorError(None, None, "a text holds the character NUL", node.start_mark)
    return text


def _mapping_without_duplicates(loader: Any, node: Any) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = key_node.value
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
        seen.add(key)
    return {str(key): value for key, value in yaml.SafeLoader.construct_mapping(loader, node, deep=True).items()}


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:str", _text)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


_Quick: Any = type("_Quick", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
"""By libyaml, ten times as fast. Only for files of ours: ten thousand brackets would end the process."""
_Quick.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Quick.yaml_constructors = _Loader.yaml_constructors
