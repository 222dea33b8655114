"""Settings that this machine, the data, the tasks or what was measured do not allow."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from typing import Any

from shoal.artifacts.importance import Importance
from shoal.errors import UserError
from shoal.eval.tasks import names
from shoal.inference.vllm import check_vllm
from shoal.models.looks import chat_template, token_counter
from shoal.ranks import NO_GPU, may_have_devices, no_gpu, refuse_crowd
from shoal.recipe.distill import SMALL, Live, Recorded, TrainingSource
from shoal.recipe.evaluate import NO_TEMPLATE
from shoal.recipe.measure import METRICS, no_metric, not_measured
from shoal.recipe.prune import NO_CORNERSTONE, CutThese
from shoal.recipe.section import AUTO, DataSource
from shoal.recipe.trainer_arguments import precisions_said, read_deepspeed, refuse_deepspeed, refuse_training

from .asked import CUT, MEASURE, SCORE, TRAIN, Asked

FIRST_CHARACTERS, FIRST_DOCUMENTS, FIRST_FILES = 4096, 20, 8
"""Text and documents of a file, and files of a folder, that are looked at."""
MOST_SECONDS = 2.0
"""Of processor time for conversations that teach nothing; what is not told by then is told later."""
MANY_TOKENS = 10**8
"""Tokens that every machine has room for."""


def refuse_columns(asked: Asked) -> None:
    """Refuse tasks that are unknown, and to choose by a metric or task that there is not, or that is not measured."""
    prune, settings = asked.recipe.prune, asked.recipe.measure
    if settings.sweep is not None and asked.verb in MEASURE:
        names.refuse_unknown(settings.sweep.tasks, asked.recipe.eval.include_path, setting="measure.sweep.tasks")
    if asked.verb not in CUT or isinstance(prune, CutThese) or (asked.folder / Importance.FILE).exists():
        return
    if settings.sweep is None:
        for name in sorted(prune.chosen_by - {*METRICS}):
            raise no_metric(name, f"prune.metric={name}")
        for name in prune.spare:
            raise not_measured(f"prune.spare: {name}", "it has none.", "measure.sweep.tasks")
        if "cornerstone" in prune.protect:
            raise UserError(NO_CORNERSTONE)


def refuse_ranks(asked: Asked) -> None:
    """Refuse more ranks than there is room for."""
    if asked.recipe.num_processes is not None and asked.recipe.eval.backend != "vllm":
        refuse_crowd(asked.recipe.num_processes)


def refuse_distillation(asked: Asked) -> None:
    """Refuse settings of a training that contradict the model, this machine or what is installed."""
    recipe, distill = asked.recipe, asked.recipe.distill
    on_cpu, config = not may_have_devices(), read_deepspeed(distill.deepspeed)
    is_here = asked.verb != "record" and "LOCAL_RANK" not in os.environ
    ranks = (recipe.num_processes or (1 if on_cpu else None)) if is_here else None
    refuse_training(distill, ranks=ranks)
    refuse_deepspeed(config, distill, next(iter(precisions_said(config)), distill.precision), on_cpu=on_cpu)
    if distill.lora is not None:
        distill.lora.require_packages()
    if distill.watch is not None:
        names.refuse_unknown(distill.watch.tasks, recipe.eval.include_path, setting="distill.watch.tasks")
    by_vllm = (n for n, source in enumerate(distill.data) if source.generate and source.generate.backend == "vllm")
    if (number := next(by_vllm, None)) is not None and not any((asked.folder / "text").glob("written-*")):
        check_vllm(f"distill.data.{number}.generate.backend")  # what is written is read without it
    teacher = distill.teacher
    if asked.verb == "record" and isinstance(teacher, Live):
        raise UserError("distill.teacher: is live, so there is nothing to record; add distill.teacher=recorded")
    by_vllm = teacher if isinstance(teacher, Recorded) and teacher.backend == "vllm" else None
    if by_vllm and not (by_vllm.folder(recipe.run_dir) / "recording.json").is_file():  # else it may be needless
        check_vllm("distill.teacher.backend")
    size = sum(math.prod(tensor.shape) for shard in asked.shards for tensor in shard.tensors.values())
    if 0 < size < SMALL and "quantization_config" not in asked.config:  # which trains on at most as many tokens
        refuse_training(replace(distill, num_tokens=distill.budget), ranks=ranks)


def refuse_scoring(asked: Asked) -> None:
    """Refuse tasks that are unknown, or cannot be asked as section `eval` says."""
    settings = asked.recipe.eval
    if settings.apply_chat_template and asked.plain is not None and chat_template(asked.plain) == "":
        raise UserError(NO_TEMPLATE)
    names.local_data(settings.data_dir)
    names.refuse_unknown(settings.tasks, settings.include_path)
    if settings.data_dir is None:
        names.refuse_offline(settings.tasks, settings.include_path)
    if settings.backend == "vllm":
        check_vllm("eval.backend")
    if (tasks := names.tasks_named(settings.tasks, settings.include_path)) is not None:
        names.refuse_other_limits(settings.limit, tasks)
    if settings.num_fewshot is not None or settings.include_path is not None:  # else they are shoal's own
        from shoal.eval.tasks.documents import refuse_wrong_rows  # loads the library of data sets

        refuse_wrong_rows(settings)


def refuse_data(asked: Asked) -> None:
    """Refuse local data whose first documents cannot be used, and a package's that is not installed."""
    from shoal.data.bundled import BUNDLED, NOT_APART
    from shoal.data.chat import Chat
    from shoal.data.sources import documents, load_texts, local_files, nothing_in, opened, to_write

    for source in _sources(asked):
        if source.path in BUNDLED:
            opened(source)
        if source.path in NOT_APART:
            BUNDLED[source.path]()  # from a package that may be missing
        if source.path == AUTO or not (files := local_files(source)):  # a folder of this name is none of its text
            continue
        found = opened(source)
        if source not in asked.recipe.distill.data:
            load_texts(found, max_characters=FIRST_CHARACTERS)
        elif isinstance(source, TrainingSource) and not source.has_images:
            to_write(source, sequence_length=asked.recipe.distill.sequence_length)
            read = (each for each in documents(found) if each is not None)
            if not (first := list(islice(read, FIRST_DOCUMENTS))):
                raise nothing_in(found)
            if isinstance(first[0], Chat) and not source.generate:
                _conversations(asked, found, first, read)
        for other in () if source.has_images else files[1:FIRST_FILES]:
            next(documents(replace(found, path=str(other), split=DataSource.split)), None)


def _conversations(asked: Asked, source: DataSource, first: list[Any], others: Iterator[Any]) -> None:
    """Refuse conversations, the ``first`` and ``others``, that the model's chat template does not take, or of which no
    token is learnt."""
    from shoal.data.chat import MARKS_ITSELF, check_template, nothing_learnt

    distill, counter, began = asked.recipe.distill, cache(token_counter), time.process_time()
    if asked.plain is None or (template := chat_template(asked.plain)) is None:
        return
    check_template(template, source.path, first=first[0])
    is_learnt = MARKS_ITSELF.search(template) or distill.on_policy is not None
    if is_learnt or not source.assistant_only:
        return
    room = distill.sequence_length if distill.packing == "bfd" else sys.maxsize
    for question in (chat.question for chat in chain(first, others)):
        is_short = question is not None and (len(question) < room or counter(asked.plain)(question) < room)
        if is_short or time.process_time() - began > MOST_SECONDS:
            return
    raise nothing_learnt(source)


def _sources(asked: Asked) -> Iterator[DataSource]:
    """The data that the command reads."""
    recipe = asked.recipe
    if asked.measures:
        yield from recipe.measure.data
    if asked.verb in TRAIN:
        yield from recipe.distill.data
    if asked.verb in SCORE and recipe.eval.perplexity_tokens:
        yield from recipe.eval.perplexity_data


def refuse_machine(asked: Asked) -> None:
    """Refuse a GPU that is not here, and tokens that have no room. Torch is loaded for what is seldom said."""
    if asked.recipe.device == "cuda" and not may_have_devices():
        raise no_gpu(NO_GPU)
    if asked.measures and asked.recipe.measure.num_tokens > MANY_TOKENS:
        from shoal.data.packing import require_room

        require_room(asked.recipe.measure.num_tokens, "measure.num_tokens")
