"""The measure stage: importance.json, heads.json, vision_states.json, diagnostics.json, probes.json, their figures."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.depth import Diagnostics, Probes
from shoal.artifacts.heads import Heads, TaskHeads
from shoal.artifacts.importance import Importance, Removal
from shoal.artifacts.vision_states import VisionStates
from shoal.atomic_files import fingerprint
from shoal.data.image_rows import Asked, asked, image_rows_fingerprint, load_image_rows
from shoal.data.packing import PackedRows
from shoal.data.sources import load_labelled, load_texts, pack, sources_fingerprint
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory
from shoal.models.anatomy import refuse_text_alone, text_config
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_model, load_processor, loaded_bytes, reads_images
from shoal.progress import doing
from shoal.recipe.edits import Component
from shoal.recipe.measure import METRICS, HeadTask, Sweeps
from shoal.recipe.section import ImageRows, Shapes, shaping
from shoal.runtime import barrier, device, is_main, seed_everything
from shoal.stages.run import Run, check_length, is_done, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shoal.compress.heads.prompts import CopyPrompt
    from shoal.compress.measure import Scores
    from shoal.compress.variants.streamed import Streaming

log = logging.getLogger(__name__)

TOKEN_BYTES = 8
"""Bytes of one packed token: id and position."""
DONOR_CONTENT = "measure.sweep.donor (content)"


def measure_inputs(run: Run) -> dict[str, Any]:
    """What identifies importance.json."""
    from shoal.eval.tasks.names import local_data_fingerprint, tasks_fingerprint

    inputs = _inputs(run, Shapes.IMPORTANCE, data=sources_fingerprint(run.recipe.measure.data))
    settings = run.recipe.measure.sweep
    if run.recipe.measure.scale_removals:  # not named where it is off: there was a time without it
        inputs["measure.scale_removals"] = True
    if run.recipe.measure.images is not None:
        inputs["measure.images"] = image_rows_fingerprint(load_image_rows(run.recipe.measure.images))
    if settings is None:
        return inputs
    inputs |= shaping(settings, Shapes.SCORES, "measure.sweep.")
    if settings.spare_heads:
        inputs["measure.sweep.spare_heads"] = Provenance(heads_inputs(run)).fingerprint
    forms = [f"{task}_{protocol}" for task in settings.tasks for protocol in settings.protocols]
    inputs["measure.sweep.tasks (files)"] = tasks_fingerprint(forms or settings.tasks, settings.include_path)
    if settings.data_dir is not None:
        inputs["measure.sweep.data_dir (files)"] = local_data_fingerprint(settings.data_dir, settings.include_path)
    if settings.perplexity_tokens:
        inputs["measure.sweep.perplexity_data (content)"] = sources_fingerprint(settings.perplexity_data)
    if run.sweep_donor is not None:
        inputs[DONOR_CONTENT] = model_fingerprint(run.sweep_donor)
    return inputs


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
    for probe in settings.probes:
        load_labelled(probe.source, probe.label)
    if settings.heads is not None:
        _head_prompts(run)
    for name, wanted in (("diagnostics", settings.diagnostics), ("probes", settings.probes), ("heads", settings.heads)):
        if wanted and _is_streamed(run):
            raise UserError(
                f"measure.{name}: takes the whole model in memory; leave it out, or raise measure.memory_gb above the "
                "weights"
            )
    if settings.images is not None:
        _check_images(run, settings.images, "measure.images")
    if settings.vision_states is not None:
        _check_images(run, settings.vision_states, "measure.vision_states")
        _check_tower(run)
    if settings.sweep is not None:
        _check_sweep(run, settings.sweep)


def _check_images(run: Run, settings: ImageRows, place: str) -> None:
    config = run.config()
    if not reads_images(config):
        raise UserError(f"{place}: {run.recipe.model} reads no images; leave it out")
    if _is_streamed(run):
        raise UserError(
            f"{place}: takes the whole model in memory; leave it out, or raise measure.memory_gb above the weights"
        )
    next(asked(load_image_rows(settings, place)[:1], _processor(run), config))


def _check_tower(run: Run) -> None:
    from shoal.compress.surgery.vision_tower import READERS, TOWERS, states_read

    if not states_read(run.config()):
        raise UserError(
            f"measure.vision_states: shoal does not know which states of its vision tower {run.recipe.model} "
            f"({run.config().model_type}) reads; leave it out (known: {', '.join(READERS)} with {', '.join(TOWERS)})"
        )


def _processor(run: Run) -> Any:
    return load_processor(run.teacher, trust_remote_code=run.recipe.trust_remote_code)


def _check_removals(run: Run) -> None:
    """Refuse greedy orders of more removals than the model, of several rounds that of the last, has layers for."""
    from shoal.compress.metrics.registry import METRICS
    from shoal.compress.plan import drops_by_round

    measure, rounds = run.recipe.measure, run.recipe.prune.rounds
    before = drops_by_round(run.recipe.prune, run.num_layers)[:-1] if rounds > 1 else ()
    fewest, model = run.num_layers - sum(before), "the model of the last round" if rounds > 1 else "the model"
    orders = [name for name in measure.metrics if name in METRICS and METRICS[name].yields == "order"]
    greedy = None if measure.sweep is None else measure.sweep.greedy
    for setting, count in (("num_drop", measure.num_drop if orders else None), ("sweep.greedy", greedy)):
        if count is not None and count > fewest - 2:
            raise UserError(
                f"measure.{setting}: {count} removals are more than {model} allows, which has {fewest} layers of which "
                f"the first and the last stay; set at most {fewest - 2}"
            )


def _check_sweep(run: Run, settings: Sweeps) -> None:
    from shoal.compress.edits.layer_edits import num_components
    from shoal.compress.sweeps.sweep import checked_tasks, refuse_few_items

    config, tokenizer = run.config(), run.tokenizer()
    tasks, counts = checked_tasks(settings, config, tokenizer)
    num_removals = max((num_components(operator, text_config(config)) for operator in settings.operators), default=1)
    _check_disputed(settings, tasks)
    if settings.perplexity_tokens:
        check_length(run, settings.sequence_length, "measure.sweep.sequence_length")
    refuse_few_items(settings, counts, tokenizer, num_removals=num_removals)
    scored = [*tasks, *(["perplexity"] if settings.perplexity_tokens else [])]
    if unknown := sorted(settings.greedy_weights.keys() - set(scored)):
        raise UserError(f"measure.sweep.greedy_weights: {unknown[0]!r} is not scored; there is {', '.join(scored)}")
    if settings.greedy is not None:
        _check_mean(settings, tasks)
    if _is_streamed(run):
        _check_streamed_sweep(settings, {name: task.OUTPUT_TYPE for name, task in tasks.items()})
    if "cumulative" not in settings.operators:
        return
    if isinstance(settings.order, tuple):
        _check_order(settings.order, run.num_layers)
    else:
        _check_order_name(run, settings.order, settings)


def _check_mean(settings: Sweeps, tasks: dict[str, Any]) -> None:
    """Refuse a greedy order by scores that have no mean, before the first round of it is scored."""
    from shoal.eval.harness.samples import metric_of, rises

    weights = settings.greedy_weights
    if weights and not any(weights.values()):
        raise UserError(
            f"measure.sweep.greedy_weights: {weights} give no mean; give one task a weight above 0 at least"
        )
    metrics = {name: metric_of(task, list(task.higher_is_better())) for name, task in tasks.items()}
    higher = {name: rises(tasks[name], metric) for name, metric in metrics.items()}
    if settings.perplexity_tokens:
        higher["perplexity"] = False
    shares, in_nats = ([name for name, rising in higher.items() if rising is kind] for kind in (True, False))
    if in_nats and shares and not weights:
        raise UserError(
            f"measure.sweep.greedy: {in_nats[0]} is in nats and {shares[0]} a share, which have no unit in common; "
            "give each task a weight in measure.sweep.greedy_weights"
        )


def _check_disputed(settings: Sweeps, tasks: dict[str, Any]) -> None:
    """Warn of tasks that people answer in different ways, and refuse to remove layers by what they dispute."""
    asked = {name: [doc["shares"] for doc in task.eval_docs if "shares" in doc] for name, task in tasks.items()}
    for name, shares in ((name, shares) for name, shares in asked.items() if shares):
        log.warning(
            "measure.sweep.tasks: %s asks what people answer in different ways (the most frequent answer is that of "
            "%.0f %% of them), so its scores say less of layers than those of questions with one right answer",
            *(name, 100 * fmean(map(max, shares))),
        )
    disputed = [name for name, task in tasks.items() if (task.config.metadata or {}).get("column") == "disputed"]
    choosing = [name for name in disputed if settings.greedy_weights.get(name, not settings.greedy_weights)]
    if settings.greedy is not None and choosing:
        raise UserError(
            f"measure.sweep.greedy: {', '.join(choosing)} asks items that people dispute, which choose no layers; "
            "leave it out of measure.sweep.tasks, or give the others weights in measure.sweep.greedy_weights"
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


def _is_streamed(run: Run) -> bool:
    """Whether the model is larger than what the recipe lets it take, so that it is measured layer by layer."""
    limit = run.recipe.measure.memory_gb
    return limit is not None and loaded_bytes(run.base, run.config(), run.recipe.dtype) > limit * 2**30


def _streaming(run: Run) -> Streaming:
    from shoal.compress.variants.streamed import Streaming

    limit = run.recipe.measure.memory_gb
    assert limit is not None
    return Streaming(memory_bytes=int(limit * 2**30), device=device(), spill_folder=run.dir, **run.load_args())


def measured(
    run: Run,
) -> dict[str, tuple[type[Importance | Heads | VisionStates | Diagnostics | Probes], dict[str, Any]]]:
    """What the recipe wants measured, by name: the kind of the result, and what identifies it."""
    settings = run.recipe.measure
    return {
        "measure": (Importance, measure_inputs(run)),
        **({"heads": (Heads, heads_inputs(run))} if settings.heads else {}),
        **({"vision states": (VisionStates, _vision_inputs(run))} if settings.vision_states else {}),
        **({"diagnostics": (Diagnostics, _diagnostics_inputs(run))} if settings.diagnostics else {}),
        **({"probes": (Probes, _probes_inputs(run))} if settings.probes else {}),
    }


def measure(run: Run) -> None:
    """importance.json and its figures, and the other files of this stage where they are asked for.

    All ranks take part.
    """
    wanted = measured(run)
    due = {name for name, (kind, inputs) in wanted.items() if not is_done(kind, run.dir / kind.FILE, inputs, name)}
    if not due:
        return
    check_measure(run)
    if reads_images(run.config()) and run.recipe.measure.images is None:
        log.warning(
            "measure: %s reads images and is measured with text alone, which says nothing of what layers do for images",
            run.recipe.model,
        )
    run.dir.mkdir(parents=True, exist_ok=True)  # layers that are streamed are spilled there
    seed_everything(run.recipe.seed)
    rows = _rows(run) if due & {"measure", "diagnostics"} else None
    model = None if _is_streamed(run) else load_model(run.base, device=device(), **run.load_args())
    if "heads" in due:
        if is_main():
            _measure_heads(run, model)
        barrier()
    if "measure" in due:
        assert rows is not None
        importance = _measured(run, model, rows, wanted["measure"][1])
        if is_main():
            _write(run, importance)
        barrier()
    if "vision states" in due:
        _measure_vision_states(run, model)
    if "diagnostics" in due and is_main():
        assert rows is not None
        _diagnose(run, model, rows)
    if "probes" in due and is_main():
        _probe(run, model)
    barrier()


def _rows(run: Run) -> PackedRows:
    settings = run.recipe.measure
    log.info("measure: %s over %s tokens", ", ".join(settings.metrics), f"{settings.num_tokens:,}")
    return pack(
        [(source, load_texts(source, max_characters=16 * settings.num_tokens)) for source in settings.data],
        run.tokenizer(),
        sequence_length=settings.sequence_length,
        num_tokens=settings.num_tokens,
        seed=run.recipe.seed,
    )


def _measured(run: Run, model: Any, rows: PackedRows, inputs: dict[str, Any]) -> Importance:
    from shoal.compress.measure import measure_importance
    from shoal.compress.streamed import measure_streamed

    settings = run.recipe.measure
    common: dict[str, Any] = {"metrics": settings.metrics, "batch_size": settings.batch_size}

    def scored() -> Importance:
        if model is None:
            scores = measure_streamed(run.base, rows, streaming=_streaming(run), **common)
        else:
            scores = measure_importance(
                model,
                rows,
                num_drop=settings.removals(len(run.base_layers)),
                seed=run.recipe.seed,
                scale_removals=settings.scale_removals,
                **common,
            )
            if settings.images is not None:
                scores = _with_images(run, model, settings.images, scores)
        kept = () if run.base_layers == tuple(range(run.num_layers)) else run.base_layers
        return Importance(Provenance(inputs), **vars(scores), kept=kept)

    return scored() if settings.sweep is None else _swept(run, model, rows, settings.sweep, scored)


def _with_images(run: Run, model: Any, settings: ImageRows, scores: Scores) -> Scores:
    """``scores`` and the columns of images."""
    from shoal.compress.metrics.images import image_scores

    return scores.beside(image_scores(model, *_own_rows(run, settings, "measure.images")))


def _own_rows(run: Run, settings: ImageRows, place: str) -> tuple[Iterator[Asked], int]:
    """What the model is given for this rank's rows, and how many rows there are in all."""
    from shoal.compress.metrics.metric import rank, world_size

    rows = load_image_rows(settings, place)
    return asked(rows[rank() :: world_size()], _processor(run), run.config()), len(rows)


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
    skeleton = _streaming(run).open(run.base).model if model is None else model
    sweep = _sweep(run, model, settings)
    known = {operator: components_of(operator, skeleton) for operator in settings.operators if operator != "cumulative"}
    if settings.spare_heads:
        known = _without_retrieval_heads(known, read_heads(run), skeleton)
    importance = scored()
    donor = measure_inputs(run).get(DONOR_CONTENT)
    identity = fingerprint([model_fingerprint(run.base), run.recipe.dtype, run.recipe.attention, donor])
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
        order = _task_order(run, sweep, settings, _removal_factors(run, model, rows), identity)
        importance = replace(importance, orders={**importance.orders, TASK_ORDER: order})
    return importance


def _without_retrieval_heads(
    known: Mapping[str, tuple[Component, ...]], heads: Heads, model: Any
) -> dict[str, tuple[Component, ...]]:
    """Components by operator, but for heads that copy what is asked for and key-value groups that serve one.

    Raises:
        UserError: no component is left of an operator.
    """
    from shoal.compress.edits.layer_edits import layer_edits

    spared = set(heads.retrieval_heads)

    def copies(component: Component) -> bool:
        return component.index is not None and any(
            (layer, head) in spared for layer, edit in layer_edits([component], model) for head in edit.indices
        )

    left = {operator: tuple(part for part in components if not copies(part)) for operator, components in known.items()}
    if (empty := next((operator for operator, components in left.items() if not components), None)) is not None:
        raise UserError(f"measure.sweep.spare_heads: every {empty} copies what is asked for; leave it out")
    log.info("measure: %d retrieval heads are spared", len(spared))
    return left


def _task_order(
    run: Run, sweep: Callable[..., Any], settings: Sweeps, factors: Mapping[int, float] | None, identity: str
) -> tuple[Removal, ...]:
    """The layers in the order in which the tasks' mean score can best do without them; the first and last one stay."""
    from shoal.compress.metrics.greedy import TASK_ORDER, greedy_order, layer_components, task_objective

    rounds = itertools.count()

    def evaluate(variants: Any) -> Any:
        folder = run.dir / "sweep" / TASK_ORDER / str(next(rounds))
        return sweep(variants, settings, seed=run.recipe.seed, folder=folder, identity=identity)[1]

    return greedy_order(
        layer_components(len(run.base_layers), protected=(0, -1)),
        task_objective(evaluate, weights=settings.greedy_weights or None),
        num_removals=settings.greedy,
        higher_is_better=True,
        factors=factors,
        name=TASK_ORDER,
    )


def _removal_factors(run: Run, model: Any, rows: PackedRows) -> Mapping[int, float] | None:
    """Layer -> times which it hands on its input where it is removed; None where it just does."""
    from shoal.compress.metrics.metric import Calibration
    from shoal.compress.metrics.variant_losses import removal_factors

    if not run.recipe.measure.scale_removals:
        return None
    return removal_factors(model, Calibration(rows, run.recipe.measure.batch_size))


def _sweep(run: Run, model: Any, settings: Sweeps) -> Callable[..., Any]:
    """What scores variants of ``model``; where there is none, of the checkpoint, layer by layer."""
    from shoal.compress.sweeps.sweep import StreamedVariantsLM, VariantsLM, sweep
    from shoal.compress.variants.variants import Edited

    donor = run.sweep_donor
    tokenizer = run.tokenizer()
    if model is None:
        lm = partial(StreamedVariantsLM, run.base, tokenizer, streaming=_streaming(run), donor=donor)
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
    _check_order(settings.order, num_layers)
    return settings.order


def _check_order(order: tuple[int, ...], num_layers: int) -> None:
    wrong = next((layer for layer in order if not 0 <= layer < num_layers or order.count(layer) > 1), None)
    if wrong is not None or not order or len(order) == num_layers:
        raise UserError(
            f"measure.sweep.order: must name some of the layers 0..{num_layers - 1}, each once and not all "
            f"(got {list(order)})"
        )


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
            for line in importance.atlas.read_write.in_words(importance.atlas.sweep, importance.teacher_layers):
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
    return {**run.base_identity, **content, **settings}


def heads_inputs(run: Run) -> dict[str, Any]:
    """What identifies heads.json."""
    settings = run.recipe.measure.heads
    assert settings is not None
    return {**_inputs(run, Shapes.HEADS), **shaping(settings, Shapes.HEADS, "measure.heads.")}


def read_heads(run: Run) -> Heads:
    """heads.json, as the recipe asks for it.

    Raises:
        UserError: it is not there, or was made by other settings.
    """
    path = run.dir / Heads.FILE
    require(Heads, path, heads_inputs(run), "shoal measure")
    return Heads.read(path)


def _head_prompts(run: Run) -> dict[HeadTask, list[CopyPrompt]]:
    """The prompts by task.

    Raises:
        UserError: prompts that the model has no positions for, or that its tokenizer cannot make.
    """
    from shoal.compress.heads.prompts import copy_prompts

    settings = run.recipe.measure.heads
    assert settings is not None
    prompts = copy_prompts(settings.tasks, settings.num_each, run.tokenizer(), seed=run.recipe.seed)
    for task, own in prompts.items():
        check_length(run, max(len(prompt.input_ids) for prompt in own), f"measure.heads.tasks: {task}")
    return prompts


def _measure_heads(run: Run, model: Any) -> None:
    from shoal.compress.heads.patching import patch_effects
    from shoal.compress.heads.prompts import copy_twins
    from shoal.compress.heads.scores import score_heads
    from shoal.figures.heads import heads_figure
    from shoal.figures.style import save_figure

    settings = run.recipe.measure.heads
    assert settings is not None
    tasks = []
    for task, prompts in _head_prompts(run).items():
        head_scores = score_heads(model, prompts, batch_size=run.recipe.measure.batch_size)
        tasks.append(TaskHeads(task, len(prompts), head_scores.num_right, head_scores.scores))
    num_twins, patched = {}, ()
    if settings.twins:
        num_twins, patched = patch_effects(model, copy_twins(settings.twins, run.tokenizer(), seed=run.recipe.seed))
    heads = Heads(Provenance(heads_inputs(run)), run.num_layers, tuple(tasks), num_twins, patched)
    heads.write(run.dir / Heads.FILE)
    save_figure(heads_figure(heads), run.dir / "figures" / "heads.svg")
    log.info("measure: %s", heads.in_words())


def _vision_inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.measure.vision_states
    rows = [] if settings is None else load_image_rows(settings, "measure.vision_states")
    return {**_inputs(run, Shapes.VISION), "measure.vision_states (content)": image_rows_fingerprint(rows)}


def _measure_vision_states(run: Run, model: Any) -> None:
    """All ranks take part."""
    from shoal.compress.metrics.vision_states import score_vision_states
    from shoal.compress.surgery.vision_tower import states_read
    from shoal.figures.style import save_figure
    from shoal.figures.vision_states import vision_states_figure

    settings = run.recipe.measure.vision_states
    assert settings is not None
    items, num_rows = _own_rows(run, settings, "measure.vision_states")
    state_scores = score_vision_states(model, items, num_rows)
    if not is_main():
        return
    states = VisionStates(
        Provenance(_vision_inputs(run)),
        states_read(run.config()),
        num_rows,
        state_scores.similarity,
        state_scores.losses.values,
        tuple(None if math.isnan(error) else error for error in state_scores.losses.standard_errors),
    )
    states.write(run.dir / states.FILE)
    save_figure(vision_states_figure(states), run.dir / "figures" / "vision_states.svg")
    log.info("measure: %s", states.in_words())


def _diagnostics_inputs(run: Run) -> dict[str, Any]:
    return _inputs(run, Shapes.DIAGNOSTICS, data=sources_fingerprint(run.recipe.measure.data))


def _diagnose(run: Run, model: Any, rows: PackedRows) -> None:
    from shoal.compress.depth.diagnostics import Effort, diagnose
    from shoal.figures.diagnostics import diagnostics_figure
    from shoal.figures.style import save_figure

    diagnostics = diagnose(
        model,
        rows,
        provenance=Provenance(_diagnostics_inputs(run)),
        batch_size=run.recipe.measure.batch_size,
        effort=Effort(gradient_prompts=run.recipe.measure.gradient_prompts),
        seed=run.recipe.seed,
    )
    diagnostics.write(run.dir / diagnostics.FILE)
    save_figure(diagnostics_figure(diagnostics), run.dir / "figures" / "diagnostics.svg")
    log.info("measure: %s", diagnostics.in_words())


def _probes_inputs(run: Run) -> dict[str, Any]:
    content = sources_fingerprint([probe.source for probe in run.recipe.measure.probes])
    return {**_inputs(run, Shapes.PROBES), "measure.probes (content)": content}


def _probe(run: Run, model: Any) -> None:
    from shoal.compress.depth.probes import probe_depth
    from shoal.figures.diagnostics import probes_figure
    from shoal.figures.style import save_figure

    settings = run.recipe.measure
    tokenizer = run.tokenizer()
    sets = []
    for probe in settings.probes:
        sets.append(probe_depth(model, tokenizer, probe, batch_size=settings.batch_size, seed=run.recipe.seed))
        log.info("measure: %s", sets[-1].in_words())
    probes = Probes(Provenance(_probes_inputs(run)), run.num_layers, tuple(sets))
    probes.write(run.dir / probes.FILE)
    save_figure(probes_figure(probes), run.dir / "figures" / "probes.svg")
