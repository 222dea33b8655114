"""The measure stage: importance.json and its figures, and what measuring refuses before a weight is loaded."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.identity import Identity
from shoal.artifacts.importance import Importance, Removal
from shoal.atomic_files import fingerprint
from shoal.components import Component
from shoal.data.packing import PackedRows, require_room
from shoal.data.sources import load_texts, sources_fingerprint
from shoal.errors import UserError
from shoal.models.anatomy import refuse_text_alone
from shoal.models.checkpoint_files import WRITING, model_fingerprint, writing_settings
from shoal.models.load import load_model, reads_images, rooms_to_share
from shoal.progress import doing
from shoal.ranks import is_main
from shoal.recipe.evaluate import Eval
from shoal.recipe.measure import GREEDY
from shoal.recipe.section import Shapes, shaping
from shoal.runtime import agreed, device, everyone_sees, seed_everything
from shoal.stopping import passing_folder

from .run import OFFLOADED, Run, check_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shoal.compress.sweeps.table import Measured
    from shoal.compress.variants.variants import Edited

log = logging.getLogger(__name__)


def importance_of(run: Run) -> Identity[Importance]:
    """importance.json as this recipe makes it."""
    return Identity(Importance, run.dir / Importance.FILE, measure_inputs(run), "measure")


def measure_inputs(run: Run) -> dict[str, Any]:
    """What identifies importance.json."""
    inputs: dict[str, Any] = {"model": run.teacher_fingerprint, "data": sources_fingerprint(run.recipe.measure.data)}
    inputs |= shaping(run.recipe, Shapes.IMPORTANCE) | shaping(run.recipe.measure, Shapes.IMPORTANCE, "measure.")
    if {*GREEDY} & {*run.recipe.measure.metrics}:
        inputs["measure.num_removals"] = run.num_removals
    return inputs if run.swept is None else inputs | sweep_inputs(run, run.swept)


def sweep_inputs(run: Run, settings: Eval) -> dict[str, Any]:
    """What identifies the scores of variants, which ``settings`` score."""
    from shoal.eval.tasks.names import local_data_fingerprint, tasks_fingerprint

    assert run.recipe.measure.sweep is not None
    inputs = shaping(run.recipe.measure.sweep, Shapes.SCORES, "measure.sweep.")
    inputs |= shaping(settings, Shapes.IMPORTANCE, "eval.")
    inputs["measure.sweep.tasks (files)"] = tasks_fingerprint(settings.tasks, settings.include_path)
    if settings.data_dir is not None:
        inputs["eval.data_dir (files)"] = local_data_fingerprint(settings.data_dir, settings.include_path)
    if writing := writing_settings(run.teacher):
        inputs[WRITING] = writing
    return inputs


def measure(run: Run) -> None:
    """importance.json and its figures. All ranks take part."""
    asked = importance_of(run)
    if agreed(asked.is_done):
        return
    check_measure(run)
    _check_metrics(run)
    if reads_images(run.config()):
        log.warning(
            "measure: %s reads images, but is measured with text only, so the layers' role for images is not measured",
            run.recipe.model,
        )
    run.dir.mkdir(parents=True, exist_ok=True)
    seed_everything(run.recipe.seed)
    rows = packed_rows(run)
    with passing_folder(run.dir, OFFLOADED) as folder:
        model = load_model(run.teacher, device=device(), offload=folder, **run.load_args())
        importance = _measured(run, model, rows, asked.inputs)
    if is_main():
        _write(run, importance)
    everyone_sees(run.dir / Importance.FILE)


def check_measure(run: Run) -> None:
    """Refuse what measuring would refuse, before any weight is loaded.

    Raises:
        UserError: rows longer than the model's positions, contradicting settings, unknown tasks or unreadable data.
    """
    settings = run.recipe.measure
    refuse_text_alone(run.config())
    check_length(run, settings.sequence_length, "measure.sequence_length")
    require_room(settings.num_tokens, "measure.num_tokens")
    if device().type == "cpu":  # of a GPU only the process asks that computes on it: whoever asks holds memory there
        _check_metrics(run)
    for source in settings.data:
        load_texts(source, max_characters=1)
    if run.swept is not None:
        from shoal.compress.metrics.greedy import TASK_ORDER
        from shoal.compress.sweeps.sweep import checked_tasks

        tasks = checked_tasks(run.swept, run.config(), run.tokenizer(), num_removals=run.num_layers)
        if TASK_ORDER in settings.metrics:
            _check_mean(tasks)


def _check_metrics(run: Run) -> None:
    """Refuse metrics that change or take apart weights which are not all in memory."""
    from shoal.compress.metrics.registry import METRICS

    measure = run.recipe.measure
    needy = [name for name in measure.metrics if METRICS[name].needs in ("gradients", "weights")]
    if needy and rooms_to_share(run.teacher, run.config(), run.recipe.dtype, device()):
        raise UserError(
            f"measure.metrics: {needy[0]} needs all weights in memory, more than is free on {device()}; remove it, "
            "or measure on a larger machine"
        )


def _check_mean(tasks: dict[str, Any]) -> None:
    """Refuse a greedy order by scores that have no mean, before the first round of it is scored."""
    from shoal.eval.harness.samples import metric_of, rises

    rising = {name: rises(task, metric_of(task, list(task.higher_is_better()))) for name, task in tasks.items()}
    if len(set(rising.values())) > 1:
        in_nats = ", ".join(name for name, is_share in rising.items() if not is_share)
        raise UserError(
            f"measure.metrics: task_greedy takes the mean of scores, but {in_nats} is a loss and the others are "
            "shares; remove one kind from measure.sweep.tasks"
        )


def packed_rows(run: Run) -> PackedRows:
    """The text of `measure` as rows of tokens."""
    from shoal.compress.changes.calibration import calibration_rows

    settings = run.recipe.measure
    log.info("measure: %s over %s tokens", ", ".join(settings.metrics), f"{settings.num_tokens:,}")
    return calibration_rows(settings, run.tokenizer(), seed=run.recipe.seed)


def _measured(run: Run, model: Any, rows: PackedRows, inputs: dict[str, Any]) -> Importance:
    from shoal.compress.edits.layer_edits import components_of
    from shoal.compress.measure import measure_importance
    from shoal.compress.metrics.greedy import TASK_ORDER
    from shoal.compress.sweeps.atlas import atlas_of
    from shoal.compress.sweeps.columns import rankings
    from shoal.compress.variants.variants import Edited

    settings, swept = run.recipe.measure, run.recipe.measure.sweep
    # what layers refuse to be without is refused before anything is measured
    units = {operator: components_of(operator, model) for operator in (swept.operators if swept else ())}
    scores = measure_importance(
        model,
        rows,
        metrics=settings.metrics,
        batch_size=settings.batch_size,
        num_drop=run.num_removals,
        seed=run.recipe.seed,
    )
    importance = replace(scores, provenance=Provenance(inputs, model=run.recipe.model))
    edited = Edited(model)
    for operator, table in sweep_tables(run, edited, units).items():
        if operator == "layer":
            with doing("measure: intervals of the ablation"):
                importance = replace(importance, atlas=atlas_of(*table, metrics=rankings(importance)))
        else:
            importance = replace(importance, sweeps={**importance.sweeps, operator: table[0]})
    if TASK_ORDER in settings.metrics:
        order = _task_order(run, _scoring(run, edited))
        importance = replace(importance, orders={**importance.orders, TASK_ORDER: order})
    return importance


def sweep_tables(
    run: Run, edited: Edited, units: Mapping[str, Sequence[Component]], *, donor: str | None = None
) -> dict[str, tuple[Any, tuple[Measured, ...]]]:
    """By operator the table of what the tasks of measure.sweep score without each of its ``units``, and what it was
    computed from; scores of items go to sweep/ in the run directory. ``donor``: what identifies a model whose layers
    are put in."""
    from shoal.compress.sweeps.table import table_of, write_items
    from shoal.compress.variants.variants import variant_of

    if not units:
        return {}
    score, tables = _scoring(run, edited, donor), {}
    for operator, components in units.items():
        log.info("measure: ablation with operator %s, %d variants", operator, len(components))
        folder = run.dir / "sweep" / operator
        intact, removed = score([variant_of(component, edited.model) for component in components], folder=folder)
        if is_main():
            write_items(folder, [component.name for component in components], intact, removed)
        tables[operator] = table_of(operator, components, intact, removed)
    return tables


def _scoring(run: Run, edited: Edited, donor: str | None = None) -> Callable[..., Any]:
    """What scores variants of ``edited`` on the tasks of measure.sweep, given these and a folder for their answers."""
    from shoal.compress.sweeps.sweep import sweep

    assert run.swept is not None
    own = [model_fingerprint(run.teacher), run.recipe.dtype, run.recipe.attn_implementation, donor]
    writing = writing_settings(run.teacher)
    return partial(
        sweep,
        edited,
        run.tokenizer(),
        settings=run.swept,
        seed=run.recipe.seed,
        identity=fingerprint([*own, writing] if writing else own),
    )


def _task_order(run: Run, score: Callable[..., Any]) -> tuple[Removal, ...]:
    """The layers in the order in which the tasks' mean score can best do without them; the first and last one stay."""
    from shoal.compress.metrics.greedy import TASK_ORDER, greedy_order, layer_components, task_objective

    rounds = itertools.count()

    def evaluate(variants: Any) -> Any:
        return score(variants, folder=run.dir / "sweep" / TASK_ORDER / str(next(rounds)))[1]

    return greedy_order(
        layer_components(run.num_layers, protected=(0, -1)),
        task_objective(evaluate),
        num_removals=run.num_removals,
        higher_is_better=True,
        name=TASK_ORDER,
    )


def _write(run: Run, importance: Importance) -> None:
    from shoal.figures.style import save_figure

    importance.save(run.dir / Importance.FILE)
    with doing("measure: drawing figures"):
        for name, figure in _figures(importance):
            save_figure(figure, run.dir / "figures" / f"{name}.svg")
    for note in importance.atlas.notes if importance.atlas is not None else ():
        log.info("measure: %s", note)
    log.info("measure: %s", run.dir / Importance.FILE)


def _figures(importance: Importance) -> Iterator[tuple[str, Figure]]:
    from shoal.figures.atlas import agreement_figure, atlas_figure, curves_figure
    from shoal.figures.layers import importance_figure

    if importance.layers or importance.runs:
        yield "importance", importance_figure(importance)
    if importance.atlas is not None:
        yield "atlas", atlas_figure(importance)
        yield "agreement", agreement_figure(importance.atlas.agreement)
    for operator, table in importance.sweeps.items():
        yield operator, curves_figure(table)
