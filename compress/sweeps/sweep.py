"""Score every variant of a model on lm-eval tasks, item by item, with the intact model in memory.

The requests of a task do not depend on the model, so every request is answered for all variants at once, and lm-eval
then scores each variant from these answers: any task it knows can be swept, at a fraction of one evaluation per
variant.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from shoal.artifacts.evaluation import TaskScore
from shoal.atomic_files import fingerprint
from shoal.errors import UserError
from shoal.inference.prefix_sharing import Tokens, batches
from shoal.inference.scoring import Score
from shoal.models.load import not_finite_in
from shoal.progress import Work, each
from shoal.ranks import world_size
from shoal.recipe.evaluate import Eval

from ...eval.evaluate import checked_items, in_words, scores_of
from ...eval.harness.engine import CausalLM, Writing, connect_ranks
from ...eval.harness.item_cache import ENGINE, ItemCache, key_of, versions
from ...eval.tasks.load import tasks_of
from ...eval.tasks.names import named_in
from ..variants.variant_generation import Limits, generate_variants
from ..variants.variants import INTACT, Edited, Variant, score_variants
from .table import require_items

log = logging.getLogger(__name__)

REQUESTS_AT_ONCE = 64
"""Times the batch size: how many likelihoods are answered before they are written to disk."""


def sweep(
    edited: Edited,
    tokenizer: PreTrainedTokenizerBase,
    variants: Sequence[Variant],
    settings: Eval,
    *,
    seed: int,
    folder: Path | None = None,
    identity: str = "",
) -> tuple[tuple[TaskScore, ...], list[tuple[TaskScore, ...]]]:
    """The scores of the intact model and of every variant of ``edited`` over the same items, on every rank.

    With ``folder`` answers are kept there, and a sweep that was stopped goes on from them; ``identity`` says of which
    model they are.

    Raises:
        UserError: an unknown task, data that cannot be had.
    """
    everything = [INTACT, *(variant for variant in variants if variant.edits)]
    lm = VariantsLM(edited, tokenizer, everything, settings.at_once())
    connect_ranks(lm.device)
    tasks = tasks_of(settings, seed=seed)
    lm.seed = seed
    made_by = [ENGINE, lm.device.type, versions()]
    answered_by = fingerprint([identity, *made_by, [repr(variant.edits) for variant in everything]])
    lm.items = ItemCache(folder, answered_by, name="answers", rank=lm.rank)
    if len(lm.items):
        log.info("ablation: resuming; %d requests are answered already", len(lm.items))
    log.info("ablation: %d variants on %s", len(variants), in_words(tasks, settings))
    scores_of_all: list[tuple[TaskScore, ...]] = []
    for number in each(range(len(everything)), "sweep: scored", unit="variants"):
        lm.current = number  # after the first one all answers are known
        scores_of_all.append(scores_of(lm, tasks, settings, seed=seed))
    intact = scores_of_all[0]
    by_name = dict(zip((variant.name for variant in everything), scores_of_all, strict=True))
    return intact, [by_name.get(variant.name, intact) for variant in variants]


def checked_tasks(
    settings: Eval, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *, num_removals: int
) -> dict[str, Any]:
    """The tasks of a sweep, with no model at hand.

    Raises:
        UserError: whatever a sweep would refuse of them once it runs, named as the recipe names it; columns on which
            none of so many removals could be seen.
    """
    with sweeping():
        tasks = tasks_of(settings)
        counts = checked_items(tasks, settings, config=config, tokenizer=tokenizer, num_ranks=world_size())
    for task, count in counts.items():
        require_items(task, count, num_removals)
    return tasks


def sweeping() -> AbstractContextManager[None]:
    """Refusals name the settings that measure.sweep says itself as its own."""
    return named_in("measure.sweep", "tasks", "limit")


class VariantsLM(CausalLM):
    """As lm-eval sees it one model, the variant ``current``; a request is answered for all of them at once.

    Its items are lists: what every variant answered, in their order.
    """

    def __init__(
        self, edited: Edited, tokenizer: PreTrainedTokenizerBase, variants: Sequence[Variant], batch_size: int
    ) -> None:
        super().__init__(edited.model, tokenizer, batch_size, called="sweep")
        self.current = 0
        self.seed = 0
        """Seed of sampled text."""
        self._edited, self._variants = edited, variants

    def _score(self, pairs: list[tuple[Tokens, Tokens]], step: Work) -> list[Score]:
        keys = self._score_keys(pairs)
        missing = self.items.missing(keys)
        step.known(len(pairs) - len(missing))
        for chosen in batches(missing, REQUESTS_AT_ONCE * self.batch_size):
            asked = [pairs[index] for index in chosen]
            by_variant = score_variants(
                self._edited, self._decoder, asked, self._variants, batch_size=self.batch_size, progress=step
            )
            self._refuse_no_numbers(by_variant)
            by_request = [list(scores) for scores in zip(*by_variant, strict=True)]
            self.items.add([keys[index] for index in chosen], by_request)
        return [tuple(self.items[key][self.current]) for key in keys]

    def _refuse_no_numbers(self, by_variant: Sequence[Sequence[Score]]) -> None:
        """Among options that are all NaN lm-eval would choose the first and go on."""
        for variant, scores in zip(self._variants, by_variant, strict=True):
            if any(math.isnan(log_prob) for log_prob, _ in scores):
                told = f"the model's likelihoods are NaN {not_finite_in(self._edited.model.dtype)}"
                raise UserError(f"measure.sweep: {variant.name}: {told}")

    def _write(self, prompts: list[list[int]], how: Writing, step: Work) -> list[list[int]]:
        keys = self._text_keys(prompts, how)
        missing = self.items.missing(keys)
        missing.sort(key=lambda index: -len(prompts[index]))
        step.known(len(prompts) - len(missing))
        for chosen in batches(missing, self.batch_size):
            asked = [keys[index] for index in chosen]
            by_variant = self._write_variants([prompts[index] for index in chosen], asked, how)
            self.items.add(asked, [list(texts) for texts in zip(*by_variant, strict=True)])
            step(len(chosen))
        return [self.items[key][self.current] for key in keys]

    def _text_keys(self, prompts: list[list[int]], how: Writing) -> list[str]:
        """Where texts are drawn, a repeated prompt gets draws of its own."""
        keys = super()._text_keys(prompts, how)
        if not how.settings.get("do_sample"):
            return keys
        seen: Counter[str] = Counter()
        own = []
        for key in keys:
            own.append(key_of(key, self.seed, seen[key]))
            seen[key] += 1
        return own

    def _write_variants(self, prompts: list[list[int]], keys: list[str], how: Writing) -> list[list[list[int]]]:
        if self._writes_itself(how):
            limits = Limits(how.max_new_tokens, self._finish(how))
            return generate_variants(
                self._edited, self._decoder, prompts, self._variants, limits, batch_size=self.batch_size
            )
        texts = []
        for variant in self._variants:
            with self._edited.applied(variant.edits):
                if how.settings.get("do_sample"):
                    texts.append([self._draw(prompt, key, how) for prompt, key in zip(prompts, keys, strict=True)])
                else:
                    texts.append(self._generate_with_transformers(prompts, how))
        return texts

    def _draw(self, prompt: list[int], key: str, how: Writing) -> list[int]:
        """A sampled text that is the same whatever was written before it, as when a sweep goes on."""
        torch.manual_seed(int(key[:15], 16))
        return self._generate_with_transformers([prompt], how)[0]
