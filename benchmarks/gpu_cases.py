"""What `make gpu` measures: sizes, rows and cases, which gpu.yaml lists, and the recipe of each.

A row is 4096 tokens of a step of four rows, like that of NVIDIA's Minitron recipes, and on a CPU 1024.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import Qwen3Config

LISTED: Any = yaml.safe_load(Path(__file__).with_name("gpu.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Size:
    """Shapes of a teacher, the layers that the student lacks, and how a step's rows are split."""

    shapes: dict[str, Any]
    """Settings of Qwen3Config beside those of gpu.yaml's `every`."""
    drop: list[int]
    length: int = 4096
    rows: int = 2
    """Rows of a micro-batch."""
    accumulation: int = 2
    same_everywhere: bool = False
    """Weights are drawn on the host, so that they are the same whatever the device; slow for large models."""

    @property
    def config(self) -> Qwen3Config:
        return Qwen3Config(**LISTED["every"] | self.shapes)


@dataclass(frozen=True)
class Case:
    """One measurement, made by a process of its own."""

    name: str
    group: str
    size: str = "0.6B"
    kind: Literal["card", "shoal", "trl"] = "shoal"
    distill: dict[str, Any] = field(default_factory=dict)
    """Settings of the section distill beside those of every case."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe outside of sections."""
    whole_rows: bool = False
    """Every row is one document; else it holds several."""
    on_cpu: bool = False
    """The process sees no accelerator."""
    trl: dict[str, Any] = field(default_factory=dict)
    """Of TRL's trainer: `weights` (a dtype), `liger`."""
    limit_s: float = 90
    """Seconds after which it is ended."""
    steps_s: float = 6
    """Seconds of its steps, at least two."""
    steps: int = 12


SIZES = {name: Size(**settings) for name, settings in LISTED["sizes"].items()}
CASES = [Case(**LISTED["groups"][case["group"]] | case) for case in LISTED["cases"]]


def recipe_of(case: Case, size: Size, folder: Path) -> dict[str, Any]:
    """The recipe of a training, whose model is the configuration in ``folder``."""
    settings: dict[str, Any] = {"precision": "bf16-mixed", "watch": None, "deepspeed": "zero2", **case.distill}
    split = {"per_device_train_batch_size": size.rows, "gradient_accumulation_steps": size.accumulation}
    trainer = {"trainer": LISTED["trainer"] | split | settings.get("trainer", {})}
    tokens = case.steps * size.rows * size.accumulation * size.length
    return {
        "model": str(folder),
        "run_dir": str(folder),
        "dtype": "bfloat16",
        **case.recipe,
        "prune": {"drop": size.drop},
        # one source, so that no loss term is for some of it alone: rows are drawn, and no text is read
        "distill": {"data": "python_docs", "num_tokens": tokens, "sequence_length": size.length, **settings} | trainer,
        "track": {"wandb": "off"},
    }
