"""Frozen weights: one copy in memory for teacher and student, and written as they were stored."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.atomic_files import written_folder
from shoal.models.anatomy import anatomy, decoder_body, text_config
from shoal.models.checkpoint_files import copy_beside, read_shards
from shoal.models.load import Checkpoint, align_weights

from .lora import BASE, LINEAR, adapted_modules, remove_adapters, weight_change

log = logging.getLogger(__name__)

PROOF_TOKENS = 24


def stored_names(folder: Path) -> set[str]:
    """The names of the tensors in the files of a checkpoint."""
    return {name for shard in read_shards(folder) for name in shard.tensors}


def share_frozen(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    keep: Sequence[int],
    *,
    autocast_dtype: torch.dtype | None,
    stored: Set[str] = frozenset(),
) -> int:
    """Let the student's frozen weights be the teacher's tensors where that changes no number; the bytes saved.

    Of one dtype that is every frozen weight that is equal. Under autocast to the teacher's dtype it is the weights of
    linear modules, which autocast would cast to the teacher's bits at every use, and embeddings, whose rows are cast
    to the student's dtype as they are looked up. Norms keep their own: the dtype of their weight decides that of their
    sum. A weight that the teacher holds in fewer bits than the student's files do is shared only if it is among their
    names, ``stored``, since the student is then written from there (finished_state).

    Called when both are on their device and what is frozen is known, before the optimizer is made. A forward of a few
    tokens must then give the same bits as before; if it does not, nothing is shared. Not for ZeRO 3, where weights are
    in pieces. ``keep``: the teacher's layer that each of the student's is.
    """
    for model in (student, teacher):
        align_weights(model)  # else the last bits may differ on a CPU: mapped files are not aligned
    before = _computed(student, autocast_dtype)
    own: dict[nn.Parameter, Tensor] = {}
    hooks = []
    for parameter, theirs, owners in _frozen_pairs(student, teacher, keep):
        if not _is_interchangeable(parameter, theirs, owners, autocast_dtype=autocast_dtype, stored=stored):
            continue
        for module in owners.values():
            if isinstance(module, nn.Embedding) and parameter.dtype != theirs.dtype:
                hooks.append(module.register_forward_hook(partial(_cast, parameter.dtype)))
        own[parameter] = parameter.data
        parameter.data = theirs.data
    if own and not torch.equal(_computed(student, autocast_dtype), before):
        log.info("teacher and student keep separate frozen weights: sharing them would change the last bits of sums")
        for parameter, data in own.items():
            parameter.data = data
        for hook in hooks:
            hook.remove()
        return 0
    saved = sum(data.numel() * data.element_size() for data in own.values())
    if saved:
        log.info("teacher and student share %.0f MB of frozen weights", saved / 1e6)
    return saved


def _cast(dtype: torch.dtype, _module: nn.Module, _args: Any, rows: Tensor) -> Tensor:
    return rows.to(dtype)


def _is_interchangeable(
    own: Tensor,
    theirs: Tensor,
    owners: Mapping[str, nn.Module],
    *,
    autocast_dtype: torch.dtype | None,
    stored: Set[str],
) -> bool:
    if own.dtype == theirs.dtype:
        return torch.equal(own, theirs)
    kinds = {type(module) for module in owners.values()}
    # subclasses may scale what they return, in the dtype of the weight
    if own.dtype != torch.float32 or theirs.dtype != autocast_dtype or not kinds <= {*LINEAR, nn.Embedding}:
        return False
    if torch.equal(own, theirs.to(own.dtype)):
        return True
    return nn.Embedding not in kinds and not stored.isdisjoint(owners) and torch.equal(own.to(theirs.dtype), theirs)


def _frozen_pairs(
    student: PreTrainedModel, teacher: PreTrainedModel, keep: Sequence[int]
) -> list[tuple[nn.Parameter, nn.Parameter, dict[str, nn.Module]]]:
    """The student's frozen parameters, the teacher's in the same place, and the student's modules that own them.

    A module is known by the parameter's plain name in it; a tied parameter has two.
    """
    layers_name = anatomy(student).layers_name
    owners: dict[nn.Parameter, dict[str, nn.Module]] = {}
    for prefix, module in student.named_modules():
        for leaf, parameter in module.named_parameters(prefix, recurse=False):
            if not parameter.requires_grad:
                owners.setdefault(parameter, {})[plain_name(leaf)] = module
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    pairs = []
    for parameter, modules in owners.items():
        names = [_in_teacher(name, layers_name, keep) for name in modules]
        found = {id(theirs[name]): theirs[name] for name in names if name in theirs}
        if len(found) != 1:
            continue
        (other,) = found.values()
        if not other.requires_grad and (other.shape, other.device) == (parameter.shape, parameter.device):
            pairs.append((parameter, other, modules))
    return pairs


def _in_teacher(name: str, layers_name: str, keep: Sequence[int]) -> str:
    """What the teacher calls the student's parameter ``name``."""
    if not name.startswith(f"{layers_name}."):
        return name
    layer, _, rest = name.removeprefix(f"{layers_name}.").partition(".")
    return f"{layers_name}.{keep[int(layer)]}.{rest}"


def plain_name(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(BASE, ".")


@torch.no_grad()
def _computed(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> Tensor:
    """What the model computes of a few tokens, and what its head makes of the last one."""
    device = next(model.parameters()).device
    vocabulary = text_config(model.config).vocab_size
    ids = torch.randint(0, vocabulary, (1, PROOF_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    training = model.training
    model.eval()
    with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
        hidden = decoder_body(model)(input_ids=ids, use_cache=False).last_hidden_state
        head: Any = model.get_output_embeddings()
        logits = nn.functional.linear(hidden[:, -1], head.weight)
    model.train(training)
    return torch.cat([hidden.flatten().float(), logits.flatten().float()])


def finished_state(
    student: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is written as the trained student, by the names of the plain model.

    ``state`` is the whole state dict, ``folder`` the student's as it was before training. Frozen weights are the bits
    that are stored there, wherever those are what the model holds: it may hold them in fewer. Adapters are merged in
    float32, into what is stored of a weight that is held in 4 bits. All that was trained is rounded once, to ``dtype``;
    what the files have in float32 all the same (decays of state spaces, for one) stays in that.
    """
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    adapted = adapted_modules(student)
    quantised = {name for name, module in student.named_modules() if type(module).__name__ == "Linear4bit"}
    frozen = {plain_name(name) for name in state if name not in trained}
    exact: set[str] = set()
    stored: dict[str, Tensor] = {}
    for shard in read_shards(folder):
        exact |= {name for name, tensor in shard.tensors.items() if tensor.dtype == "F32"}
        with safe_open(shard.file, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in frozen & shard.tensors.keys()}
    finished: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = plain_name(name)
        owner = name.removesuffix(f"{BASE}weight")
        if name.partition(".lora_")[0] in adapted or name.partition(".weight.")[0] in quantised:
            continue  # an adapter's matrix, or a scale of 4-bit weights
        original, rounded = stored.get(plain), torch.float32 if plain in exact else dtype
        in_four_bits = name.removesuffix(".weight") in quantised
        if original is not None and (in_four_bits or _holds(value, original)):
            value = original
        elif value.is_floating_point():
            value = value.to(rounded)
        if owner in adapted:
            value = (value.float() + weight_change(adapted[owner], state, owner)).to(rounded)
        finished[plain] = value
    return finished


def write_student(student: PreTrainedModel, state: Mapping[str, Tensor], before: Checkpoint, folder: Path) -> None:
    """Write a trained student as a plain checkpoint: its weights as finished_state has them, all else as it lies beside
    the weights that training began with, ``before``. The model has no adapters any more after that.

    config.json names the dtype of ``before``: transformers puts there what the model in memory has, float32 in
    training, and whoever loads the checkpoint would get that.
    """
    dtype = before.stored_dtype
    finished = finished_state(student, state, before.folder, dtype=dtype)
    remove_adapters(student)
    with written_folder(folder) as unfinished:
        student.save_pretrained(unfinished, state_dict=finished)
        config = student.config
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None:
                part.dtype = dtype
        config.save_pretrained(unfinished)
        copy_beside(before.folder, unfinished)  # a teacher's folder may hold much else, such as other formats


def _holds(value: Tensor, original: Tensor) -> bool:
    """Whether ``value`` is the stored tensor, as a model of its dtype holds it."""
    same_kind = value.is_floating_point() == original.is_floating_point()
    return same_kind and value.shape == original.shape and torch.equal(original.to(value.dtype), value.cpu())
