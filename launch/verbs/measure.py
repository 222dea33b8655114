"""The measure stage: importance.json and its figures."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance, Removal
from shoal.atomic_files import fingerprint
from shoal.data.packing import PackedRows
from shoal.data.sources import load_texts, pack, sources_fingerprint
from shoal.models.checkpoint_files import WRITING, model_fingerprint, writing_settings
from shoal.models.load import load_model, reads_images
from shoal.progress import doing
from shoal.recipe.measure import Sweeps
from shoal.recipe.section import Shapes, shaping
from shoal.runtime import barrier, device, is_main, seed_everything

from .measure_checks import check_measure, check_order, is_streamed
from .run import Run, is_done

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shoal.compress.variants.streamed import Streaming

log = logging.getLogger(__name__)
DONOR_CONTENT = "measure.sweep.donor (content)"


def measure_inputs(run: Run) -> dict[str, Any]:
    """What identifies importance.json."""
    from shoal.eval.tasks.names import local_data_fingerprint, tasks_fingerprint

    inputs = _inputs(run, Shapes.IMPORTANCE, data=sources_fingerprint(run.recipe.measure.data))
    settings = run.recipe.measure.sweep
    if settings is None:
        return inputs
    inputs |= shaping(settings, Shapes.SCORES, "measure.sweep.")
    forms = [f"{task}_{protocol}" for task in settings.tasks for protocol in settings.protocols]
    inputs["measure.sweep.tasks (files)"] = tasks_fingerprint(forms or settings.tasks, settings.include_path)
    if settings.data_dir is not None:
        inputs["measure.sweep.data_dir (files)"] = local_data_fingerprint(settings.data_dir, settings.include_path)
    if settings.perplexity_tokens:
        inputs["measure.sweep.perplexity_data (content)"] = sources_fingerprint(settings.perplexity_data)
    if run.sweep_donor is not None:
        inputs[DONOR_CONTENT] = model_fingerprint(run.sweep_donor)
    if writing := writing_settings(run.teacher):
        inputs[WRITING] = writing
    return inputs


def _streaming(run: Run) -> Streaming:
    from shoal.compress.variants.streamed import Streaming

    limit = run.recipe.measure.memory_gb
    assert limit is not None
    return Streaming(memory_bytes=int(limit * 2**30), device=device(), spill_folder=run.dir, **run.load_args())


def measure(run: Run) -> None:
    """importance.json and its figures. All ranks take part."""
    inputs = measure_inputs(run)
    if is_done(Importance, run.dir / Importance.FILE, inputs, "measure"):
        return
    check_measure(run)
    if reads_images(run.config()):
        log.warning(
            "measure: %s reads images and is measured with text alone, which says nothing of what layers do for images",
            run.recipe.model,
        )
    run.dir.mkdir(parents=True, exist_ok=True)  # layers that are streamed are spilled there
    seed_everything(run.recipe.seed)
    rows = packed_rows(run)
    model = None if is_streamed(run) else load_model(run.teacher, device=device(), **run.load_args())
    importance = _measured(run, model, rows, inputs)
    if is_main():
        _write(run, importance)
    barrier()


def packed_rows(run: Run) -> PackedRows:
    """The text of `measure` as rows of tokens."""
    settings = run.recipe.measure
    log.info("measure: %s over %s tokens", ", ".join(settings.metrics), f"{settings.num_tokens:,}")
    rows = pack(
        [(source, load_texts(source, max_characters=16 * settings.num_tokens)) for source in settings.data],
        run.tokenizer(),
        sequence_length=settings.sequence_length,
        num_tokens=settings.num_tokens,
        seed=run.recipe.seed,
    )
    if repeated := [name for name, counts in rows.counts.items() if counts["repeats"]]:
        log.warning(
            "measure.num_tokens: is more than %s has, which is repeated: scores rest on less text than they say; lower "
            "it or name more text",
            ", ".join(repeated),
        )
    return rows


def _measured(run: Run, model: Any, rows: PackedRows, inputs: dict[str, Any]) -> Importance:
    from shoal.compress.measure import measure_importance
    from shoal.compress.streamed import measure_streamed

    settings = run.recipe.measure
    common: dict[str, Any] = {"metrics": settings.metrics, "batch_size": settings.batch_size}

    def scored() -> Importance:
        if model is None:
            scores = measure_streamed(run.teacher, rows, streaming=_streaming(run), **common)
        else:
            scores = measure_importance(
                model,
                rows,
                num_drop=settings.removals(run.num_layers),
                seed=run.recipe.seed,
                **common,
            )
        return Importance(Provenance(inputs), **vars(scores))

    return scored() if settings.sweep is None else _swept(run, model, rows, settings.sweep, scored)


def _swept(run: Run, model: Any, rows: PackedRows, settings: Sweeps, scored: Callable[[], Importance]) -> Importance:
    """What ``scored`` gives, with the atlas and the tables of all operators."""
    from shoal.compress.edits.layer_edits import components_of
    from shoal.compress.metrics.greedy import TASK_ORDER
    from shoal.compress.sweeps.atlas import atlas_of
    from shoal.compress.sweeps.columns import rankings
    from shoal.compress.sweeps.items import write_items
    from shoal.compress.sweeps.read_write import read_write_of
    from shoal.compress.sweeps.table import OF_LAYERS, table_of
    from shoal.compress.variants.variants import variant_of

    # before anything is measured, so that what these refuse is refused at once
    skeleton = _streaming(run).open(run.teacher).model if model is None else model
    sweep = _sweep(run, model, settings)
    known = {operator: components_of(operator, skeleton) for operator in settings.operators if operator != "cumulative"}
    importance = scored()
    inputs = importance.provenance.inputs
    own = [model_fingerprint(run.teacher), run.recipe.dtype, run.recipe.attention, inputs.get(DONOR_CONTENT)]
    identity = fingerprint([*own, inputs[WRITING]] if WRITING in inputs else own)
    tables: dict[str, Any] = {}
    for operator in settings.operators:
        components = known.get(operator)
        if components is None:
            order = _order(settings, importance)[: settings.max_removed]
            components = components_of(operator, skeleton, order=order)
        log.info("measure: sweep of operator %s, %d variants", operator, len(components))
        intact, removed = sweep(
            [variant_of(component, skeleton) for component in components],
            settings,
            seed=run.recipe.seed,
            folder=run.dir / "sweep" / operator,
            identity=identity,
        )
        if is_main():
            write_items(run.dir / "sweep" / operator, [component.name for component in components], intact, removed)
        table = tables[operator] = table_of(operator, components, intact, removed)
        if operator == "layer":
            with doing("measure: intervals of the atlas"):
                importance = replace(importance, atlas=atlas_of(*table, metrics=rankings(importance)))
        else:
            importance = replace(importance, sweeps={**importance.sweeps, operator: table[0]})
    if importance.atlas is not None and tables.keys() >= set(OF_LAYERS):
        importance = replace(importance, atlas=replace(importance.atlas, read_write=read_write_of(tables)))
    if settings.greedy is not None:
        order = _task_order(run, sweep, settings, identity)
        importance = replace(importance, orders={**importance.orders, TASK_ORDER: order})
    return importance


def _task_order(run: Run, sweep: Callable[..., Any], settings: Sweeps, identity: str) -> tuple[Removal, ...]:
    """The layers in the order in which the tasks' mean score can best do without them; the first and last one stay."""
    from shoal.compress.metrics.greedy import TASK_ORDER, greedy_order, layer_components, task_objective

    rounds = itertools.count()

    def evaluate(variants: Any) -> Any:
        folder = run.dir / "sweep" / TASK_ORDER / str(next(rounds))
        return sweep(variants, settings, seed=run.recipe.seed, folder=folder, identity=identity)[1]

    return greedy_order(
        layer_components(run.num_layers, protected=(0, -1)),
        task_objective(evaluate),
        num_removals=settings.greedy,
        higher_is_better=True,
        name=TASK_ORDER,
    )


def _sweep(run: Run, model: Any, settings: Sweeps) -> Callable[..., Any]:
    """What scores variants of ``model``; where there is none, of the checkpoint, layer by layer."""
    from shoal.compress.sweeps.sweep import StreamedVariantsLM, VariantsLM, sweep
    from shoal.compress.variants.variants import Edited

    donor = run.sweep_donor
    tokenizer = run.tokenizer()
    if model is None:
        lm = partial(StreamedVariantsLM, run.teacher, tokenizer, streaming=_streaming(run), donor=donor)
        return partial(sweep, lm)
    other = None if donor is None else load_model(donor, device=device(), **run.load_args())
    return partial(sweep, partial(VariantsLM, Edited(model, other), tokenizer))


def _order(settings: Sweeps, importance: Importance) -> tuple[int, ...]:
    """The layers that cumulative removals take out, first one first; one layer always stays."""
    from shoal.compress.sweeps.columns import layer_scores

    num_layers = importance.num_layers
    if isinstance(settings.order, str):
        if (removals := importance.orders.get(settings.order)) is not None:  # of what it never tried it says nothing
            return tuple(removal.unit.layers[0] for removal in removals)
        scores = layer_scores(settings.order, importance, setting="measure.sweep.order")
        return tuple(sorted(range(num_layers), key=lambda layer: (scores[layer], layer))[:-1])
    check_order(settings.order, num_layers)
    return settings.order


def _write(run: Run, importance: Importance) -> None:
    from shoal.figures.style import save_figure

    importance.write(run.dir / Importance.FILE)
    with doing("measure: drawing figures"):
        for name, figure in _figures(importance):
            save_figure(figure, run.dir / "figures" / f"{name}.svg")
    if importance.atlas is not None:
        for note in importance.atlas.notes:
            log.info("measure: %s", note)
        if importance.atlas.read_write is not None:
            for line in importance.atlas.read_write.in_words(importance.atlas.sweep):
                log.info("measure: %s", line)
    log.info("measure: %s", run.dir / Importance.FILE)


def _figures(importance: Importance) -> Iterator[tuple[str, Figure]]:
    from shoal.figures.atlas import (
        agreement_figure,
        atlas_figure,
        cumulative_figure,
        curves_figure,
        head_map_figure,
        read_write_figure,
    )
    from shoal.figures.importance import importance_figure

    if importance.layers or importance.runs:
        yield "importance", importance_figure(importance)
    if importance.atlas is not None:
        yield "atlas", atlas_figure(importance)
        yield "agreement", agreement_figure(importance.atlas.agreement)
        if importance.atlas.read_write is not None:
            yield "read_write", read_write_figure(importance)
    for operator, table in importance.sweeps.items():
        if any(component.index is not None for component in table.units):
            yield operator, head_map_figure(table)
        elif operator == "cumulative":
            yield operator, cumulative_figure(table)
        else:
            yield operator, curves_figure(table)


def _inputs(run: Run, result: Shapes, **content: str) -> dict[str, Any]:
    """What identifies ``result``: the model, the ``content`` of text that it is measured on, and settings."""
    settings = {**shaping(run.recipe, result), **shaping(run.recipe.measure, result, "measure.")}
    return {"model": run.teacher_fingerprint, **content, **settings}
