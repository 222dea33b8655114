"""What measuring refuses before a weight is loaded: rows, tasks, orders and images that do not go with the model."""

from __future__ import annotations

import logging
from typing import Any

from shoal.data.sources import load_texts
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory
from shoal.models.anatomy import refuse_text_alone
from shoal.models.load import rooms_to_share
from shoal.recipe.measure import Sweeps
from shoal.runtime import device

from .run import Run, check_length

log = logging.getLogger(__name__)

TOKEN_BYTES = 8
"""Bytes of one packed token: id and position."""


def check_measure(run: Run) -> None:
    """Refuse what measuring would refuse, before any weight is loaded.

    Raises:
        UserError: rows longer than the model's positions, contradicting settings, unknown tasks or unreadable data.
    """
    settings = run.recipe.measure
    refuse_text_alone(run.config())
    check_length(run, settings.sequence_length, "measure.sequence_length")
    if (needed := TOKEN_BYTES * settings.num_tokens) > available_memory():
        raise UserError(
            f"measure.num_tokens: {settings.num_tokens:,} tokens take {bytes_text(needed)} of memory, and "
            f"{bytes_text(available_memory())} are free; lower it"
        )
    _check_removals(run)
    _check_room(run)
    for source in settings.data:
        load_texts(source, max_characters=1)
    if settings.sweep is not None:
        _check_sweep(run, settings.sweep)


def _check_removals(run: Run) -> None:
    """Refuse greedy orders of more removals than the model has layers for."""
    from shoal.compress.metrics.registry import METRICS

    measure = run.recipe.measure
    orders = [name for name in measure.metrics if name in METRICS and METRICS[name].yields == "order"]
    greedy = None if measure.sweep is None else measure.sweep.greedy
    for setting, count in (("num_drop", measure.num_drop if orders else None), ("sweep.greedy", greedy)):
        if count is not None and count > run.num_layers - 2:
            raise UserError(
                f"measure.{setting}: {count} removals are more than the model allows, which has {run.num_layers} "
                f"layers of which the first and the last stay; set at most {run.num_layers - 2}"
            )


def _check_room(run: Run) -> None:
    """Refuse metrics that change or take apart weights which are not all in memory."""
    from shoal.compress.metrics.registry import METRICS

    needy = [name for name in run.recipe.measure.metrics if METRICS[name].needs in ("gradients", "weights", "merges")]
    if needy and rooms_to_share(run.teacher, run.config(), run.recipe.dtype, device()):
        raise UserError(
            f"measure.metrics: {needy[0]} needs all weights in memory, more than is free on {device()}; leave it "
            "out, or measure on a larger machine"
        )


def _check_sweep(run: Run, settings: Sweeps) -> None:
    from shoal.compress.sweeps.sweep import checked_tasks, refuse_few_items

    config, tokenizer = run.config(), run.tokenizer()
    tasks, counts = checked_tasks(settings, config, tokenizer)
    if settings.perplexity_tokens:
        check_length(run, settings.sequence_length, "measure.sweep.sequence_length")
    refuse_few_items(settings, counts, tokenizer, num_removals=run.num_layers)
    if settings.greedy is not None:
        _check_mean(settings, tasks)


def _check_mean(settings: Sweeps, tasks: dict[str, Any]) -> None:
    """Refuse a greedy order by scores that have no mean, before the first round of it is scored."""
    from shoal.eval.harness.samples import metric_of, rises

    metrics = {name: metric_of(task, list(task.higher_is_better())) for name, task in tasks.items()}
    higher = {name: rises(tasks[name], metric) for name, metric in metrics.items()}
    if settings.perplexity_tokens:
        higher["perplexity"] = False
    shares, in_nats = ([name for name, rising in higher.items() if rising is kind] for kind in (True, False))
    if in_nats and shares:
        raise UserError(
            f"measure.sweep.greedy: {in_nats[0]} is in nats and {shares[0]} a share, which have no unit in common; "
            "leave one kind out"
        )
