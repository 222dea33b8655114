"""Run a model's decoder from any layer on, and read states through its head: what depth diagnostics are made of.

Every intervention on depth (a layer skipped at some tokens, a state erased) is a
changed state at the door of one layer. What lies below is known from the intact run and is not computed again.

B batch, S sequence, D hidden, V vocabulary, L layers, T chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.compress.edits.sublayers import probe_ids, probing
from shoal.compress.variants.layerwise import Call, Layerwise
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_body, decoder_layers, given_state, state_of, text_config, watched
from shoal.models.document_masks import documents_apart
from shoal.models.load import logits_from_hidden, not_finite_in

MAX_LOGITS = 1 << 22
"""Entries (tokens times vocabulary) of one logits tensor."""
TOP = 5
"""Tokens of the lens that are compared."""

Prompt = tuple[int, ...]
"""One text as tokens."""
Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a layer's index, its input and its output."""


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, on the CPU; what is no real token counts nowhere and is seen by no real token."""

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    real_BS: Tensor


@dataclass(frozen=True)
class Intact:
    """An unchanged run."""

    states: list[Tensor]
    """L + 1 tensors (B, S, D): what enters every layer, and last what leaves the last one, before the final norm."""
    calls: tuple[Call, ...]
    """Calls of the layers over these tokens."""


def batches_of_rows(rows: PackedRows, batch_size: int) -> list[TokenBatch]:
    """The rows in order."""
    parts = (part.long().split(batch_size) for part in (rows.input_ids_NS, rows.position_ids_NS))
    return [
        TokenBatch(ids, positions, torch.ones_like(ids, dtype=torch.bool))
        for ids, positions in zip(*parts, strict=True)
    ]


def batch_of_prompts(prompts: Sequence[Prompt]) -> TokenBatch:
    """The prompts as rows, padded on the right."""
    width = max(len(prompt) for prompt in prompts)
    ids_BS = torch.zeros(len(prompts), width, dtype=torch.long)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    for row, prompt in zip(ids_BS, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    index_S = torch.arange(width)
    real_BS = index_S < lengths_B[:, None]
    # positions of padding start again at 0, as those of another document do
    return TokenBatch(ids_BS, torch.where(real_BS, index_S, index_S - lengths_B[:, None]), real_BS)


def documents(rows: PackedRows, *, num_prompts: int, max_tokens: int, min_tokens: int) -> list[Prompt]:
    """The first ``num_prompts`` documents of the rows that have ``min_tokens``, cut at ``max_tokens``."""
    prompts: list[Prompt] = []
    for ids_S, positions_S in zip(rows.input_ids_NS, rows.position_ids_NS, strict=True):
        starts = sorted({0, *(positions_S == 0).nonzero().flatten().tolist()})
        for start, end in zip(starts, [*starts[1:], len(ids_S)], strict=True):
            if len(prompts) == num_prompts:
                return prompts
            if end - start >= min_tokens:
                prompts.append(tuple(ids_S[start : min(end, start + max_tokens)].tolist()))
    return prompts


class DepthRuns:
    """One model's intact runs and its runs from a layer on.

    Raises:
        UserError: an architecture whose layers share more than the state that they pass on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layerwise = Layerwise(model)
        self.num_layers = self.layerwise.num_layers

    def intact(self, batch: TokenBatch) -> Intact:
        """The states of an unchanged run."""
        prepared = self.layerwise.prepare(body_inputs(self.model, batch))
        states = [prepared.hidden_BSD]
        for layer, call in enumerate(prepared.calls):
            states.append(self.layerwise.run(layer, states[-1], call))
        return Intact(states, prepared.calls)

    def run_from(self, start: int, state_BSD: Tensor, calls: Sequence[Call], observe: Observer | None = None) -> Tensor:
        """Output (B, S, D) of the last layer when ``state_BSD`` enters layer ``start``; L = leaves the last one.

        ``calls`` are those of an intact run over rows of the same tokens.
        """
        for layer in range(start, self.num_layers):
            # a copy goes in: some layers write into what they get
            after_BSD = calls[layer].of(self.layerwise.layers[layer], state_BSD.clone())
            if observe is not None:
                observe(layer, state_BSD, after_BSD)
            state_BSD = after_BSD
        return state_BSD


class Readout:
    """The way from raw states to logits: the final norm, the head, and what the family does behind it."""

    def __init__(self, model: PreTrainedModel) -> None:
        parts = anatomy(model)
        self.norm, self.head = parts.final_norm, parts.head
        self._logits = logits_from_hidden(model)
        self.vocab_size = int(text_config(model.config).vocab_size)
        self.max_logits = MAX_LOGITS

    def __call__(self, states_TD: Tensor) -> Tensor:
        """Float32 logits (T, V)."""
        assert self.head is not None
        normed = states_TD if self.norm is None else self.norm(states_TD)
        return self._logits(normed, self.head).float()

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Slices of tokens whose logits stay below the bound."""
        step = max(1, self.max_logits // self.vocab_size)
        return (slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step))


def lens_terms(readout: Readout, states_LTD: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(L, T) KL(p_l || p_final) in nats and (L, T) share of top-5 tokens in common, float64 on the CPU.

    ``states_LTD`` are L states before the layers and last the one behind the last layer. The intermediate distribution
    comes first in the divergence (arXiv:2512.14064).
    """
    *inputs, final_TD = states_LTD
    divergence = torch.empty(len(inputs), len(final_TD), dtype=torch.float64)
    overlap = torch.empty_like(divergence)
    for chunk in readout.chunks(len(final_TD)):
        final_TV = readout(final_TD[chunk]).log_softmax(-1)
        final_top = final_TV.topk(TOP, dim=-1).indices  # (T, 5)
        for layer, state_TD in enumerate(inputs):
            log_TV = readout(state_TD[chunk]).log_softmax(-1)
            top = log_TV.topk(TOP, dim=-1).indices
            # (T, 5, 5) -> is each token of one list in the other -> share of the five
            overlap[layer, chunk] = (top[:, :, None] == final_top[:, None, :]).any(-1).double().mean(-1).cpu()
            # summed in float64: a difference of two near-equal distributions, over a large vocabulary
            divergence[layer, chunk] = (log_TV.exp() * (log_TV - final_TV)).sum(-1, dtype=torch.float64).cpu()
    return divergence, overlap


def output_changes(readout: Readout, intact_TD: Tensor, changed: Sequence[Tensor]) -> Tensor:
    """(N, T) Euclidean distance between the intact next-token probabilities and those of each of N changed states."""
    distances = torch.zeros(len(changed), len(intact_TD), dtype=torch.float64)
    for chunk in readout.chunks(len(intact_TD)):
        intact_TV = readout(intact_TD[chunk]).softmax(-1)
        for index, changed_TD in enumerate(changed):
            difference_TV = readout(changed_TD[chunk]).softmax(-1) - intact_TV
            distances[index, chunk] = difference_TV.norm(dim=-1).double().cpu()
    return distances


def readout_refusal(model: PreTrainedModel) -> str:
    """Why states cannot be read through final norm and head alone; empty = the model's own logits come out."""
    family = text_config(model.config).model_type
    if anatomy(model).head is None:
        return f"{family}: has no output head that shoal knows"
    last: list[Tensor] = []
    with probing(model):
        with decoder_layers(model)[-1].register_forward_hook(
            lambda *hook_args: last.append(state_of(hook_args[-1]).clone())
        ):
            logits_TV = model(**body_inputs(model, probe_batch(model))).logits[0].float()
        last_TD = last[0][0]
        known = last_TD.shape[-1] == text_config(model.config).hidden_size
        read_TV = Readout(model)(last_TD) if known else last_TD  # several streams side by side, merged by the model
    # the model may compute all tokens at once and in another order: a few roundings, not a missing step
    tolerance = 64 * torch.finfo(model.dtype).eps * float(logits_TV.abs().max())
    if read_TV.shape != logits_TV.shape or float((read_TV - logits_TV).abs().max()) > tolerance:
        return f"{family}: does more between its last layer and its logits than the final norm and the head"
    return ""


def probe_batch(model: PreTrainedModel) -> TokenBatch:
    """One row of a few tokens."""
    ids_BS = probe_ids(model).cpu()
    return TokenBatch(ids_BS, torch.arange(ids_BS.shape[1])[None], torch.ones_like(ids_BS, dtype=torch.bool))


def body_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """Keyword arguments for the model or its body."""
    return {
        "input_ids": batch.input_ids_BS.to(model.device),
        "position_ids": batch.position_ids_BS.to(model.device),
        "use_cache": False,
    }


def run_body(model: PreTrainedModel, batch: TokenBatch) -> None:
    """One forward over ``batch`` up to the last layer, for those who watch it with hooks."""
    decoder, layers = decoder_body(model), decoder_layers(model)
    body = decoder if any(module is layers for module in decoder.modules()) else model  # ModernBERT's names its head
    inputs = body_inputs(model, batch)
    with documents_apart(decoder, inputs["position_ids"]):
        body(**inputs)


@contextmanager
def states_at(layers: nn.ModuleList, places: Any = ...) -> Iterator[list[Tensor]]:
    """Raw states before every one of ``layers`` and last behind the last one; ``places`` are rows and columns, (T,)
    each, of the tokens in (B, S) whose (T, D) they are, by default all.

    The list holds its L + 1 entries once a forward has run inside the block.
    """
    states = list[Tensor]()

    def before(_: int, args: Any, kwargs: Any) -> None:
        states.append(given_state(args, kwargs)[places])

    def after(_: int, __: Any, ___: Any, output: Any) -> None:
        states.append(state_of(output)[places])

    with watched(layers, before=before), watched(layers[-1:], after=after):
        yield states


def require_one_path(model: PreTrainedModel) -> None:
    """Refuse a model in which depth is not one path of states, one per token, through every layer once."""
    batch, shapes, order = probe_batch(model), list[tuple[int, ...]](), list[int]()
    layers = decoder_layers(model)

    def before(index: int, args: Any, kwargs: Any) -> None:
        order.append(index)
        shapes.append(tuple(given_state(args, kwargs).shape))

    with watched(layers, before=before), probing(model):
        run_body(model, batch)
    family, remedy = text_config(model.config).model_type, "its depth cannot be diagnosed, leave this part out"
    per_token = all(len(shape) == 3 and shape[:2] == batch.input_ids_BS.shape for shape in shapes)
    if order != list(range(len(layers))) or not per_token:
        raise UserError(
            f"diagnostics: {family} runs its layers in the order {order}, with states of shape {shapes[0]}, not one "
            f"per token through every layer; {remedy}"
        )


def require_finite(model: PreTrainedModel, what: str, *values: Tensor) -> None:
    """Refuse numbers of ``what`` that have overflowed."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise UserError(f"{what}: the model's states overflow {not_finite_in(model.dtype)}")
