"""Layers of a donor in the place of the model's own (arXiv:2510.02091: a distilled model's layer in its base)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from shoal.compress.edits.layer_edits import checked
from shoal.compress.edits.tensors import put_tensors
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, text_config

INDIFFERENT = (
    *("_name_or_path", "architectures", "dtype", "initializer_range", "max_position_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "tie_word_embeddings", "transformers_version"),
)
"""Settings of a configuration in which a donor may differ, and all dropout."""


@contextmanager
def swapped(model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int]) -> Iterator[PreTrainedModel]:
    """``model`` with the donor's own tensors in ``layers``, without a copy, until the block ends.

    Raises:
        UserError: models of different classes, settings, sizes or dtypes; a tensor that the model also uses in a layer
            that is not swapped.
    """
    ours, theirs = (_settings(side) for side in (model, donor))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"swap: {name} is {theirs.get(name)!r} in the donor, but {ours.get(name)!r} in the model; give a donor "
                "of the model's own shape"
            )
    before = put_tensors(model, _of_donor(model, donor, layers))
    try:
        yield model
    finally:
        put_tensors(model, before)


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    settings = {"class": type(model).__name__, **text_config(model.config).to_dict()}
    return {name: value for name, value in settings.items() if name not in INDIFFERENT and "dropout" not in name}


def _of_donor(model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int]) -> dict[str, Tensor]:
    """What ``model`` gets, by its names."""
    ours, theirs = (side.state_dict(keep_vars=True) for side in (model, donor))
    checked(layers, len(anatomy(model).layers), "layer")
    prefixes = tuple(f"{anatomy(model).layers_name}.{layer}." for layer in layers)
    names = [name for name in ours if name.startswith(prefixes)]
    for name in names:
        old, other = ours[name], theirs[name]
        if (old.shape, old.dtype) != (other.shape, other.dtype):
            raise UserError(
                f"swap: {name} is {other.dtype} {tuple(other.shape)} in the donor, but {old.dtype} {tuple(old.shape)} "
                "in the model; give a donor of the model's own shape and dtype"
            )
    goes = {id(ours[name]): name for name in reversed(names)}
    for name, tensor in ours.items():
        if id(tensor) in goes and name not in names:
            raise UserError(
                f"swap: {goes[id(tensor)]} is one tensor with {name}, which is not swapped; swap both or none"
            )
    return {name: theirs[name] for name in names}
