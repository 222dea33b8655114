"""LoRA adapters given as a model: merged into their base once, as a plain checkpoint in shoal's cache."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.atomic_files import cache_dir, file_hash, fingerprint
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.cache import made_once
from shoal.models.checkpoint_files import (
    ADAPTER_CONFIG,
    TOKENIZER_FILES,
    WITH_MODEL,
    WITH_TOKENIZER,
    copy_beside,
    json_or_empty,
    model_fingerprint,
    read_header,
    read_shards,
    tokenizer_fingerprint,
)
from shoal.models.load import align_weights, load_config, load_model, load_tokenizer, resolve_model

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights as they were."""
PROOF_TOKENS = 24
TOLERANCE = 1e-3
"""Largest difference, as a share of the largest logit: a hundred times that of sums in another order in float32."""


def merged_adapter(folder: Path) -> Path:
    """The folder of a plain checkpoint: the adapter at ``folder`` merged into its base, on first use.

    The base is the one that the adapter names, at the revision it names. The cache knows the result by the content of
    adapter, tokenizer and base, so that a change of any of them is another model. The adapter's tokenizer is used where
    it has one: it may have added tokens.

    W + scale * B A is computed in float32 and rounded to the base's dtype once: in bfloat16 both the product and the
    sum would be rounded, and an update under half a unit in the last place of W be lost more often. That takes four
    bytes of memory per parameter of the base, once. Before the result appears, its logits in float32 must be those of
    base and adapter side by side, and the saved checkpoint must give back the rounded model's bit for bit.

    Raises:
        UserError: an adapter that is no LoRA, cannot be merged exactly, does not fit its base, is pickled or damaged,
            or lies beside a full model; a base that is missing, quantised or needs code of its own.
    """
    config = json_or_empty(folder / ADAPTER_CONFIG)
    _refuse_unmergeable(folder, config)
    base = _base(folder, config)
    content = {
        "adapter": [file_hash(folder / name) for name in (ADAPTER_CONFIG, WEIGHTS)],
        "tokenizer": tokenizer_fingerprint(folder),
        "base": model_fingerprint(base),
    }
    target = cache_dir() / "adapters" / fingerprint(content)
    num_parameters = sum(math.prod(tensor.shape) for shard in read_shards(base) for tensor in shard.tensors.values())
    made_once(
        target,
        lambda temporary: _merge(folder, base, temporary),
        action=f"merging {folder} into its base {base}, once (takes {4e-9 * num_parameters:.1f} GB of memory)",
    )
    log.info("%s is a LoRA adapter: the model is %s, where it is merged into its base", folder, target)
    return target


def _refuse_unmergeable(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what the proof of a merge cannot see."""
    from peft import LoraConfig

    if full := sorted([*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")]):
        raise UserError(
            f"{folder}: holds a full model ({full[0].name}) and an adapter ({ADAPTER_CONFIG}), and could mean either; "
            "move one of them to a folder of its own"
        )
    elsewhere = "merge it with peft's merge_and_unload(), save the result and give that"
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{folder}: is a {kind} adapter, and shoal merges LORA only; {elsewhere}")
    known = {field.name for field in fields(LoraConfig)}  # peft itself passes over what it does not know
    if strange := sorted(name for name in config.keys() - known if config[name]):
        raise UserError(
            f"{folder}: its {ADAPTER_CONFIG} sets {strange[0]}, which shoal cannot merge; {elsewhere}, if peft can"
        )
    if (start := config.get("init_lora_weights", True)) not in INITIALISATIONS:
        raise UserError(
            f"{folder}: was initialised by {start}, which changes the base's weights too; save it as a plain LoRA "
            "(peft's save_pretrained with path_initial_model_for_weight_conversion) and give that"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: has no {WEIGHTS}; save the adapter as safetensors")
    read_header(folder / WEIGHTS)


def _base(folder: Path, config: dict[str, Any]) -> Path:
    """The local folder of the model that the adapter was trained on."""
    name, setting = config.get("base_model_name_or_path"), f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
    if not name or not isinstance(name, str):
        raise UserError(f"{setting}: names no base model; set it to the model that the adapter was trained on")
    if Path(name).expanduser().resolve() == folder.resolve():
        raise UserError(f"{setting}: is the adapter itself; set it to the model that the adapter was trained on")
    try:
        base = resolve_model(name, revision=config.get("revision"))
        described = load_config(base)
    except UserError as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{setting}: {name} needs code that comes with it, which a merged checkpoint could not bring along; "
                "give an adapter of an architecture that transformers has"
            ) from error
        raise UserError(f"{setting}: {error}") from error
    if getattr(described, "quantization_config", None) is not None:
        raise UserError(
            f"{setting}: {name} is quantised, and a merge would be rounded away; set it to the full-precision model"
        )
    source = _tokenizer_source(folder, base)
    tokens, rows = len(load_tokenizer(source)), text_config(described).vocab_size
    if tokens > rows:
        raise UserError(
            f"{source}: has a tokenizer of {tokens:,} tokens, but {name} has {rows:,} rows of embeddings: they were "
            "resized for training; resize the base's, save it and set it as base_model_name_or_path"
        )
    return base


def _tokenizer_source(folder: Path, base: Path) -> Path:
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else base


def _merge(folder: Path, base: Path, out: Path) -> None:
    """Write the checkpoint of base and adapter to the folder ``out``.

    Raises:
        UserError: they do not fit, or their sum is not what they are side by side.
    """
    model = load_model(base)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about training, and about what is proven here
        merged = _merged(model.float(), folder, base)
    for name, tensor in merged.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[name])
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: merged, {name} overflows {dtypes[name]}; convert {base} to bfloat16 first")
    expected = _logits(merged)
    merged.save_pretrained(out)
    del model, merged
    copy_beside(_tokenizer_source(folder, base), out, WITH_TOKENIZER)
    copy_beside(base, out, WITH_MODEL)
    if not torch.equal(_logits(load_model(out)), expected):
        raise UserError(f"{folder}: merged and saved, it gives other logits than before; shoal cannot use it")


def _merged(model: PreTrainedModel, folder: Path, base: Path) -> PreTrainedModel:
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    try:
        # the adapter's tensors overwrite whatever an initialisation would make
        config = LoraConfig.from_pretrained(str(folder), init_lora_weights=False)
        adapted = PeftModel.from_pretrained(model, folder, config=config, torch_device="cpu").eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = "tensors of other shapes" if "size mismatch" in str(error) else str(error).strip().split("\n")[0]
        raise UserError(_misfit(folder, base, reason)) from error
    stored = read_header(folder / WEIGHTS).tensors.keys()
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if missing := sorted(own - stored):
        raise UserError(_misfit(folder, base, f"{WEIGHTS} lacks {missing[0]}"))
    if unused := sorted(stored - own - adapted.state_dict().keys()):
        raise UserError(_misfit(folder, base, f"{unused[0]} has no place in it"))
    expected = _logits(adapted)
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot be merged: {str(error).strip()}; give a full model") from error
    difference, largest = (expected - _logits(merged)).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"{folder}: merged, it gives other logits than base and adapter side by side (by up to {difference:.3g}; "
            f"the largest is {largest:.3g}), as a LoRA on one of two tied embeddings does; give a full model"
        )
    return merged


def _misfit(folder: Path, base: Path, reason: str) -> str:
    return (
        f"{folder}: does not fit its base {base}: {reason}; set base_model_name_or_path in {ADAPTER_CONFIG} to the "
        "model that the adapter was trained on"
    )


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """Logits (1, S, V) of a few random tokens."""
    align_weights(model)
    vocabulary = text_config(model.config).vocab_size
    input_ids = torch.randint(0, vocabulary, (1, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    return model(input_ids=input_ids, use_cache=False).logits
