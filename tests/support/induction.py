"""An attention-only model built by hand that goes on as a text went on before: an induction head and its helper.

PREVIOUS writes which token stood before, by its rotary phase. COPYING looks for the place behind an earlier occurrence
of the current token, and writes the token there. All other heads and all MLPs are zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from shoal.lab.attention.prompts import CopyPrompt, Counterparts

NUM_TOKENS = 20
PREVIOUS, COPYING = (0, 0), (1, 0)
ALWAYS, TOKEN, BEFORE, NEXT = 0, 1, 1 + NUM_TOKENS, 1 + 2 * NUM_TOKENS
"""First coordinates of the residual stream."""
WIDTH = 64
HEAD = 64
THETA = 1e8
FAST, SLOW = 16, 20
"""Rotary pairs below the one turn with the position, from the other on they hardly do."""
KEY, LENGTH = 19, 14
"""The token that is asked for, and tokens before it is asked for."""


@torch.no_grad()
def induction_model() -> PreTrainedModel:
    """The model that the module describes, in float32."""
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    previous, copying = (layer.self_attn for layer in model.model.layers)
    model.model.embed_tokens.weight[:, ALWAYS] = 1.0
    for pair in range(FAST):
        turn = THETA ** (-2 * pair / HEAD)
        # the query is turned back by one place, so that it meets the key of the place before in phase
        previous.k_proj.weight[pair, ALWAYS] = 1.0
        previous.q_proj.weight[pair, ALWAYS] = 8 * math.cos(turn)
        previous.q_proj.weight[pair + HEAD // 2, ALWAYS] = -8 * math.sin(turn)
    for token in range(NUM_TOKENS):
        model.model.embed_tokens.weight[token, TOKEN + token] = 1.0
        previous.v_proj.weight[token, TOKEN + token] = 1.0
        previous.o_proj.weight[BEFORE + token, token] = 1.0
        # twelve slow pairs of coordinates hold twenty tokens
        place = SLOW + token if token < 12 else HEAD // 2 + SLOW + token - 12
        copying.q_proj.weight[place, TOKEN + token] = 16.0
        copying.k_proj.weight[place, BEFORE + token] = 16.0
        copying.v_proj.weight[token, TOKEN + token] = 1.0
        copying.o_proj.weight[NEXT + token, token] = 1.0
        model.lm_head.weight[token, NEXT + token] = 8.0
    return model.eval()


def copy_prompt(at: int, value: tuple[int, ...] = (16, 17, 18)) -> CopyPrompt:
    """LENGTH tokens, none of them twice, among them the key at ``at`` and its value behind it; then the key again."""
    others = [*range(LENGTH - 1 - len(value))]
    data = [*others[:at], KEY, *value, *others[at:]]
    return CopyPrompt((*data, KEY, *value), tuple(range(at + 1, at + 1 + len(value))), LENGTH)


def pair_of(at: int) -> Counterparts:
    """A prompt of copy_prompt and one with another value; a filler stands between data and question."""
    clean, corrupted = (copy_prompt(at, value).input_ids[: LENGTH + 1] for value in ((16, 17, 18), (14, 15, 13)))
    groups = {
        "needle": tuple(range(at + 1, at + 4)),
        "question": (LENGTH - 1,),
        "last": (LENGTH,),
        "all": tuple(range(at + 1, LENGTH + 1)),
    }
    return Counterparts(clean, corrupted, 16, 14, groups)
