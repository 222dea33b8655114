"""What models answer to random rows."""

from __future__ import annotations

import torch
from tiny import SLIDING_WINDOW
from torch import Tensor
from transformers import PreTrainedModel


def logits(model: PreTrainedModel) -> Tensor:
    """Logits of random rows three times as long as the sliding window."""
    input_ids = torch.randint(0, 256, (2, 3 * SLIDING_WINDOW), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=input_ids, use_cache=False).logits
