"""How often each head looks at the token that is copied next.

Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv:2404.15574, section 2): a head
copies a token if, where that token is written, the head's most attended token is the same one within the needle; its
score is the share of the needle's tokens that it copies. Here the needle is the value that is asked for, the attended
token has to stand at the copied one's own place in it, and the text is the right answer: only prompts count for which
it is what the model writes greedily, which the same forward tells.

B batch, S sequence, T tokens to copy, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.compress.edits.sublayers import probing
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.models.anatomy import decoder_layers, text_config
from shoal.progress import each

from .attention_calls import AttentionInputs, attention_calls, attention_weights
from .prompts import CopyPrompt

REMEDY = "this part has nothing to say of it"


@dataclass(frozen=True)
class HeadScores:
    """What the heads copy."""

    num_right: int
    """Prompts that the model answers right."""
    scores: tuple[tuple[float, ...], ...]
    """By layer and query head, mean over these prompts; a layer without softmax attention has none."""


def score_heads(model: PreTrainedModel, prompts: Sequence[CopyPrompt], *, batch_size: int) -> HeadScores:
    """The score of every head, from one forward over the prompts.

    Raises:
        UserError: a family without softmax attention or with one that shoal cannot look into, or a model that answers
            no prompt right.
    """
    decoder, num_layers = Decoder(model), len(decoder_layers(model))
    sums: dict[int, Tensor] = {}
    num_right = 0
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))
    with probing(model):
        for start in each(range(0, len(ordered), batch_size), "heads", unit="batches"):
            right_B, copied = _copied(model, decoder, ordered[start : start + batch_size])
            num_right += int(right_B.sum())
            for layer, share_BH in copied.items():
                total_H = share_BH[right_B].double().sum(0).cpu()
                sums[layer] = sums[layer] + total_H if layer in sums else total_H
    if not num_right:
        raise UserError(
            f"shoal lab heads: the model answers none of {len(prompts)} prompts right, so no head can be seen copying"
        )
    return HeadScores(
        num_right,
        tuple(tuple((sums[layer] / num_right).tolist()) if layer in sums else () for layer in range(num_layers)),
    )


def _copied(
    model: PreTrainedModel, decoder: Decoder, prompts: Sequence[CopyPrompt]
) -> tuple[Tensor, dict[int, Tensor]]:
    """(B,) Which prompts are answered right, and by layer (B, H) the share of their needles' tokens that heads copy."""
    family, device = text_config(model.config).model_type, decoder.device
    ids_BS = decoder.right_padded([prompt.input_ids[:-1] for prompt in prompts])
    width = max(len(prompt.needle) for prompt in prompts)
    needle_BT, answer_BT, places_BT = (
        torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device=device)
        for rows in (
            [prompt.needle for prompt in prompts],
            [prompt.answer for prompt in prompts],
            # a token is predicted one place before its own
            [range(len(p.input_ids) - len(p.needle) - 1, len(p.input_ids) - 1) for p in prompts],
        )
    )
    is_token_BT = places_BT >= 0
    places_BT = places_BT.clamp(min=0)
    copied: dict[int, Tensor] = {}

    def look(layer: int, inputs: AttentionInputs) -> None:
        if inputs.key_BGSd.shape[2] != ids_BS.shape[1]:
            raise UserError(f"{family}: layer {layer} attends to keys that are no single tokens; {REMEDY}")
        most_BHT = attention_weights(inputs, places_BT).argmax(-1)
        # padded places hold -1 as their needle, where no key is
        copied[layer] = (most_BHT == needle_BT[:, None]).sum(-1) / is_token_BT.sum(-1)[:, None]

    with attention_calls(model, range(len(decoder_layers(model))), look, remedy=REMEDY):
        hidden_BSD = decoder.hidden(ids_BS)
    if not copied:
        raise UserError(
            "shoal lab heads: asked of a family without softmax attention, or with one of its own: "
            f"{family} hands no queries and keys to transformers' attention interface; {REMEDY}"
        )
    hidden_BTD = hidden_BSD[torch.arange(len(prompts), device=device)[:, None], places_BT]
    written_BT = decoder.logits(hidden_BTD.flatten(0, 1)).argmax(-1).view_as(answer_BT)
    return ((written_BT == answer_BT) | ~is_token_BT).all(-1), copied
