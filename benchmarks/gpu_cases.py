"""What `make gpu` measures: sizes, rows and cases, and the recipe of each.

Sizes are those of Qwen3's models (configurations of Qwen/Qwen3-0.6B, -1.7B and -8B), weights are random. A row is 4096
tokens of a step of four rows, like that of NVIDIA's Minitron recipes. A CPU has a size of its own, that of the bundled
model, and rows of 1024.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import Qwen3Config

Kind = Literal["card", "shoal", "trl"]


@dataclass(frozen=True)
class Size:
    """Shapes of a teacher, the layers that the student lacks, and how a step's rows are split."""

    hidden: int
    inner: int
    layers: int
    heads: int
    drop: tuple[int, ...]
    tied: bool = True
    vocabulary: int = 151_936
    key_value_heads: int = 8
    head_size: int = 128
    length: int = 4096
    rows: int = 2
    """Rows of a micro-batch."""
    accumulation: int = 2
    same_everywhere: bool = False
    """Weights are drawn on the host, so that they are the same whatever the device; slow for large models."""

    @property
    def keep(self) -> tuple[int, ...]:
        """The teacher's layers that the student has."""
        return tuple(layer for layer in range(self.layers) if layer not in self.drop)

    @property
    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_size,
            max_position_embeddings=40_960,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=256,
            dtype="bfloat16",
        )


SIZES = {
    "0.6B": Size(1024, 3072, 28, 16, drop=tuple(range(14, 20))),
    "1.7B": Size(2048, 6144, 28, 16, drop=tuple(range(14, 20))),
    "8B": Size(4096, 12_288, 36, 32, drop=tuple(range(18, 26)), tied=False),
    "demo": Size(
        *(576, 1536, 30, 9),
        drop=(12, 13, 14, 18, 21, 22, 25, 26),
        vocabulary=49_152,
        key_value_heads=3,
        head_size=64,
        length=1024,
        rows=4,
        accumulation=1,
    ),
    "small": Size(
        512, 1024, 8, 8, (4, 5), vocabulary=8192, key_value_heads=2, head_size=64, length=512, same_everywhere=True
    ),
}
"""The last is for losses on several devices, fast enough for a CPU."""
_TINY = Size(64, 128, 4, 4, (2,), vocabulary=512, key_value_heads=2, head_size=16, length=64, same_everywhere=True)
TINY = dict.fromkeys(SIZES, _TINY)
"""In place of all of them where the command itself is tried."""


@dataclass(frozen=True)
class Case:
    """One measurement, made by a process of its own."""

    name: str
    size: str = "0.6B"
    group: str = "memory"
    """Table that it stands in."""
    kind: Kind = "shoal"
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


FROM_THE_CUT = {"trainable": "from_first_cut"}
CHECKPOINTING = {"trainer": {"gradient_checkpointing": True}}
LORA = {"lora": {"r": 16}}
NF4 = {"lora": {"r": 16, "load_in_4bit": True}}
BF16_WEIGHTS, FUSED, COMPILED = {"precision": "bf16-true"}, "use_liger_kernel", "torch_compile"
LIGER = {"liger": True}


def zero(stage: str) -> dict[str, str]:
    """The shipped DeepSpeed configuration of a stage."""
    return {"deepspeed": f"zero{stage}"}


IN_FLOAT32: dict[str, Any] = {"distill": {"precision": "float32"} | zero("0"), "recipe": {"dtype": "float32"}}
SPEED: dict[str, Any] = {"size": "1.7B", "group": "speed"}
KERNELS: dict[str, Any] = {"size": "1.7B", "group": "kernels", "limit_s": 120}
LOSSES: dict[str, Any] = {"size": "small", "group": "losses", "steps": 4, "steps_s": 60, "limit_s": 120}
CPU: dict[str, Any] = {
    "size": "demo",
    "group": "cpu",
    "whole_rows": True,
    "recipe": {"dtype": "float32"},
    "steps": 4,
    "steps_s": 600,
    "limit_s": 900,
}

CASES = (
    Case("card", group="card", kind="card"),
    Case("as shipped", **SPEED),
    Case("from the first cut up, checkpointing", "8B", "speed", distill=zero("0") | FROM_THE_CUT | CHECKPOINTING),
    Case("one document a row", whole_rows=True, **SPEED),
    Case("TRL, Liger", kind="trl", whole_rows=True, trl=LIGER, **SPEED),
    Case("TRL, bf16 weights, Liger", kind="trl", whole_rows=True, trl=LIGER | {"weights": "bfloat16"}, **SPEED),
    Case("TRL", kind="trl", whole_rows=True, **SPEED),
    Case("losses, CPU, float32", on_cpu=True, **IN_FLOAT32, **LOSSES),
    Case("losses, float32", **IN_FLOAT32, **LOSSES),
    Case("losses, bf16 autocast", **LOSSES),
    *(
        Case(f"attention {kind}", "1.7B", "attention", recipe={"attn_implementation": kind})
        for kind in ("auto", "flash", "sdpa", "eager")
    ),
    Case("bf16-true", distill=BF16_WEIGHTS, **KERNELS),
    Case("fused", distill={"trainer": {FUSED: True}}, **KERNELS),
    Case("compile", distill={"trainer": {COMPILED: True}}, **KERNELS),
    Case("all of these", distill=BF16_WEIGHTS | {"trainer": {FUSED: True, COMPILED: True}}, **KERNELS),
    *(Case(f"ZeRO {stage}", distill=zero(stage)) for stage in "0123"),
    Case("ZeRO 0, checkpointing", distill=zero("0") | CHECKPOINTING),
    Case("ZeRO 0, LoRA", distill=zero("0") | LORA),
    Case("ZeRO 0, nf4", distill=zero("0") | NF4),
    Case("ZeRO 2, optimizer on host", distill=zero("2_offload")),
    Case("ZeRO 3, all on host", distill=zero("3_offload")),
    Case("ZeRO 0, from the first cut up", distill=zero("0") | FROM_THE_CUT),
    Case("LoRA, checkpointing", "8B", "speed", distill=zero("0") | CHECKPOINTING | LORA),
    Case("nf4, checkpointing", "8B", "speed", distill=zero("0") | CHECKPOINTING | NF4),
    Case("on a CPU, one document a row", distill={"precision": "float32"}, **CPU),
    Case("on a CPU, from the first cut up", distill={"precision": "float32"} | FROM_THE_CUT, **CPU),
    Case("on a CPU, recorded teacher", distill={"precision": "float32", "teacher": "recorded"}, **CPU),
    Case("on a CPU, TRL", kind="trl", distill={"precision": "float32"}, **CPU),
)
"""All of them, the most important first: where time is short, the last are left out."""


def recipe_of(case: Case, size: Size, folder: Path) -> dict[str, Any]:
    """The recipe of a training, whose model is the configuration in ``folder``."""
    settings: dict[str, Any] = {"precision": "bf16-mixed", "watch": None, **zero("2"), **case.distill}
    trainer = {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "per_device_train_batch_size": size.rows,
        "gradient_accumulation_steps": size.accumulation,
        **settings.get("trainer", {}),
    }
    tokens = case.steps * size.rows * size.accumulation * size.length
    return {
        "model": str(folder),
        "run_dir": str(folder),
        "dtype": "bfloat16",
        **case.recipe,
        "prune": {"drop": list(size.drop)},
        "distill": {"num_tokens": tokens, "sequence_length": size.length, **settings, "trainer": trainer},
        "track": {"wandb": "off"},
    }
