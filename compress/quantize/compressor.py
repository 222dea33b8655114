"""llm-compressor: GPTQ, AWQ and FP8 as compressed-tensors, which vLLM and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.models.load import Checkpoint
from shoal.recipe.track import Format

KEPT = ["lm_head", "re:.*router.*", "re:.*mlp[.]gate$", "re:.*block_sparse_moe[.]gate$"]
"""Modules that stay as they are: the head, and what sends tokens to experts, as llm-compressor's examples have it."""


def save_compressed(
    source: Checkpoint, folder: Path, format: Format, *, group_size: int, rows_BS: Tensor | None, device: Any
) -> None:
    """The model of ``source`` in ``format``, saved in ``folder``; it is calibrated on token ids ``rows_BS``."""
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]

    model: Any = source.model(dtype="stored", device=device)
    if rows_BS is None:
        oneshot(model=model, recipe=_recipe(format, group_size), pipeline="datafree")
    else:
        from datasets import Dataset

        ids = rows_BS.tolist()
        rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        oneshot(
            model=model,
            recipe=_recipe(format, group_size),
            dataset=rows,
            processor=source.tokenizer(),
            num_calibration_samples=len(ids),
            max_seq_length=rows_BS.shape[1],
            pipeline="sequential",
        )
    model.save_pretrained(folder, save_compressed=True)


def _recipe(format: Format, group_size: int) -> Any:
    from llmcompressor.modifiers.quantization import (  # pyright: ignore[reportMissingImports]
        GPTQModifier,
        QuantizationModifier,
    )

    if format == "fp8":
        return QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=KEPT)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**weights, "symmetric": format == "w4a16_gptq"}}
    if format == "w4a16_gptq":
        return GPTQModifier(config_groups={"group_0": group}, ignore=KEPT)
    from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]

    return [AWQModifier(), QuantizationModifier(config_groups={"group_0": group}, ignore=KEPT)]
