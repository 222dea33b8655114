"""Cut decoder layers out of a model in memory, really or by skipping them.

The student is never the teacher edited in place. Its configuration is built first, a fresh model is made from it, and
tensors are copied by an old-to-new index map: whatever a family derives from a layer's index (attention kind, RoPE,
cache slot, mixture of experts or not) is then right by construction, and compared with the teacher's layer afterwards.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from shoal.components import require_layers
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers, given_state, text_config, with_state
from shoal.models.families import family

from .config_cut import cut_config, kept_ranks

LAYERS_SIDE_BY_SIDE: dict[str, int] = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
"""End of a tensor's name -> the dimension (num_layers x size per layer) in which it holds a part for every layer."""
_ADAPTER = re.compile(r"(?<=_adapter_list\.)\d+(?=\.)")
"""Zamba 2 keeps in every shared block one adapter for each hybrid layer that runs it, numbered among hybrid layers."""


def cut_model(model: PreTrainedModel, drop: Sequence[int], *, share: bool = False) -> PreTrainedModel:
    """A new model in eval mode without the layers ``drop`` (any order), in the teacher's dtypes and on its device.

    The teacher stays as it is. With ``share`` the two use the same storage, which halves the memory where neither will
    be trained.

    Raises:
        UserError: an index that is no layer, all layers, or a cut the architecture cannot express.
    """
    keep = kept_layers(len(decoder_layers(model)), drop)
    config = cut_config(model.config, keep)
    with init_empty_weights(include_buffers=False), no_init_weights():
        student = type(model)._from_config(config, dtype=model.dtype)
    refuse_changed_layers(model, student, keep)
    _fill(student, model, keep, share=share)
    student.tie_weights()
    if model.generation_config is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


@contextmanager
def skipped(model: PreTrainedModel, drop: Collection[int]) -> Iterator[PreTrainedModel]:
    """``model`` with the layers ``drop`` passing their input on, until the block ends.

    The layers still run and their result is thrown away. That is not the fast way but the exact one: a KV cache
    measures the sequence by the layers' slots, and a slot that nobody fills shifts every position (slot 0) or fails."""
    layers = decoder_layers(model)
    kept_layers(len(layers), drop)

    def pass_input_on(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return with_state(output, given_state(args, kwargs))

    with ExitStack() as stack:
        for layer in drop:
            stack.enter_context(layers[layer].register_forward_hook(pass_input_on, with_kwargs=True))
        yield model


def kept_layers(num_layers: int, drop: Collection[int]) -> tuple[int, ...]:
    """The layers that stay, in order."""
    dropped = set(drop)
    require_layers(dropped, num_layers)
    return tuple(layer for layer in range(num_layers) if layer not in dropped)


def _teacher_names(teacher: PreTrainedModel, names: Sequence[str], keep: Sequence[int]) -> dict[str, str]:
    """Student tensor name -> the name of the teacher's tensor that it copies."""
    prefix, config = f"{anatomy(teacher).layers_name}.", text_config(teacher.config)

    def rename(name: str) -> str:
        if not name.startswith(prefix):
            return name
        index, rest = name.removeprefix(prefix).split(".", 1)
        return f"{prefix}{keep[int(index)]}.{teacher_leaf(config, rest, keep)}"

    return {name: rename(name) for name in names}


def _fill(student: PreTrainedModel, teacher: PreTrainedModel, keep: Sequence[int], *, share: bool) -> None:
    """Give every parameter and buffer of the student the teacher's tensor; account for every tensor of the teacher."""
    source = {**dict(teacher.named_parameters(remove_duplicate=False)), **dict(teacher.named_buffers())}
    wanted = [name for name, _ in (*student.named_parameters(remove_duplicate=False), *student.named_buffers())]
    names = _teacher_names(teacher, wanted, keep)
    _refuse_unmatched(names, teacher, source, keep)
    for name, teacher_name in names.items():
        owner, _, leaf = name.rpartition(".")
        module = student.get_submodule(owner)
        old = kept_part(name, source[teacher_name].detach(), keep, len(decoder_layers(teacher)))
        shape = getattr(module, leaf).shape
        if old.shape != shape:
            raise UserError(
                f"{teacher_name}: shoal cannot cut {teacher.config.model_type} models yet: the tensor has shape "
                f"{tuple(old.shape)} but the student needs {tuple(shape)}; please report this"
            )
        tensor = old if share else old.clone()
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=source[teacher_name].requires_grad)
        else:
            # computed ones (RoPE frequencies) too: a teacher cast to bf16 as a whole has other values than a fresh one
            module._buffers[leaf] = tensor


def _refuse_unmatched(
    names: dict[str, str], teacher: PreTrainedModel, source: dict[str, Tensor], keep: Sequence[int]
) -> None:
    missing = sorted(set(names.values()) - source.keys())
    prefix = f"{anatomy(teacher).layers_name}."
    kept = tuple(f"{prefix}{layer}." for layer in keep)
    stored = teacher.state_dict().keys()  # computed buffers of an attention kind that is gone need no place
    unused = sorted(
        name
        for name in stored - set(names.values())
        if not name.startswith(prefix)
        or (name.startswith(kept) and not goes_with_a_dropped_layer(text_config(teacher.config), name, keep))
    )
    for unmatched, text in ((missing, "the student needs but the teacher lacks"), (unused, "would be lost in the cut")):
        if unmatched:
            raise UserError(
                f"{unmatched[0]}: shoal cannot cut {teacher.config.model_type} models yet: a tensor that {text} "
                f"({len(unmatched)} in all); please report this"
            )


def refuse_changed_layers(teacher: PreTrainedModel, student: PreTrainedModel, keep: Sequence[int]) -> None:
    """Compare every kept layer's plain attributes (attention kind, window, RoPE or not, ...) with the teacher's.

    Logits on a short input would not show a window of 4,096 tokens that has become full attention.
    """
    old_layers, new_layers = decoder_layers(teacher), decoder_layers(student)
    may_differ = family(text_config(teacher.config).model_type).may_differ
    for new_index, old_index in enumerate(keep):
        old = layer_traits(old_layers[old_index], old_index)
        new = layer_traits(new_layers[new_index], new_index)
        for trait in sorted(old.keys() | new.keys()):
            if old.get(trait) != new.get(trait) and not re.fullmatch(may_differ, trait):
                raise UserError(
                    f"layer {old_index}: its {trait} is {old.get(trait)!r} but would become {new.get(trait)!r} as "
                    f"layer {new_index} of the student; this architecture cannot express that, choose other layers"
                )


def layer_traits(layer: nn.Module, index: int) -> dict[str, Any]:
    """Classes and plain attributes of a layer's modules; its own index counts as 'its own index'."""
    traits: dict[str, Any] = {}
    for name, module in layer.named_modules():
        traits[f"{name}.class"] = type(module).__name__
        for key, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str | type(None))
            if plain and key not in ("training", "gradient_checkpointing") and not key.startswith("_"):
                if key in ("layer_idx", "layer_id", "layer_number") and isinstance(value, int) and value >= 0:
                    value -= index  # -1 is no layer's: a block that several layers share
                if isinstance(value, float):  # a scale that a cut recomputes may differ in the last place of float64
                    value = torch.tensor(value, dtype=torch.float32, device="cpu").item()
                traits[f"{name}.{key}"] = value
    return traits


def side_by_side_dim(name: str) -> int | None:
    """The dimension of tensor ``name`` in which every layer has its part, or None for all other tensors."""
    return next((dim for end, dim in LAYERS_SIDE_BY_SIDE.items() if name.endswith(end)), None)


def kept_part(name: str, tensor: Tensor, keep: Sequence[int], num_layers: int) -> Tensor:
    """``tensor`` itself, or a copy of the kept layers' parts where ``name`` holds a part for every layer."""
    dim = side_by_side_dim(name)
    if dim is None:
        return tensor
    parts = tensor.unflatten(dim, (num_layers, -1))  # (..., L * size, ...) -> (..., L, size, ...)
    return parts.index_select(dim, torch.tensor(keep, device=tensor.device)).flatten(dim, dim + 1)


def teacher_leaf(config: PreTrainedConfig, leaf: str, keep: Sequence[int]) -> str:
    """Name within its layer of the teacher's tensor that the student's tensor ``leaf`` copies; mostly the same."""
    if config.model_type != "zamba2":
        return leaf
    ranks = kept_ranks(config.layers_block_type, keep)
    return _ADAPTER.sub(lambda match: str(ranks[int(match[0])]), leaf)


def goes_with_a_dropped_layer(config: PreTrainedConfig, name: str, keep: Sequence[int]) -> bool:
    """Whether the teacher's tensor ``name`` serves only dropped layers though a kept one holds it."""
    adapter = _ADAPTER.search(name) if config.model_type == "zamba2" else None
    return adapter is not None and int(adapter[0]) not in kept_ranks(config.layers_block_type, keep)
