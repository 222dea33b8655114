"""A checkpoint to cut, by its configuration and headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import UserError
from shoal.models.checkpoint_files import Shard, StoredTensor, read_shards
from shoal.models.load import load_config, load_model


@dataclass(frozen=True)
class Teacher:
    """A checkpoint folder and what can be said of it without its weights."""

    folder: Path
    config: PreTrainedConfig
    shards: list[Shard]
    trust_remote_code: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape, of all tensors."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """All tensors by their stored names."""
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}

    def load(self, *, dtype: str = "stored") -> PreTrainedModel:
        """The model itself."""
        return load_model(self.folder, dtype=dtype, attention=None, trust_remote_code=self.trust_remote_code)


def read_teacher(folder: Path, *, trust_remote_code: bool = False) -> Teacher:
    """The checkpoint in ``folder``; its headers are read.

    Raises:
        UserError: a model that transformers alone cannot build, a damaged checkpoint.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    module = type(config).__module__
    if trust_remote_code:  # without consent the class of that name in transformers is taken
        module = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", module)
    if not module.startswith("transformers."):
        raise UserError(
            f"{folder}: needs code that came with it ({module}); without that code the student could not be loaded, "
            "so shoal cuts only architectures that are part of transformers: give another model"
        )
    return Teacher(folder, config, read_shards(folder), trust_remote_code)
