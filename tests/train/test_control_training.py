"""The control in a run directory: the uncut teacher, trained after the student on the same rows."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_LAYERS, tiny_checkpoint
from training_runs import DROP, STEPS, Trial, finished, prepare, recipe, run, unfinished
from transformers import AutoModelForCausalLM

from shoal.artifacts.training import Training

pytestmark = pytest.mark.slow

CONTROL = "eval.control=true"
LOSSES = [{"kind": "forward_kl"}, {"kind": "cross_entropy"}, {"kind": "hidden_states", "weight": 0.1}]
SETTINGS: dict[str, Any] = {
    "trainable": "from_first_cut",
    "losses": LOSSES,
    "trainer": {"save_strategy": "steps", "save_steps": 2},
}
TERMS = ("loss", "forward_kl", "cross_entropy", "hidden_states")


def control_of(trial: Trial) -> Trial:
    """The control's part of a run directory."""
    return replace(trial, recipe=trial.dir / "control" / "recipe.yaml")


def control_training(trial: Trial) -> Training:
    return Training.load(trial.dir / "control" / Training.FILE)


def control_curve(trial: Trial, name: str = "loss") -> list[float]:
    rows = [row for row in control_training(trial).history if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row[name] for row in rows]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "llama")
    (folder / "pytorch_model.bin").write_text("the same weights in another format")
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return prepare(tmp_path_factory.mktemp("cut"), teacher)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    """A training without control, one rank."""
    return finished(run(recipe(tmp_path_factory.mktemp("student"), teacher, cut, **SETTINGS)))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, teacher: Path, student: Trial) -> Trial:
    """The same run, asked for its control afterwards."""
    folder = tmp_path_factory.mktemp("both")
    return finished(run(recipe(folder, teacher, student.dir, **SETTINGS), CONTROL))


def test_a_run_that_is_distilled_trains_only_the_control(student: Trial, both: Trial) -> None:
    assert "distill: done already" in both.log
    for name in ("distill.json", "distilled/model.safetensors"):
        assert (both.dir / name).read_bytes() == (student.dir / name).read_bytes(), name


def test_the_control_is_the_teacher_below_the_first_cut_and_learns_above(teacher: Path, both: Trial) -> None:
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (teacher, both.dir / "control" / "distilled")
    )
    assert before.keys() == after.keys()
    above = tuple(f"model.layers.{layer}." for layer in range(DROP[0], NUM_LAYERS))
    for name, weight in after.items():
        is_trained = name.startswith((*above, "model.norm."))
        assert torch.equal(weight, before[name]) != is_trained, name
    assert control_training(both).settings["trained_layers"] == list(range(DROP[0], NUM_LAYERS))
    names = {file.name for file in (both.dir / "control" / "distilled").iterdir()}
    assert "tokenizer.json" in names
    assert "pytorch_model.bin" not in names


def test_the_control_has_lost_nothing_and_learns_the_text(student: Trial, both: Trial) -> None:
    assert control_curve(both, "forward_kl")[0] == pytest.approx(0, abs=1e-6) != student.curve("forward_kl")[0]
    assert control_curve(both, "hidden_states")[0] == pytest.approx(0, abs=1e-6)
    assert control_curve(both, "cross_entropy")[-1] < control_curve(both, "cross_entropy")[0]


def test_a_killed_control_goes_on_with_the_same_curve(both: Trial, tmp_path) -> None:
    trial = finished(run(unfinished(both, tmp_path / "on", step=6, part="control"), CONTROL))
    assert f"resuming from {trial.dir}/control/checkpoints/checkpoint-6" in trial.log
    for name in TERMS:
        assert control_curve(trial, name) == control_curve(both, name)
    weights = control_of(trial)
    assert all(torch.equal(weight, other) for weight, other in _pairs(weights, control_of(both)))


def _pairs(one: Trial, other: Trial) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(trial.recipe.parent / "distilled").state_dict() for trial in (one, other)
    )
    return [(ours[name], theirs[name]) for name in theirs]


def note_what_is_left(file: Path) -> None:
    """Write to ``file``, before every training but the first, how many models, weights and Trainers are left of those
    before it."""
    from shoal.train import distill

    make, seen = distill.make_trainer, []

    def made(*args: Any, **kwargs: Any) -> Any:
        if seen:
            gc.collect()
            file.write_text(str(sum(reference() is not None for reference in seen)))
        trainer = make(*args, **kwargs)
        student = trainer.objective.student
        seen.extend([weakref.ref(trainer), weakref.ref(student), *(weakref.ref(p) for p in student.parameters())])
        return trainer

    distill.make_trainer = made  # pyright: ignore[reportPrivateImportUsage]


@pytest.mark.prove
@pytest.mark.parametrize(("zero", "ranks"), [("zero2", 2), ("zero3", 2)])
def test_the_control_follows_the_student_in_one_process_and_finds_its_memory_free(
    student: Trial, both: Trial, teacher: Path, cut: Path, tmp_path, zero, ranks
) -> None:
    path = recipe(tmp_path, teacher, cut, **SETTINGS, deepspeed=zero)
    trial = finished(run(path, CONTROL, ranks=ranks, before=partial(note_what_is_left, tmp_path / "left")))
    assert (tmp_path / "left").read_text() == "0"
    assert "the teacher is trained on the same rows, which takes 1." in trial.log
    for name in TERMS:
        assert trial.curve(name) == pytest.approx(student.curve(name), abs=1e-5, rel=1e-5)
        assert control_curve(trial, name) == pytest.approx(control_curve(both, name), abs=1e-5, rel=1e-5)


def test_one_recording_serves_student_and_control(teacher, cut, tmp_path) -> None:
    settings = SETTINGS | {
        "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}],
        "teacher": {"kind": "recorded", "top_k": 200, "prefix": True},
    }
    trial = finished(run(recipe(tmp_path, teacher, cut, **settings), CONTROL))
    assert trial.log.count("rows in") == 1
    assert control_training(trial).settings["shared_layers"] == trial.training.settings["shared_layers"] == 2
    # the mass outside the recorded tokens is taken as one
    assert control_curve(trial, "forward_kl")[0] < 0.1 * trial.curve("forward_kl")[0]
