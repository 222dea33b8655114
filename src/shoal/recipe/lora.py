"""How low-rank adapters are trained: the recipe's section `distill.lora`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shoal.recipe.section import Positive, Section, Text


@dataclass(frozen=True)
class Lora(Section):
    """Train two small matrices beside each weight instead of the weight (LoRA, Hu et al. 2021, arXiv:2106.09685).

    Their product is merged into the weights when the student is written, so that distilled/ is a plain checkpoint.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """The adapters' product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what goes into the adapters. The draws differ with the number of ranks, so the curve does too."""
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Linear modules that get an adapter, by the end of their names (`q_proj`, `mlp.down_proj`), in those layers that
    distill.trainable trains; None = all of them there."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: frozen weights of the layers are held in 4 bits while training (QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314); needs bitsandbytes. Adapters are merged into the weights as they were before that."""
