"""Keys of a recipe's sections that functions of the Python API take too. Written from the sections by
tests/launch/api/test_settings.py; run that file after a change of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict


class MeasureSettings(TypedDict, total=False):
    """Of the section `measure`."""

    num_tokens: int
    sequence_length: int
    batch_size: int
    sweep: Mapping[str, Any] | None


class DistillSettings(TypedDict, total=False):
    """Of the section `distill`."""

    num_tokens: int | None
    sequence_length: int
    batch_size: int | None
    packing: Literal["wrapped", "bfd"]
    lora: Mapping[str, Any] | None
    on_policy: Mapping[str, Any] | None
    stop_on_spike: float | None
    precision: Literal["auto", "float32", "bf16-mixed", "bf16-true", "fp16-mixed", "fp16-true"]
    trainer: Mapping[str, Any]


class EvalSettings(TypedDict, total=False):
    """Of the section `eval`."""

    batch_size: int | Literal["auto"]
    num_fewshot: int | None
    apply_chat_template: bool
    include_path: str | None
    data_dir: str | None
    perplexity_tokens: int
