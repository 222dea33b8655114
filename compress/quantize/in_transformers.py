"""torchao and bitsandbytes: transformers quantises tensor by tensor as it loads, and saves what it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from shoal.models.load import Checkpoint
from shoal.recipe.track import Format


def save_quantised(source: Checkpoint, folder: Path, format: Format, *, group_size: int, device: Any) -> None:
    """The model of ``source`` in ``format``, saved in ``folder``; the linear modules of its layers alone.

    No more is held than the quantised model and the tensors that are being read.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.folder,
        dtype=source.stored_dtype,
        quantization_config=_config(source, format, group_size),
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=source.load.trust_remote_code,
    )
    model.save_pretrained(folder)


def _config(source: Checkpoint, format: Format, group_size: int) -> Any:
    if format == "nf4":
        # Dettmers et al. 2023, arXiv:2305.14314: their scales are quantised too
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=source.stored_dtype,
        )
    if format == "bnb_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao import quantization as torchao  # pyright: ignore[reportMissingImports]

    configs = {
        "int8": torchao.Int8WeightOnlyConfig,
        "float8": torchao.Float8WeightOnlyConfig,
        "int4": lambda: torchao.Int4WeightOnlyConfig(group_size=group_size),
    }
    return TorchAoConfig(configs[format]())
