"""What the layers of a model in memory are worth, which of them go, and the model without these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.components import require_layers
from shoal.compress.apply import apply_plan, changes_of, num_tokens_of
from shoal.compress.edits.layer_edits import components_of
from shoal.compress.measure import measure_importance as scores_of
from shoal.compress.metrics.greedy import TASK_ORDER
from shoal.compress.metrics.metric import Calibration
from shoal.compress.plan import choose_changes
from shoal.compress.surgery import cut_model as surgery
from shoal.compress.sweeps.atlas import build_atlas
from shoal.compress.sweeps.columns import rankings
from shoal.compress.sweeps.sweep import checked_tasks, sweep
from shoal.compress.variants.variants import Edited, variant_of
from shoal.data.default_text import is_auto, with_default_text
from shoal.data.packing import PackedRows, require_room
from shoal.data.sources import Given, is_source, sources_of
from shoal.data.streams import pack
from shoal.errors import UserError
from shoal.eval.tasks.names import tasks_fingerprint
from shoal.models.anatomy import decoder_layers, require_positions
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.in_memory import (
    WEIGHTS,
    Model,
    as_model,
    has_weights,
    identity_of,
    left_as_it_was,
    require_tokenizer,
    weights_of,
)
from shoal.models.load import load_model, without_data
from shoal.recipe.evaluate import Eval
from shoal.recipe.measure import Measure, Sweeps, num_removals, scored_by
from shoal.recipe.messages import checked
from shoal.recipe.prune import CutByScore, CutThese
from shoal.recipe.recipe import of_arguments
from shoal.recipe.section import AUTO, Section, Shapes, TextSource, shaping

from .settings import MeasureSettings


def measure_importance(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Given = AUTO,
    *,
    metrics: str | Sequence[str] = Measure.metrics,
    seed: int = 0,
    **settings: Unpack[MeasureSettings],
) -> Importance:
    """Measure the importance of each decoder layer of ``model`` on ``data``. Higher = keep.

    The model stays on its device and in its precision. It is not changed.

    Args:
        model: A causal language model, or its name.
        tokenizer: The tokenizer. Default: the one with the model's name.
        data: Texts, rows, or the name of a data set; repeated if too short. `auto`: the text of `measure.data: auto`.
        metrics: Names of `shoal list metrics`. Greedy metrics remove a quarter of the layers.
        seed: Seed for the order of the texts and for metrics that sample.
        settings: Other keys of the recipe's section `measure`, with its defaults. `sweep` is a mapping of `tasks` and
            `limit`.

    Returns:
        `layers[metric][layer]` is a layer's score. `runs[metric][n - 1][layer]` is the score of n neighbouring layers,
        the first of which is `layer`. `atlas` is the ablation.

    Raises:
        UserError: an unknown name, too few items, no text, rows that are too long, or scores that are not finite.

    Example:
        >>> shoal.measure_importance(model, tokenizer, texts, num_tokens=2_000).layers["block_influence"][3]
    """
    model = as_model(model)
    data = with_default_text(data, model, TextSource(AUTO))
    named: dict[str, Any] = {"metrics": metrics, **({"data": data} if is_source(data) else {})}
    taken, source = (*named, *MeasureSettings.__annotations__), "shoal.measure_importance"
    if metrics == TASK_ORDER or (isinstance(metrics, list | tuple) and TASK_ORDER in metrics):
        raise UserError(f"{source}: task_greedy needs a run directory; pass a recipe to shoal.run")
    section: Measure = of_arguments("measure", {**named, **settings}, taken=taken, source=source, seed=seed)
    tokenizer = require_tokenizer(tokenizer, model)
    seed = int(seed)  # a number of numpy's is no JSON
    require_positions(model.config, section.sequence_length, "measure.sequence_length")
    require_room(section.num_tokens, "measure.num_tokens")
    _refuse_sweep(section.sweep, model, tokenizer)
    rows = _rows(section.data if is_source(data) else data, tokenizer, section, section.num_tokens, seed=seed)
    with left_as_it_was(model):
        scores = scores_of(
            model,
            rows,
            metrics=section.metrics,
            batch_size=section.batch_size,
            num_drop=num_removals(CutByScore(), len(decoder_layers(model))),
            seed=seed,
        )
        inputs = identity_of(model, seed=seed) | {WEIGHTS: weights_of(model), "rows": rows.fingerprint}
        inputs |= shaping(section, Shapes.IMPORTANCE, "measure.")
        del inputs["measure.data"]  # `rows` says what it was
        found = replace(scores, provenance=Provenance(inputs, model=inputs["model"]))
        return found if section.sweep is None else _swept(found, model, tokenizer, section.sweep, seed=seed)


def _rows(
    data: Given, tokenizer: PreTrainedTokenizerBase, settings: Measure, num_tokens: int, *, seed: int
) -> PackedRows:
    """So many tokens of ``data`` in rows as long as ``settings`` say."""
    texts = sources_of(data, loss_on=None if is_source(data) else "all", num_tokens=num_tokens)
    return pack(texts, tokenizer, sequence_length=settings.sequence_length, num_tokens=num_tokens, seed=seed)


def _refuse_sweep(settings: Sweeps | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if settings is None:
        return
    if settings.operators != ("layer",):
        raise UserError(
            "shoal.measure_importance: sweep: a model in memory supports only single layers; remove operators, or "
            "pass a complete recipe to shoal.run"
        )
    checked_tasks(scored_by(settings, Eval()), model.config, tokenizer, num_removals=len(decoder_layers(model)))


def _swept(
    importance: Importance, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Sweeps, *, seed: int
) -> Importance:
    """``importance`` with the atlas of single layers."""
    variants = [variant_of(component, model) for component in components_of("layer", model)]
    intact, removed = sweep(Edited(model), tokenizer, variants, scored_by(settings, Eval()), seed=seed)
    inputs = {
        **importance.provenance.inputs,
        **shaping(settings, Shapes.SCORES, "measure.sweep."),
        "measure.sweep.tasks (files)": tasks_fingerprint(settings.tasks, None),
    }
    atlas = build_atlas(intact, removed, metrics=rankings(importance))
    return replace(importance, provenance=Provenance(inputs, model=importance.provenance.model), atlas=atlas)


def choose_layers(
    importance: Importance,
    num_drop: int | None = None,
    *,
    ratio: float | None = None,
    metric: str | Mapping[str, float] | None = None,
    contiguous: bool = False,
    protect: Sequence[int | Literal["cornerstone"]] = CutByScore.protect,
    spare: Sequence[str] = (),
) -> Plan:
    """Choose the least important layers.

    Args:
        importance: The result of measure_importance, or `Importance.load("importance.json")`.
        num_drop: Number of layers to drop. Default: one eighth of the layers, unless ``ratio`` is given.
        ratio: Share of the layers to drop, rounded down.
        metric: Metric that chooses. A mapping of metrics to weights uses the weighted mean of each layer's ranks.
            Default: block_influence, or angular if ``contiguous``.
        contiguous: Drop one run of neighbouring layers.
        protect: Layers to keep; negative numbers count from the end.
        spare: Ablation tasks or abilities that must not get significantly worse.

    Returns:
        A plan: `drop` lists the layers, counted from 0, and `reason` explains the choice.

    Raises:
        UserError: both num_drop and ratio are given, the metric was not measured, or no choice meets the conditions.

    Example:
        >>> len(shoal.choose_layers(importance, num_drop=2).drop)
        2
    """
    named = {
        "num_drop": num_drop,
        "ratio": ratio,
        "metric": metric,
        "contiguous": contiguous,
        "protect": protect,
        "spare": spare,
    }
    settings: CutByScore = of_arguments("prune", named, source="shoal.choose_layers")
    Importance.require(importance, "importance")
    choice = choose_changes(settings, num_layers=importance.num_layers, importance=importance)
    inputs = {
        **{name: importance.provenance.inputs.get(name) for name in ("model", "dtype", WEIGHTS)},
        "importance": importance.provenance.fingerprint,
        **shaping(settings, Shapes.PLAN, "prune."),
    }
    origin = Provenance(inputs, model=importance.provenance.model)
    return Plan(origin, importance.num_layers, **vars(choice))


def cut_model(
    model: Model,
    drop: Plan | Sequence[int],
    *,
    changes: str | Sequence[str | Mapping[str, Any]] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Given = AUTO,
) -> PreTrainedModel:
    """Make a new model without the layers ``drop``, in eval mode, with the same dtypes and device.

    ``model`` is not changed and shares no memory with the new model. Without ``changes``, both give the same bits if
    ``model`` skips these layers. The new model's `save_pretrained` writes a plain checkpoint.

    Args:
        model: A causal language model, or its name.
        drop: Layers, counted from 0, in any order; or a plan of choose_layers.
        changes: Changes of the remaining layers, as in `prune.changes`: `["compensate"]`. shoal writes the model to a
            temporary folder to make them.
        tokenizer: The tokenizer for ``changes``. Default: the one with the model's name.
        data: Text for ``changes``: texts, rows, or the name of a data set.

    Raises:
        UserError: a layer that does not exist, all layers, layers that this architecture cannot lose, or a plan for
            another model or with other changes.

    Example:
        >>> student = shoal.cut_model(model, plan)
        >>> student.save_pretrained("student")
    """
    model = as_model(model)
    if isinstance(drop, Plan):
        if (num_layers := len(decoder_layers(model))) != drop.num_layers:
            raise UserError(
                f"drop: the plan is for {drop.num_layers} layers, but the model has {num_layers}; make another plan"
            )
        if not _made_for(drop, model):
            raise UserError(
                f"drop: the plan is for {drop.provenance.model or 'another model'}, and this model has other weights; "
                "make another plan, or pass drop=plan.drop"
            )
        if drop.changes:
            raise UserError(
                f"drop: the plan changes layers that stay ({drop.changes[0].words}); load the student from its "
                "folder, or pass drop=plan.drop and changes"
            )
        drop = drop.drop
    settings = checked(_Cut, {"prune": {"drop": drop, "changes": changes}}, source="shoal.cut_model").prune
    require_layers(settings.drop, len(decoder_layers(model)), "prune.drop")
    if settings.changes:
        return _changed(model, settings, tokenizer, data)
    if tokenizer is not None:
        require_tokenizer(tokenizer, model)
    if not is_auto(data):
        raise UserError("shoal.cut_model: data: only changes are decided on text; remove it, or name changes")
    return surgery.cut_model(model, settings.drop)


def _made_for(plan: Plan, model: PreTrainedModel) -> bool:
    """Whether ``plan`` is one for these weights, wherever they were loaded from, as far as both tell."""
    name, weights, dtype = map(plan.provenance.inputs.get, ("model", WEIGHTS, "dtype"))
    folder = Path(model.config.name_or_path or "")
    if weights is not None:
        return has_weights(model, weights, dtype)
    return name is None or not (folder / "config.json").is_file() or name == model_fingerprint(folder)


@dataclass(frozen=True)
class _Cut(Section):
    prune: CutThese


def _changed(
    model: PreTrainedModel, settings: CutThese, tokenizer: PreTrainedTokenizerBase | None, data: Given
) -> PreTrainedModel:
    """The model that the command writes of a checkpoint of ``model``."""
    tokenizer, made, measured = require_tokenizer(tokenizer, model), changes_of(settings), Measure()
    drop = tuple(sorted(settings.drop))
    plan = Plan(Provenance({}), len(decoder_layers(model)), drop, reason="given by the caller")
    num_tokens = num_tokens_of(made, without_data(model.config), plan, measured)
    rows = _rows(with_default_text(data, model, TextSource(AUTO)), tokenizer, measured, num_tokens, seed=0)
    with TemporaryDirectory() as temporary:
        teacher, student = Path(temporary) / "teacher", Path(temporary) / "student"
        model.save_pretrained(teacher)
        tokenizer.save_pretrained(teacher)
        apply_plan(teacher, plan, student, changes=made, text=Calibration(rows, measured.batch_size))
        changed = load_model(student, device=model.device)
    changed.config.name_or_path = model.config.name_or_path
    changed.set_attn_implementation(model.config._attn_implementation or "sdpa")
    return changed
