"""The measure stage: importance.json, heads.json, vision_states.json, diagnostics.json, probes.json, their figures."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.depth import Diagnostics, Probes
from shoal.artifacts.heads import Heads, TaskHeads
from shoal.artifacts.importance import Importance, Removal
from shoal.artifacts.vision_states import VisionStates
from shoal.atomic_files import fingerprint
from shoal.components import Component
from shoal.data.image_rows import Asked, asked, image_rows_fingerprint, load_image_rows
from shoal.data.packing import PackedRows
from shoal.data.sources import load_texts, pack, sources_fingerprint
from shoal.errors import UserError
from shoal.models.checkpoint_files import WRITING, model_fingerprint, writing_settings
from shoal.models.load import load_model, reads_images
from shoal.progress import doing
from shoal.recipe.measure import Sweeps
from shoal.recipe.section import ImageRows, Shapes, shaping
from shoal.runtime import barrier, device, is_main, seed_everything

from .measure_checks import check_measure, check_order, head_prompts, is_streamed, processor_of
from .run import Run, is_done, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shoal.compress.measure import Scores
    from shoal.compress.variants.streamed import Streaming

log = logging.getLogger(__name__)
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
    if writing := writing_settings(run.base):
        inputs[WRITING] = writing
    return inputs


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
    model = None if is_streamed(run) else load_model(run.base, device=device(), **run.load_args())
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
    return asked(rows[rank() :: world_size()], processor_of(run), run.config()), len(rows)


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
    inputs = importance.provenance.inputs
    own = [model_fingerprint(run.base), run.recipe.dtype, run.recipe.attention, inputs.get(DONOR_CONTENT)]
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


def _measure_heads(run: Run, model: Any) -> None:
    from shoal.compress.heads.patching import patch_effects
    from shoal.compress.heads.prompts import copy_twins
    from shoal.compress.heads.scores import score_heads
    from shoal.figures.heads import heads_figure
    from shoal.figures.style import save_figure

    settings = run.recipe.measure.heads
    assert settings is not None
    tasks = []
    for task, prompts in head_prompts(run).items():
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
