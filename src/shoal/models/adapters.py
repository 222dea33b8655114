"""LoRA adapters merged into their base by peft, and the proof that the result is what both were side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.model_names import ADAPTER_CONFIG
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import (
    TOKENIZER_FILES,
    WITH_MODEL,
    WITH_TOKENIZER,
    copy_beside,
    json_or_empty,
    read_header,
)
from shoal.models.load import align_weights, load_model

WEIGHTS = "adapter_model.safetensors"
INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights as they were."""
PROOF_TOKENS = 24
TOLERANCE = 1e-3
"""Largest difference, as a share of the largest logit: a hundred times that of sums in another order in float32."""


def check_mergeable(folder: Path, base: Any) -> None:
    """Refuse what the proof of a merge cannot see; ``base`` is the configuration of the adapter's base.

    Raises:
        UserError: a checkpoint next to the adapter, an adapter that changed the base's weights too, pickled or damaged
            weights, or a base that is quantised.
    """
    start = json_or_empty(folder / ADAPTER_CONFIG).get("init_lora_weights", True)
    full = sorted(file.name for file in (*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")))
    problems = (
        (bool(full), f"has an adapter and a whole checkpoint ({full[:1]}); move one of them to a folder of its own"),
        (
            start not in INITIALISATIONS,
            f"was initialised by {start}, which changes the base's weights too; save it as a plain LoRA (peft's "
            "save_pretrained with path_initial_model_for_weight_conversion) and give that",
        ),
        (not (folder / WEIGHTS).is_file(), f"has no {WEIGHTS}; save the adapter as safetensors"),
        (
            getattr(base, "quantization_config", None) is not None,
            "its base is quantised, and merging would round the adapter away; name the full-precision model",
        ),
    )
    if problem := next((words for is_so, words in problems if is_so), None):
        raise UserError(f"{folder}: {problem}")
    read_header(folder / WEIGHTS)


def merge(folder: Path, base: Path, out: Path) -> None:
    """Write the checkpoint of the adapter at ``folder`` and its base to the folder ``out``.

    W + scale * B A is computed in float32 and rounded to the base's dtype once: in bfloat16 both the product and the
    sum would be rounded, and an update under half a unit in the last place of W be lost more often. Its logits in
    float32 must be those of base and adapter side by side, and the saved checkpoint must give back the rounded model's
    bit for bit. The adapter's tokenizer is used where it has one: it may have added tokens.

    Raises:
        UserError: they do not fit, or their sum is not what they are side by side.
    """
    model = load_model(base)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    merged = _merged(model.float(), folder, base)
    for name, tensor in merged.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[name])
    expected = _logits(merged)
    merged.save_pretrained(out)
    del model, merged
    copy_beside(folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else base, out, WITH_TOKENIZER)
    copy_beside(base, out, WITH_MODEL)
    if not torch.equal(_logits(load_model(out)), expected):  # nor is a number equal that overflows
        raise UserError(
            f"{folder}: merged and saved, it gives other logits than before, so shoal cannot use it; give a merged "
            "model"
        )


def _merged(model: PreTrainedModel, folder: Path, base: Path) -> PreTrainedModel:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.init_lora_weights = False  # the adapter's tensors overwrite whatever an initialisation would make
        adapted = PeftModel.from_pretrained(model, folder, config=config, torch_device="cpu").eval()
        stored = read_header(folder / WEIGHTS).tensors.keys()
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        if strange := sorted((own - stored) | (stored - own - adapted.state_dict().keys())):
            raise ValueError(f"only one of both has {strange[0]}")
        expected = _logits(adapted)
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: cannot be merged into its base {base}: {str(error).strip().splitlines()[0]}; set "
            f"base_model_name_or_path in {ADAPTER_CONFIG} to the model that the adapter was trained on, or give a "
            "merged checkpoint"
        ) from error
    difference, largest = (expected - _logits(merged)).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"{folder}: merged, it gives other logits than base and adapter side by side (by up to {difference:.3g}; "
            f"the largest is {largest:.3g}), as a LoRA on one of two tied embeddings does; give a merged checkpoint"
        )
    return merged


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """Logits (1, S, V) of a few random tokens."""
    align_weights(model)
    vocabulary = text_config(model.config).vocab_size
    input_ids = torch.randint(0, vocabulary, (1, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    return model(input_ids=input_ids, use_cache=False).logits
