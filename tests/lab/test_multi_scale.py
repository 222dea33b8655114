"""Losses on pooled states: values from the definition, and a whole training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment, run_ranks
from tiny import tiny_model
from torch import Tensor, nn
from training_runs import Trial, finished, prepare

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.data.packing import IGNORED
from shoal.lab.multi_scale import MultiScale, MultiScaleLosses
from shoal.recipe.losses import StateTerm
from shoal.train.objective.layer_losses import Captured

POSITIONS = torch.stack([torch.cat([torch.arange(7), torch.arange(5)]), torch.cat([torch.arange(3), torch.arange(9)])])
"""Two rows of two documents each."""
CUT = Plan(Provenance({}), num_layers=6, drop=(2, 3), reason="")


def labels() -> Tensor:
    """All tokens but the first of a document, and the second row's first five, which are a prompt."""
    found = torch.arange(24).view(2, 12).masked_fill(POSITIONS == 0, IGNORED)
    found[-1, :5] = IGNORED
    return found


def counted_tokens() -> list[tuple[int, int]]:
    return [
        (row, token)
        for row in range(2)
        for token in range(11)
        if labels()[row, token + 1] != IGNORED and POSITIONS[row, token] != 0
    ]


def documents(row: int) -> list[int]:
    return [int(number) for number in (POSITIONS[row] == 0).cumsum(0)]


def losses_of(*terms: StateTerm) -> MultiScaleLosses:
    teacher = tiny_model("llama")
    student: Any = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(student.model.layers[layer] for layer in CUT.keep)
    student.config.num_hidden_layers = 4
    return MultiScaleLosses(terms, CUT, student, teacher)


def test_states_of_late_layers_are_pooled_over_neighbours() -> None:
    torch.manual_seed(0)
    ours, theirs = ({layer: torch.randn(2, 12, 6, dtype=torch.float64) for layer in range(6)} for _ in range(2))
    with torch.no_grad():
        _, sums = losses_of(MultiScale())(Captured(ours), Captured(theirs), labels(), POSITIONS)
    total = 0.0
    for layer, target in ((1, 3), (2, 4), (3, 5)):
        windows: dict[Any, list[tuple[int, int]]] = {}
        for row, token in counted_tokens():
            place = (row, documents(row)[token], int(POSITIONS[row, token]) // 4) if layer > 1 else (row, token)
            windows.setdefault(place, []).append((row, token))
        for members in windows.values():
            sides = ((ours, layer), (theirs, target))
            s, t = (torch.stack([side[at][where] for where in members]).mean(0) for side, at in sides)
            total += float((s - t) @ (s - t) / (t @ t)) * len(members) / 3
    assert sums.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.prove
def test_a_student_is_trained_with_these_terms_beside_the_recipes(tmp_path: Path, teacher: Path) -> None:
    prepare(tmp_path, teacher)
    terms = "term={weight: 0.1}"
    finished(
        Trial(
            tmp_path,
            run_ranks(
                ["lab", "multi_scale", str(tmp_path / "recipe.yaml"), terms], ranks=1, env=environment(), cwd=tmp_path
            ),
        )
    )
    training = Training.load(tmp_path / "run" / "lab" / "multi_scale" / Training.FILE)
    assert {"multi_scale", "forward_kl"} <= training.history[0].keys()
    assert training.history[-1]["multi_scale"] < training.history[0]["multi_scale"]
