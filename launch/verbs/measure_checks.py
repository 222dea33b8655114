"""What measuring refuses before a weight is loaded: rows, tasks, orders and images that do not go with the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from shoal.data.sources import load_texts
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory
from shoal.models.anatomy import refuse_text_alone, text_config
from shoal.models.load import loaded_bytes
from shoal.recipe.measure import METRICS, Sweeps

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


def _check_sweep(run: Run, settings: Sweeps) -> None:
    from shoal.compress.edits.layer_edits import num_components
    from shoal.compress.sweeps.sweep import checked_tasks, refuse_few_items

    config, tokenizer = run.config(), run.tokenizer()
    tasks, counts = checked_tasks(settings, config, tokenizer)
    orders = [settings.max_removed, len(settings.order) if isinstance(settings.order, tuple) else None]
    of_each = {operator: num_components(operator, text_config(config)) for operator in settings.operators}
    if "cumulative" in of_each:
        of_each["cumulative"] = min(filter(None, [*orders, of_each["cumulative"]]))
    num_removals = max(of_each.values(), default=1)
    if settings.perplexity_tokens:
        check_length(run, settings.sequence_length, "measure.sweep.sequence_length")
    refuse_few_items(settings, counts, tokenizer, num_removals=num_removals)
    if settings.greedy is not None:
        _check_mean(settings, tasks)
    if is_streamed(run):
        _check_streamed_sweep(settings, {name: task.OUTPUT_TYPE for name, task in tasks.items()})
    if "cumulative" not in settings.operators:
        return
    if isinstance(settings.order, tuple):
        check_order(settings.order, run.num_layers)
    else:
        _check_order_name(run, settings.order, settings)


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


def _check_order_name(run: Run, name: str, settings: Sweeps) -> None:
    """Refuse an order that nothing will give before the sweep of single layers has taken its hours."""
    from shoal.compress.sweeps.columns import layer_scores
    from shoal.compress.sweeps.placeholder import placeholder_importance

    measure, before = run.recipe.measure, settings.operators[: settings.operators.index("cumulative")]
    if name not in METRICS and "layer" not in before:
        raise UserError(
            f"measure.sweep.order: {name!r} is not measured here; name one of measure.metrics "
            f"({', '.join(measure.metrics)}), or put the operator layer before cumulative to order by a task"
        )
    known = replace(measure, sweep=replace(settings, operators=before, greedy=None))
    to_come = placeholder_importance(known, run.num_layers, with_tasks=name not in METRICS)
    layer_scores(name, to_come, setting=f"measure.sweep.order={name}")


def check_order(order: tuple[int, ...], num_layers: int) -> None:
    """Refuse an order of layers that the model has not, or of all of them."""
    wrong = next((layer for layer in order if not 0 <= layer < num_layers or order.count(layer) > 1), None)
    if wrong is not None or not order or len(order) == num_layers:
        raise UserError(
            f"measure.sweep.order: must name some of the layers 0..{num_layers - 1}, each once and not all "
            f"(got {list(order)})"
        )


def _check_streamed_sweep(settings: Sweeps, kinds: dict[str, str]) -> None:
    """Refuse what takes the whole model in memory where measure.memory_gb says that it does not fit."""
    from shoal.compress.edits.layer_edits import KINDS

    written = sorted(name for name, kind in kinds.items() if kind == "generate_until")
    if written:
        raise UserError(
            f"measure.sweep.tasks: {written[0]!r} writes text, which takes the whole model in memory; leave it out, or "
            "raise measure.memory_gb above what the weights take"
        )
    inside = [part for part in settings.operators if part != "cumulative" and KINDS[part].is_inside]
    if inside:
        raise UserError(
            f"measure.sweep.operators: {inside[0]} takes the whole model in memory; leave it out, or raise "
            "measure.memory_gb above what the weights take"
        )


def is_streamed(run: Run) -> bool:
    """Whether the model is larger than what the recipe lets it take, so that it is measured layer by layer."""
    limit = run.recipe.measure.memory_gb
    return limit is not None and loaded_bytes(run.teacher, run.config(), run.recipe.dtype) > limit * 2**30
