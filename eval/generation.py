"""Greedy text for many prompts at once: rows leave the batch as soon as they are finished.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .decoder import Decoder, branched


def generate_greedily(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    is_finished: Callable[[list[int]], bool],
) -> list[list[int]]:
    """The new tokens of each prompt, the one that finished it included.

    ``is_finished`` sees a row's new tokens after every one of them.
    """
    ids, mask_BS, positions_BS = decoder.left_padded(prompts)
    cache = decoder.new_cache()
    written: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    next_position = positions_BS[:, -1:]
    for step in range(max_new_tokens):
        hidden_BSD = decoder.hidden(ids, mask=mask_BS, position_ids_BS=positions_BS, cache=cache)
        token_B = decoder.logits(hidden_BSD[:, -1]).argmax(dim=-1)
        kept = []
        for row, (prompt, token) in enumerate(zip(alive, token_B.tolist(), strict=True)):
            written[prompt].append(token)
            if not is_finished(written[prompt]):
                kept.append(row)
        if not kept or step == max_new_tokens - 1:
            break
        if len(kept) < len(alive):
            rows = torch.tensor(kept, device=decoder.device)
            cache, mask_BS = branched(cache, rows), mask_BS[rows]
            token_B, next_position = token_B[rows], next_position[rows]
            alive = [alive[row] for row in kept]
        next_position = next_position + 1
        ids, positions_BS = token_B.unsqueeze(1), next_position
        mask_BS = torch.cat([mask_BS, torch.ones_like(ids)], dim=1)
    return written


class Finish:
    """Whether a row is done: it wrote an end token or one of the stop strings."""

    def __init__(self, tokenizer: Any, end_ids: set[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._end_ids = tokenizer, end_ids
        self._stop = [text for text in stop if text]
        # four bytes make a character and a byte may be a token; the few more are for a first one cut in half
        self._window = 4 * max(map(len, self._stop), default=0) + 4

    def __call__(self, tokens: list[int]) -> bool:
        if tokens[-1] in self._end_ids:
            return True
        if not self._contains_stop(tokens[-self._window :]):
            return False
        # what stands at the edge of the window may decode differently inside the text
        return len(tokens) <= self._window or self._contains_stop(tokens)

    def _contains_stop(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in self._stop)
