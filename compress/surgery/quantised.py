"""Settings of a quantised checkpoint that name layers by number, made right for the student.

The weights themselves are copied as they are: every common format keeps what belongs to a layer under the layer's name.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from shoal.errors import UserError
from shoal.models.checkpoint_files import is_mtp

from .config_cut import cut_config

FIELDS = ("quantization_config", "compression_config")
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside config.json into which AutoGPTQ, AutoAWQ and ModelOpt put the same settings."""
REGEX_MARKS = set("\\^$+?()[]{}|")
REGEX_PREFIXES = ("re:", "+:", "-:")
"""Prefixes of regular expressions: of compressed-tensors, and of GPTQModel's `dynamic`."""


@dataclass(frozen=True)
class LayerNames:
    """Numbered modules that a list of module names can mean."""

    prefixes: tuple[str, ...]
    """Prefixes of the decoder layers, in the files and in the model: `model.layers.`."""
    others: frozenset[str]
    """Prefixes of numbered layers that end with the same word and are no decoder layers, in a vision tower perhaps."""
    modules: tuple[str, ...]
    """Modules inside a layer: `self_attn.q_proj`."""


def without_quantization(config: PreTrainedConfig) -> tuple[PreTrainedConfig, dict[tuple[str, str], dict[str, Any]]]:
    """A copy of ``config`` as if the weights were plain, and what was taken out: (part, field) -> settings.

    The part is the name of a sub-configuration, or empty.
    """
    plain = copy.deepcopy(config)
    removed: dict[tuple[str, str], dict[str, Any]] = {}
    for part in ("", *plain.sub_configs):
        owner = getattr(plain, part, None) if part else plain
        for field in FIELDS:
            value = getattr(owner, field, None)
            if value is not None:
                removed[part, field] = value if isinstance(value, dict) else value.to_dict()
                delattr(owner, field)
    return plain, removed


def cut_stored_config(config: PreTrainedConfig, keep: Sequence[int], names: LayerNames) -> PreTrainedConfig:
    """cut_config for weights that stay as they are stored, quantised ones too."""
    plain, settings = without_quantization(config)
    student = cut_config(plain, keep)
    for (part, field), value in settings.items():
        new = renumbered(value, keep, names, where=f"config.{part}{'.' if part else ''}{field}")
        setattr(getattr(student, part) if part else student, field, new)
    return student


def renumbered(value: Any, keep: Sequence[int], names: LayerNames, *, where: str) -> Any:
    """``value`` (JSON) with every layer under its new number and the names of dropped layers gone.

    Names are list entries or keys. A pattern stays where it says the same of every kept layer under its new number.

    Raises:
        UserError: a pattern that would mean other layers in the student, or a name of which it is not clear whether it
            is a decoder layer's.
    """
    if isinstance(value, dict):
        renamed = {key: _renamed(key, keep, names, where) for key in value}
        return {
            renamed[key]: renumbered(inner, keep, names, where=f"{where}.{key}")
            for key, inner in value.items()
            if renamed[key] is not None
        }
    if isinstance(value, list):
        entries = [renumbered(entry, keep, names, where=where) for entry in value]
        return [entry for entry, old in zip(entries, value, strict=True) if entry is not None or old is None]
    return _renamed(value, keep, names, where)


def _renamed(text: Any, keep: Sequence[int], names: LayerNames, where: str) -> Any:
    """The name or pattern ``text`` for the student; None where its layer is gone; what is no text as it is."""
    if not isinstance(text, str):
        return text
    if is_mtp(text):
        return None
    is_pattern = text.startswith(REGEX_PREFIXES) or not REGEX_MARKS.isdisjoint(text)
    for number in re.finditer(r"(?<=\.)\d+(?=\.|$)", text):
        before, old = text[: number.start()], int(number[0])
        decoder, other = (
            any(f".{known}".endswith(f".{before}") for known in some) for some in (names.prefixes, names.others)
        )
        if decoder and not other and not is_pattern:
            return f"{before}{keep.index(old)}{text[number.end() :]}" if old in keep else None
        is_pattern |= decoder  # a name that may be a decoder layer's or another's
    if is_pattern or "*" in text:
        _refuse_other_meaning(text, keep, names, where)
    return text


def _refuse_other_meaning(text: str, keep: Sequence[int], names: LayerNames, where: str) -> None:
    """Compare what a pattern matches in every kept layer with what it matches under the layer's new number."""
    for new, old in enumerate(keep):
        for prefix in names.prefixes:
            for module in ("", *names.modules):
                before, after = (f"{prefix}{layer}{'.' if module else ''}{module}" for layer in (old, new))
                if _matches(text, before) != _matches(text, after):
                    raise UserError(
                        f"{where}: {text!r} names layers by number and treats {before} differently from {after}, its "
                        "new place. Write the full names of the modules one by one, and prune again"
                    )


def _matches(text: str, name: str) -> tuple[bool, bool]:
    """Whether a pattern matches in either way in which the formats may use it: as a regular expression, or with shell
    wildcards."""
    pattern = text[len(REGEX_PREFIXES[0]) :] if text.startswith(REGEX_PREFIXES[0]) else text
    pattern = pattern[2:] if pattern.startswith(REGEX_PREFIXES[1:]) else pattern
    try:
        found = re.search(pattern, name) is not None
    except re.error:  # `*.mlp` is a wildcard and no regular expression
        found = False
    return found, fnmatch.fnmatchcase(name, pattern)
