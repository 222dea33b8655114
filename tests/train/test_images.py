"""A student that reads images learns from text, and what turns images into tokens stays as it is, byte for byte."""

from __future__ import annotations

from pathlib import Path

import torch
from image_models import llava_checkpoint
from training_runs import LENGTH, finished, prepare, recipe, run

from shoal.models.load import load_model, load_processor


def test_a_student_that_reads_images_learns_from_text(tmp_path: Path) -> None:
    teacher = llava_checkpoint(tmp_path / "llava")
    cut = prepare(tmp_path / "cut", teacher)
    path = recipe(tmp_path / "trained", teacher, cut, batch_size=2, num_tokens=3 * 2 * LENGTH, sequence_length=LENGTH)
    trial = finished(run(path))
    before, after = trial.weights("student"), trial.weights("distilled")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("language_model.")}
    load_processor(trial.dir / "distilled")
    assert type(load_model(trial.dir / "distilled")).__name__ == "LlavaForConditionalGeneration"
