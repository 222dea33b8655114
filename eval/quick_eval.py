"""A few scores of a model in the middle of its training: held-out text and a handful of items per task."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.ranks import world_size
from shoal.recipe.evaluate import Tasks
from shoal.runtime import agreed

from .evaluate import num_items, scores_of
from .harness.engine import CausalLM, connect_ranks
from .harness.perplexity import perplexity, windows
from .tasks.load import tasks_of
from .tasks.names import named_in

HELD_OUT = "perplexity"


@dataclass(frozen=True)
class QuickScore:
    """One number of a curve."""

    value: float
    higher_is_better: bool


SETTINGS = ("tasks", "limit")
"""What section distill.watch says itself of what is scored; the rest is of section `eval`."""


class QuickScores:
    """Scores the same items every time, so that what moves is the model. All ranks take part and all get the scores.

    Held-out text, ``settings.perplexity_tokens`` of it, is scored in nats per token, as `perplexity`.

    Raises:
        UserError: as tasks_of, or a task with fewer items than ranks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Tasks, *, seed: int) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._seed = seed
        self._tasks: dict[str, Any] = tasks_of(settings, seed=seed) if settings.tasks else {}
        # now, and not by the first scores, which come when the training has begun
        with named_in("distill.watch", *SETTINGS):
            num_items(self._tasks, settings, num_ranks=world_size())
        # and once: a Hub that does not answer must not end a training
        self._windows = agreed(lambda: windows(tokenizer, settings)) if settings.perplexity_tokens else ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the scores that a call returns."""
        return (*([HELD_OUT] if self._settings.perplexity_tokens else []), *self._tasks)

    def __call__(self, model: PreTrainedModel) -> dict[str, QuickScore]:
        """Scores by task name. The model is left in the mode it came in, and so are all random number generators."""
        connect_ranks(model.device)
        # training must draw the same numbers whether or not it is watched
        was_training, python, numpy = model.training, random.getstate(), np.random.get_state()
        model.eval()
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
                lm = CausalLM(model, self._tokenizer, self._settings.batch_size, called="watch")
                scores = list(scores_of(lm, self._tasks, self._settings, seed=self._seed))
                if self._settings.perplexity_tokens:
                    scores.insert(0, perplexity(lm, self._settings, all_windows=self._windows))
        finally:
            model.train(was_training)
            random.setstate(python)
            np.random.set_state(numpy)
        return {score.task: QuickScore(score.score, score.higher_is_better) for score in scores}
