"""How a task wants text written, how further texts are drawn, and how a text ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lm_eval.models.utils import normalize_gen_kwargs

from shoal.errors import UserError
from shoal.inference.drawing import Drawn
from shoal.recipe.evaluate import Samples

from .item_cache import key_of

GREEDY_SETTINGS = {"do_sample", "temperature", "top_p", "top_k"}
"""Settings of a generation configuration that change nothing about greedy text."""
CHOICE_SETTINGS = GREEDY_SETTINGS | {"num_beams"}
"""Settings of a task that say how tokens are chosen; of drawn texts that is not the task's to say."""
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
class Draws:
    """Texts that are drawn instead of written as their task says.

    The chance is in the seed, the prompt and the number of a text among those after its prompt. So the same weights
    give the same texts however they are batched, up to rounding, and models that read the same tokens draw by the same
    numbers.
    """

    samples: Samples
    seed: int
    numbers: tuple[int, ...]
    """Number of each text among those after its prompt."""

    @property
    def identity(self) -> tuple[float, float, int]:
        """All that decides what is drawn besides prompt and number; a text does not depend on how many there are."""
        return self.samples.temperature, self.samples.top_p, self.seed

    def choice(self, prompts: Sequence[Sequence[int]], num_tokens: int, device: torch.device) -> Drawn:
        """What draws the texts after ``prompts``, one for each of ``numbers``, of up to ``num_tokens`` new tokens."""
        seeds = [
            [self.seed, number, int(key_of(list(prompt)), 16)]
            for prompt, number in zip(prompts, self.numbers, strict=True)
        ]
        uniforms = np.stack([np.random.default_rng(seed).random(num_tokens) for seed in seeds])
        return Drawn(torch.from_numpy(uniforms).to(device), self.samples.temperature, self.samples.top_p)


@dataclass(frozen=True)
class Writing:
    """How texts are written."""

    max_new_tokens: int
    stop: list[str]
    settings: dict[str, Any]
    """All else that the task asks for: sampling, penalties, ..."""
    draws: Draws | None = None
    """Draws of as many texts as there are prompts; None = as the task says."""

    def of(self, indices: Sequence[int]) -> Writing:
        """The same for some of the texts."""
        if self.draws is None:
            return self
        numbers = tuple(self.draws.numbers[index] for index in indices)
        return replace(self, draws=replace(self.draws, numbers=numbers))


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
