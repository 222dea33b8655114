"""Text a model writes, token by token. P prompts, T new tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from shoal.inference.generation import Drawn, DrawnOnly
from shoal.models.anatomy import decoder_layers


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
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=uniforms_PT.shape[1],
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    drawn = Drawn(uniforms_PT.to(device), temperature, top_p)
    with _writing(model), torch.no_grad():
        written = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([DrawnOnly(drawn)]),
            synced_gpus=False,  # the model is whole on every rank: none has to wait for another's longer text
        )
    return [_ended(row, end_ids) for row in written[:, width:].tolist()]


def end_tokens(configured: GenerationConfig | None, tokenizer_end: Any) -> tuple[int, ...]:
    """What ends a text: the tokenizer's end token and those of the model's generation configuration."""
    ends = getattr(configured, "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    return tuple(dict.fromkeys(int(end) for end in (tokenizer_end, *listed) if end is not None))


@contextlib.contextmanager
def own_forwards(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model, its head and its layers run as their classes say, whatever forward was put on these instances:
    layers compiled for rows of one length would be compiled again for every token that is written."""
    head = model.get_output_embeddings()
    modules = (model, *([] if head is None else [head]), *decoder_layers(model))
    installed = [(module, module.__dict__.pop("forward")) for module in modules if "forward" in vars(module)]
    try:
        yield
    finally:
        for module, forward in installed:
            module.__dict__["forward"] = forward


@contextlib.contextmanager
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


@contextlib.contextmanager
def checkpointing_kept(student: PreTrainedModel) -> Iterator[None]:
    """Who turns checkpointing off inside and on again, as TRL does where text is written, leaves it as it was.

    TRL turns it on for every layer, and does not know `every_n_layers` and `offload`, which transformers takes out of
    `gradient_checkpointing_kwargs`.
    """
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (module, name, getattr(module, name)) for module in student.modules() for name in names if hasattr(module, name)
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
