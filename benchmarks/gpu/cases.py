"""What `make gpu` measures: sizes, rows and cases, and the recipe of each.

Sizes are those of Qwen3's models (configurations of Qwen/Qwen3-0.6B, -1.7B and -8B), weights are random. A row is 4096
tokens of a step of four rows, like that of NVIDIA's Minitron recipes.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    "small": Size(
        512, 1024, 8, 8, (4, 5), vocabulary=8192, key_value_heads=2, head_size=64, length=512, same_everywhere=True
    ),
}
"""The last is for losses on several devices, fast enough for a CPU."""
_TINY = Size(64, 128, 4, 4, (2,), vocabulary=512, key_value_heads=2, head_size=16, length=64, same_everywhere=True)
TINY = dict.fromkeys(SIZES, _TINY)
"""In place of all of them where the command itself is tried."""

FROM_THE_CUT = {"trainable": "from_first_cut"}
CHECKPOINTING = {"trainer": {"gradient_checkpointing": True}}
ZERO_2 = {"deepspeed": "deepspeed/zero2.json"}


@dataclass(frozen=True)
class Case:
    """One measurement, made by a process of its own."""

    name: str
    kind: Kind = "shoal"
    size: str = "0.6B"
    group: str = "attention"
    """Table that it stands in."""
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
    limit_s: float = 60
    """Seconds after which it is ended."""
    steps_s: float = 6
    """Seconds of its steps, at least two."""
    steps: int = 12


def cases() -> list[Case]:
    """All of them, the most important first: where time is short, the last are left out."""
    return [
        Case("card", kind="card", group="card"),
        *_speed(),
        *_losses(),
        *_attention(),
        *_weights_and_kernels(),
        *_memory(),
        *_large(),
    ]


def _speed() -> Iterator[Case]:
    large = {"deepspeed": "deepspeed/zero0.json"} | FROM_THE_CUT | CHECKPOINTING
    yield Case("as shipped", size="1.7B", group="speed")
    yield Case("from the first cut up, checkpointing", size="8B", group="speed", distill=large)
    yield Case("one document a row", size="1.7B", group="speed", whole_rows=True)
    both = {"size": "1.7B", "group": "speed", "whole_rows": True}
    for name, trl in (
        ("TRL, Liger", {"liger": True}),
        ("TRL, bf16 weights, Liger", {"liger": True, "weights": "bfloat16"}),
        ("TRL", {}),
    ):
        yield Case(name, kind="trl", trl=trl, **both)


def _losses() -> Iterator[Case]:
    same: dict[str, Any] = {"size": "small", "group": "losses", "steps": 4, "steps_s": 60}
    exact = {"precision": "float32", "deepspeed": "deepspeed/zero0.json"}
    yield Case("losses, CPU, float32", on_cpu=True, distill=exact, recipe={"dtype": "float32"}, limit_s=120, **same)
    yield Case("losses, float32", distill=exact, recipe={"dtype": "float32"}, **same)
    yield Case("losses, bf16 autocast", **same)


def _attention() -> Iterator[Case]:
    for attention in ("auto", "flash", "flex", "sdpa", "eager"):
        yield Case(f"attention {attention}", size="1.7B", recipe={"attention": attention}, limit_s=90)


def _weights_and_kernels() -> Iterator[Case]:
    where: dict[str, Any] = {"size": "1.7B", "group": "kernels", "limit_s": 120}
    yield Case("weights bfloat16", distill={"weights": "bfloat16"}, **where)
    yield Case("fused", distill={"fused": True}, **where)
    yield Case("compile", distill={"compile": True}, **where)
    yield Case("all of these", distill={"weights": "bfloat16", "fused": True, "compile": True}, **where)


def _memory() -> Iterator[Case]:
    for stage in (0, 1, 2, 3):
        yield Case(f"ZeRO {stage}", group="memory", distill={"deepspeed": f"deepspeed/zero{stage}.json"})
    plain = {"deepspeed": "deepspeed/zero0.json"}
    selective = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
    four_bits = {"lora": {"rank": 16, "quantization": "nf4"}}
    yield Case("ZeRO 0, checkpointing", group="memory", distill=plain | CHECKPOINTING)
    yield Case("ZeRO 0, LoRA", group="memory", distill=plain | {"lora": {"rank": 16}})
    yield Case("ZeRO 0, nf4", group="memory", distill=plain | four_bits)
    yield Case(
        "ZeRO 2, optimizer on host", group="memory", distill={"deepspeed": "deepspeed/zero2_offload.json"}, limit_s=90
    )
    yield Case("ZeRO 3, all on host", group="memory", distill={"deepspeed": "deepspeed/zero3_offload.json"}, limit_s=90)
    yield Case("ZeRO 0, selective checkpointing", group="memory", distill=plain | {"trainer": selective})
    yield Case("ZeRO 0, from the first cut up", group="memory", distill=plain | FROM_THE_CUT)


def _large() -> Iterator[Case]:
    plain = {"deepspeed": "deepspeed/zero0.json"} | CHECKPOINTING
    for name, lora in (("LoRA", {"rank": 16}), ("nf4", {"rank": 16, "quantization": "nf4"})):
        yield Case(f"{name}, checkpointing", size="8B", group="speed", distill=plain | {"lora": lora}, limit_s=90)


def recipe_of(case: Case, size: Size, folder: Path) -> dict[str, Any]:
    """The recipe of a training, whose model is the configuration in ``folder``."""
    settings: dict[str, Any] = {"precision": "bfloat16", "watch": None, **ZERO_2, **case.distill}
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
