"""What becomes of results: quantised copies, W&B, the Hub; the recipe's sections `quantize`, `track` and `export`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from shoal.recipe.section import Positive, Section, Shapes

TorchaoFormat = Literal["int8", "int4", "float8"]
"""Weights alone, by torchao."""
BitsandbytesFormat = Literal["nf4", "bnb_int8"]
CompressorFormat = Literal["w4a16_gptq", "w4a16_awq", "fp8"]
"""By llm-compressor, as compressed-tensors, which vLLM reads."""
GgufFormat = Literal["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k"]
"""One GGUF file, by llama.cpp's quantiser."""
Format = Literal[TorchaoFormat, BitsandbytesFormat, CompressorFormat, GgufFormat]


@dataclass(frozen=True)
class Quantize(Section):
    """Quantised copies that are made after healing, and scored beside the models they are made of."""

    format: Annotated[Format, Shapes.QUANTIZED] = "int8"
    """Format of the student: int8, int4, float8 (torchao, weights alone), nf4, bnb_int8 (bitsandbytes), w4a16_gptq,
    w4a16_awq, fp8 (llm-compressor), or q8_0, q4_k_m and the like (a GGUF file, by llama.cpp)."""
    teacher_format: Annotated[Literal["same", "none", Format], Shapes.QUANTIZED] = "same"
    """Format of the teacher that the student has to beat, of the same engine: same as the student's; one of fewer bits
    brings both to about equal bytes. none = the teacher is not quantised."""
    group_size: Annotated[Positive, Shapes.QUANTIZED] = 128
    """Weights of a row that share a scale, in int4, w4a16_gptq and w4a16_awq."""
    num_tokens: Annotated[Positive, Shapes.QUANTIZED] = 500_000
    """Tokens of the training text that w4a16_gptq and w4a16_awq are calibrated on, in rows of
    distill.sequence_length."""

    def format_of(self, role: str) -> Format | None:
        """The format of the role `quantized` or `teacher_quantized`; None = there is no such role."""
        if role == "quantized" or self.teacher_format == "same":
            return self.format
        return None if self.teacher_format == "none" else self.teacher_format


def is_gguf(format: str) -> bool:
    """Whether a format is one of llama.cpp's, and scored by it."""
    return format in get_args(GgufFormat)


@dataclass(frozen=True)
class Track(Section):
    """Where curves, scores, figures and reports go: Weights & Biases. The run has the name of its directory, or
    WANDB_NAME."""

    wandb: Literal["online", "offline", "off"] | None = None
    """None = online where somebody is logged in to W&B (a key in the environment or of `wandb login`),
    offline after WANDB_MODE=offline, else off."""
    project: str = "shoal"
    """W&B project."""
    tags: tuple[str, ...] = ()
    """Tags of the W&B run."""


@dataclass(frozen=True)
class Export(Section):
    """Where the result is published."""

    hub_repo: str | None = None
    """`owner/name` on the Hub to push the distilled checkpoint and its model card to."""
    private: bool = True
    """Make a new repository private; one that is there already and public is refused."""
    gguf: bool = False
    """Write the result as one GGUF file too, for llama.cpp, in the precision it is stored in."""


def contradictions(quantize: Quantize | None, export: Export) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express."""
    other = None if quantize is None else quantize.format_of("teacher_quantized")
    if quantize is not None and other is not None and is_gguf(other) != is_gguf(quantize.format):
        engines = ["llama.cpp" if is_gguf(format) else "transformers" for format in (other, quantize.format)]
        yield (
            f"quantize.teacher_format: {other} is scored by {engines[0]} and quantize.format {quantize.format} by "
            f"{engines[1]}, so that nothing could be said of the two; name formats of one engine"
        )
    if export.hub_repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", export.hub_repo):
        yield f"export.hub_repo: must have the form owner/name (got {export.hub_repo!r})"
