"""What becomes smaller in a model whose layers are narrowed: which dimensions of which tensors, in it and in its files.

Two models without weights tell it, one of the configuration as it is and one of the narrowed one: where a tensor of a
layer differs in size, rows or columns of it belong to channels of the MLP, or to key-value heads and the query heads
that read them. What that leaves open, the order of maps in one tensor, is named here, and proven where the parts are
chosen (width.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.artifacts.plan import KeptWidth
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers, text_config
from shoal.models.load import without_data

from ..edits.layer_edits import Half
from ..edits.sublayers import named_halves, output_parameters, where
from ..edits.tensors import refuse_shared_parameters
from ..surgery.narrow_config import NARROW, channels, heads, narrowed_config
from .calibration import refuse_quantised

GATE_UP, QKV = "gate_up_proj", "qkv_proj"
"""Modules that hold two or three maps in one tensor, one after the other."""
Units = Mapping[Half, Sequence[int]]
"""Channels and groups of one layer, increasing."""
SETTINGS: dict[Half, str] = {"mlp": "intermediate_size", "attention": "num_key_value_heads"}
"""Half of a layer -> the key of the recipe that narrows it."""
UNITS: dict[Half, str] = {"mlp": "channels", "attention": "key-value groups"}
"""Half of a layer -> what it consists of."""


@dataclass(frozen=True)
class Part:
    """A dimension of a tensor that becomes shorter."""

    dim: int
    half: Half
    """mlp: its units are channels; attention: key-value groups."""
    sizes: tuple[int, ...]
    """Rows of a unit in each of the maps that the dimension holds one after the other."""

    def index(self, units: Sequence[int], num_units: int) -> Tensor:
        """The rows of ``units``, of ``num_units``, in all maps."""
        rows, start = [], 0
        for size in self.sizes:
            first = start + size * torch.tensor(units)
            rows.append((first[:, None] + torch.arange(size)).flatten())
            start += size * num_units
        return torch.cat(rows)


@dataclass(frozen=True)
class Sizes:
    """What becomes smaller in one model."""

    config: PreTrainedConfig
    """Of all layers, narrowed."""
    model: PreTrainedModel
    """The model of that configuration, without weights."""
    counts: Mapping[Half, tuple[int, int]]
    """Channels or groups of a layer, before and after, of the halves that are narrowed."""
    maps: Mapping[int, Mapping[Half, str]]
    """Layer -> half -> the linear map that reads all units of the half, side by side, and writes to the stream."""
    parts: Mapping[int, Mapping[str, Part]]
    """Layer -> name of a parameter in it -> what of it becomes shorter."""

    def narrowed(self, tensor: Tensor, part: Part, units: Units) -> Tensor:
        """``tensor`` with the rows of ``units`` alone, in memory of its own."""
        index = part.index(units[part.half], self.counts[part.half][0])
        return tensor.index_select(part.dim, index.to(tensor.device)).contiguous()

    @contextmanager
    def masked(self, model: PreTrainedModel, units: Mapping[int, Units]) -> Iterator[PreTrainedModel]:
        """``model`` with zeros in the places of all units but these of the named layers, until the block ends."""

        def mask(stays: Tensor, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            by_unit = args[0].unflatten(-1, (len(stays), -1))
            return (torch.where(stays.to(by_unit.device)[:, None], by_unit, 0).flatten(-2), *args[1:])

        with ExitStack() as stack:
            for layer, own in units.items():
                for half, name in self.maps[layer].items():
                    stays = torch.zeros(self.counts[half][0], dtype=torch.bool)
                    stays[list(own[half])] = True
                    reader = decoder_layers(model)[layer].get_submodule(name)
                    stack.enter_context(reader.register_forward_pre_hook(partial(mask, stays)))
            yield model


def sizes_of(folder: Path, config: PreTrainedConfig, width: KeptWidth) -> Sizes:
    """What ``width`` makes smaller in the model of ``config``; messages name ``folder``, and nothing is read there.

    Raises:
        UserError: quantised weights, experts, a norm over the units, maps in one tensor whose order shoal does not
            know, a family whose layers do not become narrower by their configuration.
    """
    refuse_quantised(folder, config, section=NARROW)
    text, counts = text_config(config), dict[Half, tuple[int, int]]()
    if width.intermediate_size is not None:
        counts["mlp"] = channels(text)[1], width.intermediate_size
    if width.num_key_value_heads is not None:
        counts["attention"] = heads(text)[1], width.num_key_value_heads
    narrow_config = narrowed_config(config, width)
    model, narrow = (without_data(own, dtype=torch.float32) for own in (config, narrow_config))
    maps, parts = dict[int, dict[Half, str]](), dict[int, dict[str, Part]]()
    for layer, modules in enumerate(zip(decoder_layers(model), decoder_layers(narrow), strict=True)):
        refuse_shared_parameters(model, layer)
        maps[layer] = {half: _map(model, layer, modules, half, *counts[half]) for half in counts}
        parts[layer] = dict(_parts(model, layer, modules, counts))
    inside, new = f"{anatomy(model).layers_name}.", dict(narrow.named_parameters())
    for name, old in model.named_parameters():
        if not name.startswith(inside) and new[name].shape != old.shape:
            raise UserError(
                f"{NARROW}: {name}, which is not in a layer, would change from {list(old.shape)} to "
                f"{list(new[name].shape)}; shoal cannot narrow the {text.model_type} family"
            )
    return Sizes(narrow_config, narrow, counts, maps, parts)


def _map(
    model: PreTrainedModel, layer: int, modules: Sequence[nn.Module], half: Half, num_units: int, kept: int
) -> str:
    """The name of the one linear map by which a half writes, checked to become narrower as the configuration says.

    ``modules``: the layer before and after.
    """
    setting, place = f"{NARROW}.{SETTINGS[half]}", where(model, layer)
    names = {name.rpartition(".")[0] for name in output_parameters(modules[0], half)}
    readers = [module.get_submodule(next(iter(names))) if len(names) == 1 else None for module in modules]
    sizes = [reader.nx if isinstance(reader, Conv1D) else getattr(reader, "in_features", 0) for reader in readers]
    if not all(isinstance(reader, nn.Linear | Conv1D) for reader in readers):
        what = "mixes experts, or has its MLP" if half == "mlp" else "has its attention"
        raise UserError(f"{setting}: {place} {what} write by other ways than one linear map; remove it")
    if sizes[0] % num_units or sizes[1] * num_units != sizes[0] * kept or (half == "mlp" and sizes[0] != num_units):
        raise UserError(
            f"{setting}: {place} would read {sizes[1]} numbers of {kept} {UNITS[half]}, not {sizes[0]} of "
            f"{num_units}: its configuration ties that size to others; remove it"
        )
    return names.pop()


def _parts(
    model: PreTrainedModel, layer: int, modules: Sequence[nn.Module], counts: Mapping[Half, tuple[int, int]]
) -> Iterator[tuple[str, Part]]:
    """The parameters of a layer that become smaller, and where; ``modules``: the layer before and after."""
    module, named, new = modules[0], named_halves(modules[0]), dict(modules[1].named_parameters())
    holders: dict[Half, tuple[str, ...]] = {"mlp": named.mlp_holders, "attention": named.attention}
    inside: dict[Half, tuple[str, ...]] = {half: tuple(f"{path}." for path in holders[half]) for half in counts}
    for name, old in module.named_parameters():
        if new[name].shape == old.shape:
            continue
        half: Half | None = next((half for half, paths in inside.items() if name.startswith(paths)), None)
        parts: list[Part] = []
        # a norm over the units would be another one over fewer
        if half is not None and isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D):
            parts = [
                Part(dim, half, sizes)
                for dim, (before, after) in enumerate(zip(old.shape, new[name].shape, strict=True))
                for sizes in _sizes(model, half, name)
                if before != after and (before, after) == tuple(count * sum(sizes) for count in counts[half])
            ]
        if len(parts) != 1:
            raise UserError(
                f"{NARROW}: {name} of {where(model, layer)} would change from {list(old.shape)} to "
                f"{list(new[name].shape)}, and shoal does not know which part belongs to which channel or head; "
                f"remove {NARROW}{('' if half is None else '.' + SETTINGS[half])}"
            )
        yield name, parts[0]


def _sizes(model: PreTrainedModel, half: Half, name: str) -> list[tuple[int, ...]]:
    """Rows of a unit in a tensor of this name, as they may be."""
    if half == "mlp":
        return [(1, 1)] if GATE_UP in name.split(".") else [(1,)]
    num_heads, groups, size = heads(text_config(model.config))
    readers = num_heads // groups * size
    return [(readers, size, size)] if QKV in name.split(".") else [*{(readers,), (size,)}]
