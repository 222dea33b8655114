"""How low-rank adapters are trained: the recipe's section `distill.lora`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shoal.recipe.section import Positive, Section, Shapes, Text


@dataclass(frozen=True)
class Lora(Section):
    """Train two small matrices beside each weight instead of the weight (LoRA, Hu et al. 2021, arXiv:2106.09685).

    Their product is merged into the weights when the student is written, so that distilled/ is a plain checkpoint.
    """

    rank: Annotated[Positive, Shapes.TRAINING] = 16
    """Rows of the one matrix and columns of the other."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False), Shapes.TRAINING] = 32.0
    """The adapters' product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1), Shapes.TRAINING] = 0.0
    """Share of the adapters' inputs set to zero. The draws differ with the number of ranks, so the curve does too."""
    target_modules: Annotated[Annotated[tuple[Text, ...], Field(min_length=1)] | None, Shapes.TRAINING] = None
    """Linear modules that get an adapter, by the end of their names (`q_proj`, `mlp.down_proj`), in those layers that
    distill.trainable trains; None = all of them there."""
    quantization: Annotated[Literal["none", "nf4"], Shapes.TRAINING] = "none"
    """nf4: frozen weights of the layers are held in 4 bits while training (QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314); needs bitsandbytes. Adapters are merged into the weights as they were before that."""
