"""How a task wants text written, and how a text ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from shoal.errors import UserError

GREEDY_SETTINGS = {"do_sample", "temperature", "top_p", "top_k"}
"""Settings of a generation configuration that change nothing about greedy text."""
NEW_TOKENS = 256
"""How many a task gets that does not say how many it wants, as in lm-eval."""
NEUTRAL_SETTINGS = GREEDY_SETTINGS | {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_length",
    "max_new_tokens",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "_from_model_config",
}


@dataclass(frozen=True)
class Writing:
    """How texts are written."""

    max_new_tokens: int
    stop: list[str]
    settings: dict[str, Any]
    """All else that the task asks for: sampling, penalties, ..."""


@dataclass(frozen=True)
class Ending:
    """How a text ended."""

    num_tokens: int
    """New tokens, the one that ended it included."""
    finished: bool
    """False = the limit of new tokens ended it."""


def prompt_room(settings: dict[str, Any], max_length: int) -> tuple[int, dict[str, Any]]:
    """How many tokens of a prompt ``max_length`` positions leave room for, and a task's settings in lm-eval's names.

    Raises:
        UserError: for none.
    """
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, NEW_TOKENS))
    if wanted["max_gen_toks"] >= max_length:
        raise UserError(
            f"a task asks for {wanted['max_gen_toks']} new tokens (max_gen_toks), but the model has {max_length} "
            "positions; leave this task out of eval.tasks"
        )
    return max_length - wanted["max_gen_toks"], wanted
