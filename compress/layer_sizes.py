"""What every layer of a model takes: parameters, bytes in files, bytes read per written token, and cache.

Told from the configuration and the headers of the files; no weight is read. The sizes of a cut model follow by
subtraction, exactly: what layers share with each other or with the rest of the model stays until the last of it goes,
and is counted as staying.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers, text_config
from shoal.models.checkpoint_files import Shard, read_shards
from shoal.models.cost import Cost, active_parameters, decode_bytes, model_cost
from shoal.models.load import load_config, loaded_dtype, without_data
from shoal.recipe.prune import Target

from .free_layers import Goal, Goals, goal_of_memory, goal_of_parameters, goals_asked
from .surgery.cut_model import side_by_side_dim
from .surgery.quantised import without_quantization
from .surgery.stored_names import NotByCopy, find_layers, split_layer, student_names

NUM_TOKENS = 2048
"""Length at which caches and speeds are given, or the model's positions where those are fewer."""


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of the tensors that a cut copies."""

    outside: int
    """Of tensors that are in no layer and stay."""
    layers: tuple[int, ...]

    def of(self, keep: Collection[int]) -> int:
        """Of a student that keeps these layers."""
        return self.outside + sum(self.layers[layer] for layer in keep)


@dataclass(frozen=True)
class LayerSizes:
    """A model with all its layers, and what goes with each of them."""

    cost: Cost
    stored: StoredBytes
    layer_parameters: tuple[int, ...]
    """Parameters that no other part of the model shares."""
    layer_active: tuple[int, ...]
    """Parameters of each layer that are read to write one token."""
    bytes_per_parameter: float
    """Bytes of one weight as it is stored; of quantised ones on average."""
    length: int
    """Tokens at which caches are told where nobody says how many."""

    @property
    def num_layers(self) -> int:
        return len(self.layer_parameters)

    def layer_cache(self, layer: int, num_tokens: int) -> int:
        """Bytes of cache of one sequence that go with a layer. 0 where the model has not one slot for every layer:
        then some layers read what others wrote, and all of the cache is counted as staying."""
        cache = self.cost.cache
        return cache[layer].num_bytes(num_tokens) if cache and len(cache) == self.num_layers else 0

    def cache(self, batch_size: int, num_tokens: int) -> int:
        """Bytes of cache of all sequences with all layers; 0 where it cannot be told."""
        return batch_size * self.cost.cache_bytes(num_tokens) if self.cost.cache else 0

    def read(self, batch_size: int, num_tokens: int) -> int:
        """Bytes read for one token of each of ``batch_size`` sequences with all layers, as decode_bytes tells."""
        width = self.bytes_per_parameter
        return round(decode_bytes(self.cost, bytes_per_parameter=width, num_tokens=num_tokens, batch_size=batch_size))

    def layer_read(self, layer: int, batch_size: int, num_tokens: int) -> int:
        """What of it goes with a layer."""
        weights = round(self.layer_active[layer] * self.bytes_per_parameter)
        return weights + batch_size * self.layer_cache(layer, num_tokens)


def layer_sizes(folder: Path, *, trust_remote_code: bool = False) -> LayerSizes:
    """The sizes of the checkpoint in ``folder``, in the precision of its files, of what a cut may copy of it."""
    config = load_config(folder, trust_remote_code=trust_remote_code)
    shards = read_shards(folder)
    plain, quantisation = without_quantization(config)
    dtype = loaded_dtype(config, "stored", shards)
    model = without_data(plain, dtype=dtype)
    cost, parts = model_cost(model), anatomy(model)
    holders = _holders(model)
    # a layer's slices of tensors that hold one for every layer go with it; an embedding's are not read but for a row
    sliced = {name: tensor for name, tensor in model.named_parameters() if side_by_side_dim(name) is not None}
    slices = sum(tensor.numel() for tensor in sliced.values()) // len(parts.layers)
    read = sum(tensor.numel() for name, tensor in sliced.items() if "embed" not in name) // len(parts.layers)
    own = tuple(
        slices + sum(parameter.numel() for parameter in layer.parameters() if holders[id(parameter)] == 1)
        for layer in parts.layers
    )
    stored = stored_bytes(shards, model)
    if stored is None:  # then the student is saved as transformers names and merges its tensors
        layers = tuple(count * dtype.itemsize for count in own)
        stored = StoredBytes(cost.num_parameters * dtype.itemsize - sum(layers), layers)
    whole = stored.of(range(len(own)))
    return LayerSizes(
        cost=cost,
        stored=stored,
        layer_parameters=own,
        layer_active=tuple(read + active_parameters(layer) for layer in parts.layers),
        bytes_per_parameter=whole / cost.num_parameters if quantisation else dtype.itemsize,
        length=usual_length(config),
    )


def usual_length(config: object) -> int:
    """NUM_TOKENS, or the positions of the model where those are fewer."""
    return min(NUM_TOKENS, getattr(text_config(config), "max_position_embeddings", None) or NUM_TOKENS)


def stored_bytes(shards: Sequence[Shard], model: PreTrainedModel) -> StoredBytes | None:
    """Of the tensors that a cut of ``model`` copies, as layer_sizes says; None where names alone do not tell which
    those are."""
    stored = {name: tensor.end - tensor.start for shard in shards for name, tensor in shard.tensors.items()}
    shapes = {name: tensor.shape for shard in shards for name, tensor in shard.tensors.items()}
    try:
        prefix = find_layers(shapes, model, model.config)
    except NotByCopy:
        return None
    num_layers = text_config(model.config).num_hidden_layers
    copied = student_names(stored, prefix=prefix, num_layers=num_layers, keep=range(num_layers))
    holders = _holders(model)
    shared = [
        {name for name, parameter in layer.named_parameters(remove_duplicate=False) if holders[id(parameter)] > 1}
        for layer in decoder_layers(model)
    ]
    layers, outside = [0] * num_layers, 0
    for name in copied:
        layer, rest = split_layer(name, prefix)
        if side_by_side_dim(name) is not None:
            layers = [own + stored[name] // num_layers for own in layers]
        # a file has what layers share once, in one of them; a student without that one has it in the next
        elif layer is None or layer >= num_layers or rest in shared[layer]:
            outside += stored[name]
        else:
            layers[layer] += stored[name]
    return StoredBytes(outside, tuple(layers))


def _holders(model: PreTrainedModel) -> Counter[int]:
    """Of every parameter, by its id, how many layers have it, the rest of the model counting as one."""
    parts = anatomy(model)
    inside = f"{parts.layers_name}."
    every = model.named_parameters(remove_duplicate=False)
    holders = Counter({id(parameter): 1 for name, parameter in every if not name.startswith(inside)})
    for layer in parts.layers:
        holders.update(map(id, layer.parameters()))
    return holders


def goals_of(target: Target, sizes: LayerSizes) -> Goals:
    """The targets for a model of these sizes.

    Raises:
        UserError: targets that the model reaches as it is, or a cache that cannot be told.
    """
    return goals_asked(_goals(target, sizes))


def _goals(target: Target, sizes: LayerSizes) -> Iterator[Goal]:
    if target.params is not None:
        yield goal_of_parameters(target.params, sizes.cost.num_parameters, sizes.layer_parameters)
    batch, length = target.batch_size, target.sequence_length or sizes.length
    conditions = f" for {batch} x {length:,} tokens"
    if target.memory_gb is not None:
        if not sizes.cost.cache:
            raise UserError(
                "prune.target.memory_gb: the cache of this family is only known by running it; use "
                "prune.target.params, or drop layers by number (prune.num_drop)"
            )
        whole = sizes.stored.of(range(sizes.num_layers)) + sizes.cache(batch, length)
        own = (stored + batch * sizes.layer_cache(layer, length) for layer, stored in enumerate(sizes.stored.layers))
        yield goal_of_memory(target.memory_gb, whole, own, conditions)
    if target.speedup is not None:
        whole = sizes.read(batch, length)
        yield Goal(
            "speedup",
            target.speedup,
            whole,
            math.floor(whole / target.speedup),
            tuple(sizes.layer_read(layer, batch, length) for layer in range(sizes.num_layers)),
            lambda amount: f"{whole / amount:.4g} x",
            f"{conditions}, if all time goes into reading weights and cache",
        )
