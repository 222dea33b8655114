"""The uncut teacher in the place of the student: what is trained of it, and what tells two controls apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_students import plan
from tiny import tiny_config

from shoal.artifacts.plan import Plan, PlannedChange
from shoal.models.load import Checkpoint
from shoal.recipe.distill import Distill, Recorded
from shoal.recipe.losses import CrossEntropy, HiddenStates
from shoal.train.objective.layer_losses import layer_pairs
from shoal.train.student.control import control_identity, control_spec
from shoal.train.student.spec import Ranks, TrainSpec, train_spec

MERGE = PlannedChange("merge", "", (2,), runs=((2, 3),))
SKIP = PlannedChange("skip", "", (1,))
SWAP = PlannedChange("swap", "", (0, 4))  # other embeddings than the teacher's


def spec_of(changes: Plan, **settings: Any) -> TrainSpec:
    """The student's training; no weight is read."""
    teacher, student = (
        Checkpoint(Path(name), tiny_config("llama", num_hidden_layers=layers))
        for name, layers in (("teacher", changes.num_layers), ("student", len(changes.keep)))
    )
    return train_spec(teacher, student, changes, Distill(**settings), Ranks(1, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("trainable", "changes", "layers", "norm", "shared"),
    [
        ("all", plan(4), range(10), True, 0),
        ("layers", plan(4), range(10), True, 0),
        ("from_first_cut", plan(4, 7), range(4, 10), True, 4),  # those that the cut removes are trained as well
        ("from_first_cut", plan(7, changes=(SKIP,)), range(1, 10), True, 1),
        ("near_gaps", plan(4), (3, 5), False, 3),
        ("near_gaps", plan(3, 4, 7), (2, 5, 6, 8), False, 2),
        ("near_gaps", plan(0, 1), (2,), False, 0),
        ("near_gaps", plan(8, 9), (7,), True, 7),
        ("near_gaps", plan(3, changes=(MERGE,)), (2, 4), False, 2),
        ("near_gaps", plan(7, changes=(SWAP,)), (0, 4, 6, 8), False, 0),
        ("norm_and_head", plan(4), (), True, 4),
    ],
)
def test_what_is_trained_is_known_by_its_number_in_the_teacher(trainable, changes, layers, norm, shared) -> None:
    spec = spec_of(changes, trainable=trainable)
    control = control_spec(spec)
    assert (control.trained.layers, control.trained.norm) == (tuple(layers), norm)
    assert replace(control.trained, layers=()) == replace(spec.trained, layers=())
    assert control.shared_layers == spec.shared_layers == shared
    identity = control_identity(spec.settings, changes)
    assert (identity["control.layers"], identity["control.norm"]) == ([*layers], norm)


def test_nothing_is_cut() -> None:
    spec = spec_of(plan(4, 7, changes=(SKIP,)), trainable="from_first_cut")
    control = control_spec(spec)
    assert control.student == control.teacher == spec.teacher
    assert control.plan.keep == tuple(range(10))
    assert (spec.is_control, control.is_control) == (False, True)
    assert control.settings == spec.settings


def test_a_recording_of_the_state_below_serves_the_control() -> None:
    recorded = Recorded(prefix=True)
    spec = spec_of(plan(4), trainable="from_first_cut", teacher=recorded)
    assert control_spec(spec).shared_layers == spec.shared_layers == 4


@pytest.mark.parametrize(
    ("term", "changes", "targets"),
    [
        (HiddenStates(), plan(4, 5), (5, 6, 7, 8, 9)),  # the layer before the gap is asked for the state after it
        (HiddenStates(map="own"), plan(4, 5), (6, 7, 8, 9)),
        (HiddenStates(layers=(3, 5)), plan(4, 5), (5, 7)),
        (HiddenStates(map="own"), plan(3, changes=(MERGE,)), (3, 4, 5, 6, 7, 8, 9)),
    ],
)
def test_states_are_compared_at_the_teachers_layers_of_the_student_each_with_itself(term, changes, targets) -> None:
    spec = spec_of(changes, losses=(CrossEntropy(), term))
    assert {target for _, target in layer_pairs(term, changes)} == {*targets}
    control = control_spec(spec)
    plain, mapped = control.settings.losses
    assert plain == CrossEntropy()
    assert layer_pairs(mapped, control.plan) == tuple((layer, layer) for layer in targets)  # pyright: ignore[reportArgumentType]
    assert replace(mapped, layers=term.layers) == term
