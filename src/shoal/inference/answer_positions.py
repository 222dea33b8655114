"""Which positions of a forward predict an answer, told by whoever runs the model to edits that hold at some of them.

An answer position is one whose next token is scored or written: from the last token of the prompt on. The positions
before it only read. Neither ids nor masks show where a prompt ends, so scoring and writing say it, forward by forward.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.errors import UserError

_told: WeakKeyDictionary[PreTrainedModel, Tensor | int] = WeakKeyDictionary()


@contextmanager
def answers_at(model: PreTrainedModel, positions: Tensor | int | None) -> Iterator[None]:
    """Say of the forwards of ``model`` inside the block which positions predict an answer: (B or 1, S), bool.

    A number is the length of prompts that end together, after which text is written: forwards as long as that hold the
    prompts, with or without a text behind them, and shorter ones text alone. None says nothing.
    """
    before = _told.pop(model, None)
    if positions is not None:
        _told[model] = positions
    try:
        yield
    finally:
        _told.pop(model, None)
        if before is not None:
            _told[model] = before


def answer_positions(model: PreTrainedModel, num_positions: int) -> Tensor:
    """(B or 1, S) True at the positions of the running forward that predict an answer.

    Raises:
        UserError: nobody has said so, or of a forward of another length.
    """
    told = _told.get(model)
    if isinstance(told, int):
        columns_S = torch.arange(num_positions, device=model.device)
        return (columns_S >= (told - 1 if num_positions >= told else 0)).unsqueeze(0)
    if told is None or told.shape[1] != num_positions:
        raise UserError(
            f"skip_prompt and skip_written: nothing says where the prompts of these {num_positions} positions end; "
            "score and write with shoal's Decoder, or run the model inside answers_at()"
        )
    return told
