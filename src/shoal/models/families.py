"""What single families do otherwise than the generic rules assume: families.yaml has a row per model type.

Everything else about a family is told from its modules and its configuration. What llama.cpp counts of families stands
in compress/gguf.py.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from shoal.yaml_text import own_yaml


@dataclass(frozen=True)
class Family:
    """Exceptions of one model type; the defaults are the generic rules."""

    layers: str = ""
    """Path of the list of decoder layers in the whole model, where the decoder is not where transformers says."""
    head_prepares: bool = False
    """Final hidden states pass through the module `lm_head` on their way to the linear head."""
    with_images: bool = False
    """The text model alone is saved under a type that transformers cannot load; it comes with its vision tower."""
    no_branch: str = ""
    """Reason why rows of a cache that looks as if they could be copied would then give other values."""
    no_flash: str = ""
    """What it does that keeps flash kernels from packed rows, though transformers offers them for it; not from torch's,
    which are told of documents in the place of a mask."""
    needs_for_flash: tuple[str, ...] = ()
    """Packages by which its linear layers keep documents apart; without them that is what keeps flash from it."""
    no_cut: str = ""
    """Reason why no cut equals skipping the layers."""
    measured_by_first: bool = False
    """Padded batches go wrong with a KV cache unless the first layer is a full-attention one."""
    may_differ: str = ""
    """Pattern of attributes of a layer's modules that a cut may change without changing what the layer computes."""
    changed_residual: str = ""
    """Reason why a layer with both halves silenced is not the identity, though each half adds nothing."""

    def __post_init__(self) -> None:
        if not all(map(importlib.util.find_spec, self.needs_for_flash)):
            how = "has linear layers that keep documents apart by flash-linear-attention and causal-conv1d"
            reason = f"{how}, not installed here"
            object.__setattr__(self, "no_flash", reason)


FAMILIES = {name: Family(**row) for name, row in own_yaml(__file__).items()}
"""Model type of the text decoder -> its exceptions."""


def family(model_type: str) -> Family:
    """The exceptions of the family whose text decoder has this model type."""
    return FAMILIES.get(model_type, Family())
