"""What single families do otherwise than the generic rules assume: one row per model type, read in its source.

Everything else about a family is told from its modules and its configuration. A new family needs a row only where a
test says that a rule does not hold for it. What llama.cpp counts of
families stands in compress/gguf.py.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


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
    no_cut: str = ""
    """Reason why no cut equals skipping the layers."""
    measured_by_first: bool = False
    """Padded batches go wrong with a KV cache unless the first layer is a full-attention one."""
    may_differ: str = ""
    """Pattern of attributes of a layer's modules that a cut may change without changing what the layer computes."""
    changed_residual: str = ""
    """Reason why a layer with both halves silenced is not the identity, though each half adds nothing."""


_STORES_KV = r"self_attn\.store_full_length_kv"  # config_cut._recount_shared_layers checks that the read ones store
_READS_BLOCKS = "its layers read the outputs of earlier blocks of layers beside the residual stream"
_KEEPS_BORDERS = "does not tell its kernels where documents begin"
_DELTA_RULE = (
    ""
    if importlib.util.find_spec("fla") and importlib.util.find_spec("causal_conv1d")
    else "has linear layers that keep documents apart by flash-linear-attention and causal-conv1d, not installed here"
)
_PADS_LEFT = "takes padding on the left for text"

FAMILIES: dict[str, Family] = {
    "cpmant": Family(layers="cpmant.encoder.layers", no_branch="wants all earlier tokens beside the cache"),
    "doge": Family(changed_residual="scales the residual stream in every layer"),
    "dory": Family(no_branch="grows the cache"),
    "gemma3n_text": Family(may_differ=_STORES_KV, changed_residual="mixes several residual streams in every layer"),
    "gemma4_text": Family(
        may_differ=_STORES_KV,
        changed_residual="adds per-layer embeddings and scales the residual stream",
    ),
    "gemma4_unified_text": Family(may_differ=_STORES_KV),
    "git": Family(layers="git.encoder.layer", no_branch=_PADS_LEFT),
    "falcon": Family(no_flash=_KEEPS_BORDERS),
    "gpt_neo": Family(no_flash=_KEEPS_BORDERS),
    "hrm_text": Family(
        no_branch="a recurrence that makes something of every rounding", no_flash="reads a prefix in both directions"
    ),
    "inkling2_loop_text": Family(no_cut=_READS_BLOCKS),
    "inkling2_text": Family(no_cut=_READS_BLOCKS),
    "lara_mini": Family(no_flash=_DELTA_RULE),
    "llama4_text": Family(no_branch=_PADS_LEFT),
    "minimax": Family(
        may_differ=r"self_attn\.num_hidden_layers",  # decides decay rates that are buffers of the checkpoint
        measured_by_first=True,
        changed_residual="norms and scales the residual stream in every layer",
    ),
    "mllama_text_model": Family(with_images=True, no_branch="fills no slot of a layer that reads no image"),
    "modernbert-decoder": Family(head_prepares=True),
    "nemotron": Family(no_flash=_KEEPS_BORDERS),
    "olmo_hybrid": Family(no_flash=_DELTA_RULE),
    "openai-gpt": Family(changed_residual="norms the residual stream after every half"),
    "opt": Family(changed_residual="norms the residual stream after every half (the 350m shape)"),
    "qwen2_moe": Family(no_flash="does not tell its kernels of its sliding window"),
    "qwen3_5_moe_text": Family(no_flash=_DELTA_RULE),
    "qwen3_5_text": Family(no_flash=_DELTA_RULE),
    "qwen3_next": Family(no_flash=_DELTA_RULE),
    "stablelm": Family(no_flash=_KEEPS_BORDERS),
    "xlstm": Family(no_branch="is recurrent"),
    "zamba2": Family(
        # which block and adapters a layer shares: config_cut and cut_model.teacher_leaf see to them
        may_differ=r".*\.(block_id|num_fwd_mem_blocks)|.*_adapter_list\..*"
    ),
    "zaya": Family(
        no_cut="the router of every layer reads the state of the router before it, which a dropped layer cannot pass on"
    ),
}
"""Model type of the text decoder -> its exceptions."""


def family(model_type: str) -> Family:
    """The exceptions of the family whose text decoder has this model type."""
    return FAMILIES.get(model_type, Family())
