"""Which stored tensors a cut keeps, and under which names, decided by the names in the files alone.

Names in a file are often not those in the model: transformers merges experts, adds and removes prefixes and renames
while it loads. The files' own names are kept, because vLLM and llama.cpp read those.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.utils import logging as transformers_logging

from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers
from shoal.models.checkpoint_files import is_mtp
from shoal.models.hub_kernels import from_pretrained
from shoal.models.load import without_data

log = logging.getLogger(__name__)


class NotByCopy(UserError):
    """Why stored tensors cannot just be copied. The cut may still be possible in memory."""


@dataclass(frozen=True)
class Loading:
    """Tensors that did not find each other when a checkpoint was loaded, by their names in the model."""

    missing: frozenset[str]
    """Tensors that only the model has."""
    unexpected: frozenset[str]
    """Tensors that only the files have."""
    mismatched: frozenset[str]
    """Tensors that both have, in other shapes."""

    def renumbered(self, prefixes: Collection[str], keep: Sequence[int]) -> Loading:
        """The same tensors under the student's names: what loading it must report where the teacher's did this."""
        new_index = {old: new for new, old in enumerate(keep)}

        def renamed(names: Iterable[str]) -> Iterator[str]:
            for name in names:
                prefix = next((prefix for prefix in prefixes if split_layer(name, prefix)[0] is not None), "")
                layer, rest = split_layer(name, prefix)
                if layer in new_index:
                    yield f"{prefix}{new_index[layer]}.{rest}"
                elif layer is None and not is_mtp(name):
                    yield name

        return Loading(*(frozenset(renamed(names)) for names in (self.missing, self.unexpected, self.mismatched)))

    def difference(self, other: Loading) -> str:
        """The first tensor about which the two say different things, and what; empty where they agree."""
        for verdict, own_names, other_names in (
            ("missing", self.missing, other.missing),
            ("without a place", self.unexpected, other.unexpected),
            ("of the wrong shape", self.mismatched, other.mismatched),
        ):
            if differing := sorted(own_names ^ other_names):
                return f"{differing[0]} would {'' if differing[0] in own_names else 'not '}be {verdict}"
        return ""


def find_layers(shapes: Mapping[str, tuple[int, ...]], teacher: PreTrainedModel, config: PreTrainedConfig) -> str:
    """The prefix of the decoder layers' stored names, up to the layer's number: `model.layers.`.

    ``shapes`` are the stored tensors (name -> shape), ``teacher`` is the model of ``config`` without its weights. Files
    may have other numbered modules, in a vision tower for instance, and other words than the model. So the first and
    the last of each kind are loaded: the right ones end up in the model's first and last decoder layer, nowhere else.

    Raises:
        NotByCopy: no names, or two kinds of names, fit.
    """
    path, num_layers = anatomy(teacher).layers_name, len(decoder_layers(teacher))
    complete = {prefix for prefix, numbers in _numbered(shapes).items() if set(range(num_layers)) <= numbers}
    outermost = {prefix for prefix in complete if not any(prefix.startswith(o) for o in complete - {prefix})}
    if outermost == {f"{path}."}:  # the model's own name, and nothing else that could be meant
        return f"{path}."
    everything = set(teacher.state_dict())

    def lands(prefix: str, layer: int) -> bool:
        own = {name: shape for name, shape in shapes.items() if name.startswith(f"{prefix}{layer}.")}
        loading = load_without_data(config, own)[1]
        landed = everything - loading.missing
        return bool(landed) and all(name.startswith(f"{path}.{layer}.") for name in landed)

    fitting = [prefix for prefix in sorted(outermost) if lands(prefix, 0) and lands(prefix, num_layers - 1)]
    if len(fitting) != 1:
        kinds = " and ".join(f"{prefix}0" for prefix in fitting) or "none"
        raise NotByCopy(f"of the stored names, {kinds} could be those of {path}.0 to {path}.{num_layers - 1}")
    return fitting[0]


def other_towers(names: Iterable[str], prefixes: Collection[str]) -> set[str]:
    """Prefixes of other numbered modules in ``names`` that end with the same word as one of ``prefixes``."""
    words = {_last_word(prefix) for prefix in prefixes}
    return {prefix for prefix in _numbered(names) if _last_word(prefix) in words} - set(prefixes)


def modules_inside(names: Iterable[str], prefix: str) -> set[str]:
    """Modules that own tensors in the layers under ``prefix``: `self_attn.q_proj`."""
    rests = (split_layer(name, prefix)[1] for name in names)
    return {module for rest in rests if (module := rest.rpartition(".")[0])}


def student_names(names: Iterable[str], *, prefix: str, num_layers: int, keep: Sequence[int]) -> dict[str, str]:
    """Stored name -> its name in the student, for every tensor that stays.

    Layers behind the last one, and tensors named mtp, predict further tokens of the uncut model from its states and
    are no part of its own answers; they are left out.
    """
    new_index = {old: new for new, old in enumerate(keep)}
    kept: dict[str, str] = {}
    extra: list[str] = []
    for name in names:
        layer, rest = split_layer(name, prefix)
        if is_mtp(name) or (layer is not None and layer >= num_layers):
            extra.append(name)
        elif layer is None:
            kept[name] = name
        elif layer in new_index:
            kept[name] = f"{prefix}{new_index[layer]}.{rest}"
    if extra:
        log.warning(
            "prune: drops %d tensors after the last layer (%s, ...): multi-token prediction, which depends on the "
            "teacher's states",
            len(extra),
            extra[0],
        )
    return kept


def load_without_data(
    config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[PreTrainedModel, Loading]:
    """The model of ``config`` on the meta device, and what transformers says when it loads ``shapes`` into it.

    ``shapes``: stored name -> shape. The loading is the real one, with all its renaming, merging and tying, but for the
    numbers: it needs neither the weights nor memory for them.

    Raises:
        NotByCopy: transformers cannot merge or split the tensors.
        UserError: what without_data refuses.
    """
    empty: Any = without_data(config)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    try:
        with quiet_transformers(), _all_on_meta():
            model, report = from_pretrained(
                type(empty),
                None,
                config=empty.config,
                state_dict=tensors,
                dtype=torch.bfloat16,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise NotByCopy(
            f"transformers cannot load tensors of these names ({str(error).strip().splitlines()[0]})"
        ) from error
    mismatched = frozenset(name for name, *_ in report["mismatched_keys"])
    return model, Loading(frozenset(report["missing_keys"]), frozenset(report["unexpected_keys"]), mismatched)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the table of tensors that do not fit, which are what is asked for where only a part is loaded."""
    logger = logging.getLogger("transformers")
    level, bar = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            transformers_logging.enable_progress_bar()


@contextmanager
def _all_on_meta() -> Iterator[None]:
    """Let transformers convert on the meta device, also what it wants on the CPU for its size (Qwen4-Exp)."""
    stored: Any = WeightConverter.__dict__["force_cpu"]
    setattr(WeightConverter, "force_cpu", property(lambda _: False, stored.__set__))  # noqa: B010
    try:
        yield
    finally:
        setattr(WeightConverter, "force_cpu", stored)  # noqa: B010


def split_layer(name: str, prefix: str) -> tuple[int | None, str]:
    """The number after ``prefix`` and what follows it; (None, "") where there is none."""
    number, _, rest = name.removeprefix(prefix).partition(".")
    return (int(number), rest) if prefix and name.startswith(prefix) and number.isdigit() else (None, "")


def _numbered(names: Iterable[str]) -> dict[str, set[int]]:
    """Prefix of a number in the names (with a dot at its end) -> the numbers that follow it."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        for match in re.finditer(r"(?<=\.)(\d+)\.|^(\d+)\.", name):
            numbers[name[: match.start()]].add(int(match[1] or match[2]))
    return numbers


def _last_word(prefix: str) -> str:
    return prefix[:-1].rpartition(".")[2]
