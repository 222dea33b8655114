"""What one model can do, and what it costs to find out: lm-eval runs the tasks over our engine, and the score of every
item is kept."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.evaluator
import numpy as np
import torch
import torch.distributed as dist
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifacts.artifact import Json, Provenance
from shoal.artifacts.evaluation import MODEL, Scores, TaskScore
from shoal.errors import UserError
from shoal.inference.vllm import vllm_version
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import checkpoint_bytes
from shoal.models.load import Checkpoint, num_parameters, without_data
from shoal.progress import each
from shoal.ranks import rank, world_size
from shoal.recipe.evaluate import NO_TEMPLATE, Eval, limit_of
from shoal.runtime import agreed, device, environment, seed_everything

from .harness.engine import NEW_TOKENS, CausalLM, connect_ranks, prompt_room
from .harness.item_cache import ItemCache, identity_of
from .harness.perplexity import perplexity, windows
from .harness.samples import task_score
from .harness.vllm import vllm_lm
from .tasks.load import tasks_of
from .tasks.names import named_in, refuse_other_limits

log = logging.getLogger(__name__)

SAMPLED = 24
"""Items of a task, its first ones, that stand for all of it."""
CHARACTERS_PER_TOKEN = 3
WATCHED = ("tasks", "limit")
"""What section distill.watch says itself of what is scored; the rest is of section `eval`."""


@dataclass(frozen=True)
class Questions:
    """What every model is asked."""

    settings: Eval
    seed: int
    """Decides only what lm-eval draws at random, such as few-shot examples."""
    tasks: dict[str, Any] | None = None
    """Tasks of the settings, where they are loaded already."""


def role_evaluation(
    role: str, checkpoint: Checkpoint, questions: Questions, *, inputs: dict[str, Json], items: Path | None = None
) -> Scores:
    """The artifact of one role: its scores, parameters, layers and the size of its weights in ``checkpoint``.

    All ranks take part and all get it; ``inputs`` is its provenance. Answers are kept in the folder ``items``, and what
    this model (``inputs["model"]``) has answered there already is not asked again, but by vLLM."""
    num_bytes, settings = checkpoint_bytes(checkpoint.folder), questions.settings
    if settings.backend == "vllm":
        started = time.monotonic()
        with vllm_lm(checkpoint, seed=questions.seed) as lm:
            scores = scored(lm, questions)
        return Scores(
            provenance=Provenance(inputs, environment() | {"vllm": vllm_version()}),
            role=role,
            tasks=scores,
            num_parameters=num_parameters(without_data(checkpoint.config)),
            num_layers=text_config(checkpoint.config).num_hidden_layers,
            num_bytes=num_bytes,
            seconds=time.monotonic() - started,
        )
    model = checkpoint.model(device=device())
    if role == MODEL and getattr(model, "is_loaded_in_4bit", False):  # a format of weights alone: nothing is rounded
        model = model.dequantize().to(checkpoint.loaded_dtype())
    return model_evaluation(
        role, model, checkpoint.tokenizer(), questions, inputs=inputs, num_bytes=num_bytes, items=items
    )


def model_evaluation(
    role: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    *,
    inputs: dict[str, Json],
    num_bytes: int,
    items: Path | None = None,
) -> Scores:
    """The same of a model in eval mode, whose weights take ``num_bytes``."""
    started, cache = time.monotonic(), ItemCache()
    if items is not None:
        cache = ItemCache(items, identity_of(inputs["model"], model), rank=rank())
        if len(cache):
            log.info("eval: %s: %d requests are answered already in %s", role, len(cache), items)
    connect_ranks(model.device)
    lm = CausalLM(model, tokenizer, questions.settings.at_once(), items=cache, called=f"eval {role}")
    scores = scored(lm, questions)
    counts = torch.tensor([cache.num_asked, cache.num_kept], device=model.device)
    if dist.is_initialized():
        dist.all_reduce(counts)
    packed = getattr(model.config, "quantization_config", None) is not None
    whole = without_data(model.config) if packed else model
    return Scores(
        provenance=Provenance(inputs, environment()),
        role=role,
        tasks=scores,
        num_parameters=num_parameters(whole),
        num_layers=text_config(model.config).num_hidden_layers,
        num_bytes=num_bytes,
        seconds=time.monotonic() - started,
        num_requests=int(counts[0]),
        num_kept=int(counts[1]),
    )


def scored(lm: CausalLM, questions: Questions) -> tuple[TaskScore, ...]:
    """The scores of ``lm``, on every rank. The items are the tasks' first ``settings.limit`` (or that
    task's), the same for every model and every seed.

    Raises:
        UserError: an unknown task, data that cannot be had, or text longer than the model's positions.
    """
    settings, tasks = questions.settings, questions.tasks
    if tasks is None:
        tasks = tasks_of(settings, seed=questions.seed)
    log.info("eval: %s", in_words(tasks, settings))
    scores = scores_of(lm, tasks, settings, seed=questions.seed)
    if settings.perplexity_tokens:
        scores = (*scores, perplexity(lm, settings))
    scores = tuple(replace(score, engine=lm.engine) for score in scores)
    for score in scores:
        log.info(
            "eval: %s %s %.3f [%.3f, %.3f], n = %d",
            *(score.task, score.metric, score.score, score.ci_low, score.ci_high, score.n),
        )
    return scores


def scores_of(lm: CausalLM, tasks: dict[str, Any], settings: Eval, *, seed: int) -> tuple[TaskScore, ...]:
    """The scores of ``tasks`` on every rank; twice on the same tasks gives the same requests."""
    if not tasks:
        return ()
    seed_everything(seed)
    for task in tasks.values():
        task.set_fewshot_seed(seed=seed)
    counts = _checked(tasks, settings, lm.tokenizer, max_length=lm.max_length, num_ranks=lm.world_size)
    lm.endings.clear()
    first: dict[str, Any] = {name: range(count) for name, count in counts.items()}
    theirs: Any = lm_eval.api.task
    bar = theirs.tqdm
    # its making of prompts is told of as all else, not by a bar of its own for every task
    theirs.tqdm = partial(each, label="eval: making prompts", unit="items")
    try:
        # its bootstrap is left out: intervals are ours, paired over the kept items
        results: Any = lm_eval.evaluator.evaluate(
            lm=lm,
            task_dict={"tasks": tasks},
            samples=first,
            bootstrap_iters=0,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
        )
    finally:
        theirs.tqdm = bar
    endings = {key: ending for part in lm.gather_object(lm.endings) or () for key, ending in part.items()}
    scores = tuple(
        task_score(
            name,
            task,
            results["samples"][name],
            num_fewshot=int(task.get_config("num_fewshot") or 0),
            count_tokens=lm.count_tokens,
            endings=endings,
        )
        for name, task in (tasks.items() if results else ())  # lm-eval gathers on rank 0
    )
    return agreed(lambda: scores)


def in_words(tasks: dict[str, Any], settings: Eval) -> str:
    """Which tasks, with how many items each, and how much running text."""
    named = [f"{name} ({count} items)" for name, count in num_items(tasks, settings).items()]
    count = settings.perplexity_tokens
    return ", ".join([*named, *([f"perplexity ({count:,} tokens)"] if count else [])])


def checked_items(
    tasks: dict[str, Any],
    settings: Eval,
    *,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_ranks: int = 1,
) -> dict[str, int]:
    """Number of items that are scored, by task, with no model at hand but its ``config``."""
    return _checked(tasks, settings, tokenizer, max_length=resolve_max_length(config, tokenizer), num_ranks=num_ranks)


def _checked(
    tasks: dict[str, Any], settings: Eval, tokenizer: Any, *, max_length: int, num_ranks: int
) -> dict[str, int]:
    """Number of items that are scored, by task; refused is what lm-eval would meet with a traceback, or silently do in
    another way on several ranks."""
    if settings.apply_chat_template and not tokenizer.chat_template:
        raise UserError(NO_TEMPLATE)

    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"eval.tasks: {name!r} runs code that the model writes, or needs images or sound; shoal evaluates "
                "text models by their text, so remove it"
            )
        if task.OUTPUT_TYPE == "generate_until":
            prompt_room(task.get_config("generation_kwargs") or {}, max_length)
        sampler = type(getattr(task, "sampler", None)).__name__
        if num_ranks > 1 and task.get_config("num_fewshot") and sampler == "ContextSampler":
            log.warning("%s draws its examples at random, so its prompts depend on the number of ranks", name)
    return num_items(tasks, settings, num_ranks=num_ranks)


def num_items(tasks: dict[str, Any], settings: Eval, *, num_ranks: int = 1) -> dict[str, int]:
    """Number of items that are scored, by task.

    Raises:
        UserError: a limit for a task that is not among them, or fewer items than ranks: lm-eval, which deals them out,
            would stop with a traceback on one rank, and the others wait for it.
    """
    refuse_other_limits(settings.limit, tasks)
    wanted = {name: limit_of(settings.limit, name) for name in tasks}
    available = {name: len(task.eval_docs) for name, task in tasks.items()}
    counts = {name: min(wanted[name] or available[name], available[name]) for name in tasks}
    if few := next((name for name, count in counts.items() if count < num_ranks), None):
        raise UserError(
            f"eval.limit: {few!r} has {counts[few]} item(s) for {num_ranks} ranks, and each rank needs one; raise "
            "the limit, use fewer ranks, or remove the task"
        )
    return counts


class QuickScores:
    """Scores the same items every time, so that what moves is the model. All ranks take part and all get the scores.

    Held-out text, ``settings.perplexity_tokens`` of it, is scored in nats per token, as `perplexity`. ``config``: of
    every model that is scored."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: Eval, *, config: PreTrainedConfig, seed: int
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._seed = seed
        self._tasks: dict[str, Any] = tasks_of(settings, seed=seed) if settings.tasks else {}
        # now, and not by the first scores, which come when the training has begun
        with named_in("distill.watch", *WATCHED):
            num_items(self._tasks, settings, num_ranks=world_size())
        # and once: a Hub that does not answer must not end a training
        longest = resolve_max_length(config, tokenizer)
        own = settings.perplexity_tokens > 0
        self._windows = agreed(lambda: windows(tokenizer, settings, max_length=longest)) if own else ()

    def __call__(self, model: PreTrainedModel) -> dict[str, TaskScore]:
        """Scores by task name. The model is left in the mode it came in, and so are all random number generators."""
        connect_ranks(model.device)
        # training must draw the same numbers whether or not it is watched
        was_training, python, numpy = model.training, random.getstate(), np.random.get_state()
        model.eval()
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
                lm = CausalLM(model, self._tokenizer, self._settings.at_once(), called="watch")
                scores = list(scores_of(lm, self._tasks, self._settings, seed=self._seed))
                if self._settings.perplexity_tokens:
                    scores.insert(0, perplexity(lm, self._settings, all_windows=self._windows))
        finally:
            model.train(was_training)
            random.setstate(python)
            np.random.set_state(numpy)
        return {score.task: score for score in scores}


@dataclass(frozen=True)
class Work:
    """Work that one model has to do."""

    items: int
    """Items of all tasks."""
    requests: int
    """Number of prompts to continue and options to score."""
    read: int
    """Tokens of prompts and options to read."""
    written: int
    """Tokens to write at most."""

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.read + self.written

    def __str__(self) -> str:
        written = f", at most {self.written:,} to write" if self.written else ""
        return f"{self.items:,} items, {self.requests:,} requests, about {self.read:,} tokens to read{written}"


def work_of(tasks: Mapping[str, Any], counts: Mapping[str, int], *, perplexity_tokens: int = 0) -> Work:
    """Work of ``counts`` items of every task, and of ``perplexity_tokens`` tokens of running text.

    Tokens are characters divided by three (prose has more to a token, digits and UUIDs fewer), and written ones the
    most that a task allows. What a task's prompts begin with alike (few-shot examples), and the prompt that the options
    of one question share, counts once, as the engine reads it once.
    """
    items = requests = 0
    read, written = float(perplexity_tokens), 0.0
    for name, task in tasks.items():
        by_item = [_requests(task, doc) for doc in islice(task.eval_docs, min(SAMPLED, counts[name]))]
        # characters with which all prompts of the task begin: they are counted once, not once per item
        prompts = [of_item[0][0] for of_item in by_item]
        shared = len(commonprefix(prompts)) if len(prompts) > 1 else 0  # noqa: RUF071 - they are no paths
        scale = counts[name] / len(by_item)
        items += counts[name]
        requests += round(scale * sum(map(len, by_item)))
        prompted = sum(sum(map(len, dict.fromkeys(args[0] for args in own))) - shared for own in by_item)
        answers = (args[1] for own in by_item for args in own if len(args) > 1)
        rest = prompted + sum(len(answer) for answer in answers if isinstance(answer, str))
        read += (shared + scale * rest) / CHARACTERS_PER_TOKEN
        written += scale * sum(_new_tokens(args) for of_item in by_item for args in of_item)
    return Work(items, requests, round(read), round(written))


def _requests(task: Any, doc: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The arguments of a document's requests, the prompt first."""
    prompt = task.fewshot_context(doc, int(task.config.num_fewshot or 0))
    requests = task.construct_requests(doc, prompt, metadata=(task.task_name, 0, 1))
    return [request.args for request in (requests if isinstance(requests, list) else [requests])]


def _new_tokens(args: tuple[Any, ...]) -> int:
    """Tokens that a request may write."""
    settings = args[1] if len(args) > 1 else None
    if not isinstance(settings, dict):
        return 0
    return normalize_gen_kwargs(settings, NEW_TOKENS).get("max_gen_toks", NEW_TOKENS)
