"""Text after many prompts at once, with as little as possible computed, read and moved.

What transformers' generate does, as lm-eval's class calls it: every prompt is read whole, examples included, and padded
to the longest of its batch; a row that is finished is written on until the last one is. Here beginnings that prompts
share are read once (prefix_sharing.py), and rows leave the batch as soon as they are finished. What stays is what a
token needs: the weights once per step for all rows, and each row's keys and values.

Held at one time are the keys and values of at most 2 x batch size rows (beginnings and texts under way), each as long
as prompt and text; while rows leave, those of one layer twice.

B batch, S sequence, P prompts, T new tokens, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from shoal.inference.decoder import Decoder, branched
from shoal.inference.prefix_sharing import Reader, Start
from shoal.runtime import queued


def draw(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token per row, (B,): the inverse of the row's distribution function at its uniform number.

    ``temperature`` 0 takes the likeliest; of the likeliest tokens the fewest that hold the share ``top_p`` are drawn
    from. In float64, where rounding in a sum over a large vocabulary does not shift what is drawn.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    chances_BV = torch.softmax(logits_BV.double() / temperature, -1)
    if top_p < 1:
        sorted_BV, order_BV = chances_BV.sort(-1, descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # the token that passes the border stays
        chances_BV = chances_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), 0.0)
    cumulative_BV = chances_BV.cumsum(-1)
    at_B1 = (uniforms_B.double() * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, at_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


@dataclass
class Texts:
    """Texts under way, with what each row has cached, and the tokens it has not been through yet."""

    cache: DynamicCache
    pads: list[int]
    """Columns of padding before each row's first token."""
    width: int
    """Columns of the cache and the new tokens."""
    ids_BS: Tensor
    positions_BS: Tensor
    alive: list[int]
    """Index of the text that each row writes."""
    written: list[list[int]]
    """New tokens of every text, finished ones too."""


def write_after(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    is_finished: Callable[[list[int]], bool],
    start: Start | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, the one that finished it included.

    ``is_finished`` sees a row's new tokens after every one of them. ``start`` is the beginning of these prompts, read
    already.
    """
    if start is None:
        start = Reader(decoder, ()).start([tuple(prompt) for prompt in prompts], [0] * len(prompts))
    texts = Texts(
        decoder.new_cache() if start.cache is None else start.cache,
        list(start.pads),
        start.width,
        start.ids_BS,
        start.positions_BS,
        list(range(len(prompts))),
        [[] for _ in prompts],
    )
    write(decoder, texts, max_new_tokens=max_new_tokens, is_finished=is_finished)
    return texts.written


def write(
    decoder: Decoder,
    texts: Texts,
    *,
    max_new_tokens: int,
    is_finished: Callable[[list[int]], bool],
    before_step: Callable[[list[int]], object] = lambda alive: None,
) -> None:
    """Go on with every row of ``texts`` until it is finished or has ``max_new_tokens`` in all.

    ``before_step`` is told which texts the rows of the next forward belong to.
    """
    while texts.alive:
        before_step(texts.alive)
        token_B = _forward(decoder, texts).argmax(-1)
        kept = []
        for row, (text, token) in enumerate(zip(texts.alive, token_B.tolist(), strict=True)):
            texts.written[text].append(token)
            if not is_finished(texts.written[text]) and len(texts.written[text]) < max_new_tokens:
                kept.append(row)
        if not kept:
            break
        position_B = texts.positions_BS[:, -1]
        if len(kept) < len(texts.alive):
            rows = queued(torch.tensor(kept), decoder.device)
            texts.alive, texts.pads = ([of_rows[row] for row in kept] for of_rows in (texts.alive, texts.pads))
            token_B, position_B = token_B[rows], position_B[rows]
            cache = texts.cache
            texts.cache = branched(cache, rows)
            cache.layers.clear()  # whoever began the texts may hold it still
        texts.ids_BS, texts.positions_BS = token_B.unsqueeze(1), position_B.unsqueeze(1) + 1
        texts.width += 1


def _forward(decoder: Decoder, texts: Texts) -> Tensor:
    """fp32 logits (B, V) of what comes after the new tokens."""
    last_1S = torch.arange(texts.ids_BS.shape[1], device=decoder.device).unsqueeze(0) == texts.ids_BS.shape[1] - 1
    mask = decoder.mask_behind(texts.pads, texts.width)
    hidden_BSD = decoder.hidden(
        texts.ids_BS, mask=mask, position_ids_BS=texts.positions_BS, cache=texts.cache, answer_BS=last_1S
    )
    return decoder.logits(hidden_BSD[:, -1])  # rows end together


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

    def length(self, tokens: list[int]) -> int:
        """How many of ``tokens`` there were when a stop string was whole; all, if none is."""
        first = bisect_left(range(len(tokens)), True, key=lambda count: self._contains_stop(tokens[:count]))
        return min(first, len(tokens))

    def _contains_stop(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in self._stop)


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms_PT: Tensor,
    *,
    temperature: float,
    top_p: float = 1.0,
    end_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """What ``model`` writes after every prompt: up to T tokens, the last of them an end token where it came to one.

    Sampled from the model's own distribution at ``temperature`` (0 = always the likeliest token); what the checkpoint's
    generation configuration says of penalties and filters is not looked at. The chance is in ``uniforms_PT``, numbers
    from [0, 1), one for every token: a text depends on its own numbers and not on its neighbours in the batch, so the
    same texts come out however prompts are dealt to batches and ranks.
    """
    width = max(map(len, prompts))
    device = model.device
    ids = queued(torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]), device)
    mask = queued(torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]), device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=uniforms_PT.shape[1],
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    drawn = _DrawnOnly(queued(uniforms_PT, device), temperature, top_p)
    with _writing(model), torch.no_grad():
        written = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([drawn]),
            synced_gpus=False,  # the model is whole on every rank: none has to wait for another's longer text
        )
    return [_ended(row, end_ids) for row in written[:, width:].tolist()]


def end_tokens(configured: GenerationConfig | None, tokenizer_end: Any) -> tuple[int, ...]:
    """What ends a text: the tokenizer's end token and those of the model's generation configuration."""
    ends = getattr(configured, "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    return tuple(dict.fromkeys(int(end) for end in (tokenizer_end, *listed) if end is not None))


class _DrawnOnly(LogitsProcessor):
    """Leaves transformers' greedy `generate` nothing but the drawn token to take."""

    def __init__(self, uniforms_PT: Tensor, temperature: float, top_p: float) -> None:
        self._uniforms, self._temperature, self._top_p = iter(uniforms_PT.unbind(1)), temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        chosen_B = draw(scores, next(self._uniforms), temperature=self._temperature, top_p=self._top_p)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen_B[:, None], 0.0)


@contextmanager
def _writing(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without the generation settings that `generate` would fill in from the checkpoint."""
    training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = settings


def _ended(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """Up to and with the first end token; what follows is padding."""
    stops = (index for index, token in enumerate(tokens) if token in end_ids)
    return tokens[: next(stops, len(tokens) - 1) + 1]
