"""The control: the uncut teacher in the place of the student, trained in the same way on the same rows.

It shows what training on this text does to a model that has lost nothing. What is trained of it is the same by meaning:
a layer is known by its number in the teacher.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.artifacts.plan import Plan
from shoal.models.anatomy import text_config
from shoal.recipe.distill import Distill
from shoal.recipe.losses import HiddenStates, LossTerm

from ..objective.layer_losses import layer_pairs
from .spec import TrainSpec
from .trainable import Trained, keys_from, shares_prefix, trained_parts


def control_spec(spec: TrainSpec) -> TrainSpec:
    """The training of the control beside that of the student, ``spec``.

    Losses on states compare the control with the teacher where they
    compare the student with it, each layer with itself. The layers that the student is spared are spared here too, so
    that one recording serves both.

    Raises:
        UserError: a loss that names a layer which the student does not have.
    """
    settings, plan = spec.settings, spec.plan
    parts = replace(spec.trained, keys_from=keys_from(text_config(spec.teacher.config)))
    trained = _in_teacher(parts, settings.trainable, plan)
    frozen = shares_prefix(trained, plan)

    def of_equal_layers(term: LossTerm) -> LossTerm:
        if not isinstance(term, HiddenStates):
            return term
        return replace(term, layers=tuple(t for _, t in layer_pairs(term, plan, num_shared=spec.frozen_layers)))

    return replace(
        spec,
        student=spec.teacher,
        plan=Plan(plan.provenance, plan.num_layers, (), reason="the control has no dropped layers"),
        settings=settings.with_losses(lambda losses: tuple(map(of_equal_layers, losses))),
        trained=trained,
        frozen_layers=frozen,
        shared_layers=min(frozen, spec.shared_layers),
    )


def control_identity(settings: Distill, plan: Plan) -> dict[str, Any]:
    """What of ``plan`` shapes the control: which parts are trained, and all of it where a loss compares states."""
    trained = _in_teacher(trained_parts(settings.trainable, plan), settings.trainable, plan)
    identity = {"control.layers": list(trained.layers), "control.norm": trained.norm}
    if any(isinstance(term, HiddenStates) for term in settings.terms):
        # which layers are compared, whatever they hold
        changed = [[change.kind, *change.layers, *change.runs] for change in plan.changes]
        identity |= {"plan.keep": list(plan.keep), "plan.changes": changed}
    return identity


def _in_teacher(trained: Trained, trainable: str, plan: Plan) -> Trained:
    """``trained`` of the student of ``plan`` in the teacher's numbers; what a cut has removed inside it is trained."""
    if trainable == "near_gaps":
        return replace(trained, layers=tuple(sorted({plan.keep[layer] for layer in trained.layers})))
    # all others are one run up to the last layer, or none; below it the student's numbers are the teacher's
    return replace(trained, layers=tuple(range(trained.layers[0], plan.num_layers)) if trained.layers else ())
