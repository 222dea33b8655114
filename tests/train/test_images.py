"""A student that reads images learns from text and from images, and what turns images into tokens stays as it is, byte
for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import image_rows, llava_checkpoint
from PIL import Image
from torch import Tensor
from training_runs import BATCH, LENGTH, STEPS, Trial, finished, prepare, recipe, run, write_recipe

from shoal.errors import UserError
from shoal.launch.verbs.distill import check_distill
from shoal.launch.verbs.run import open_run
from shoal.models.load import load_model, load_processor
from shoal.recipe.recipe import load_recipe

TERMS = [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}]
OF_SOURCES = ("forward_kl", "cross_entropy")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_checkpoint(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, llava: Path) -> Path:
    return prepare(tmp_path_factory.mktemp("cut"), llava)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = image_rows(tmp_path_factory.mktemp("rows"))
    texts = [{"text": f"{number} is followed by {number + 1}. " * (1 + number % 3)} for number in range(60)]
    file.with_name("texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return file


def both_kinds(rows: Path) -> list[dict[str, Any]]:
    """Images, of which one term is learnt, and text, of which both are."""
    columns = {"image": "image", "prompt": "prompt", "completion": "answer"}
    texts = {"path": str(rows.with_name("texts.jsonl")), "weight": 2.0}  # image rows have padding
    return [{"path": str(rows), "column": columns, "losses": "forward_kl"}, texts]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, llava: Path, cut: Path, rows: Path) -> Trial:
    settings = {"save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 1}
    folder = tmp_path_factory.mktemp("mixed")
    return finished(run(recipe(folder, llava, cut, data=both_kinds(rows), losses=TERMS, trainer=settings)))


def curves(trial: Trial) -> list[dict[str, float]]:
    history = [row for row in trial.training.history if "loss" in row]
    return [{name: row[name] for name in ("loss", *OF_SOURCES) if name in row} for row in history]


def test_a_student_that_reads_images_learns_from_text(llava: Path, cut: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "trained", llava, cut, batch_size=2, num_tokens=3 * 2 * LENGTH, sequence_length=LENGTH)
    trial = finished(run(path))
    before, after = trial.weights("student"), trial.weights("distilled")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(weight, after[name]) != name.startswith("language_model.") for name, weight in before.items()
    )
    load_processor(trial.dir / "distilled")
    assert type(load_model(trial.dir / "distilled")).__name__ == "LlavaForConditionalGeneration"


def answer_kl(models: list[Any], processor: Any, folder: Path, row: dict[str, str]) -> Tensor:
    """KL(teacher || student) at every token of the answer, by what transformers makes of the row alone, (N,)."""
    image = Image.open(folder / row["image"]).convert("RGB")
    inputs = processor(text=f"<image>{row['prompt']}{row['answer']}</s>", images=[image], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    num_answer = len(f"{row['answer']}") + 1  # a token a byte, and the end
    with torch.no_grad():
        p, q = (model(**inputs).logits[0, -num_answer - 1 : -1].log_softmax(-1) for model in models)
    return (p.exp() * (p - q)).sum(-1)


def test_the_first_step_is_the_mean_over_the_answers_tokens_of_its_rows(mixed: Trial, llava: Path, rows: Path) -> None:
    (folder,) = (mixed.dir / "text").glob("rows-*")
    numbers = np.load(folder / "images.npy").reshape(STEPS, BATCH)[0]
    assert (numbers >= 0).all(), "images fill a step before text does"
    models = [load_model(folder).double() for folder in (llava, mixed.dir / "student")]
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    processor = load_processor(llava)
    nats = torch.cat([answer_kl(models, processor, rows.parent, lines[number]) for number in numbers])
    assert len({len(lines[number]["answer"]) for number in numbers}) > 1, "rows weigh by their tokens"
    assert curves(mixed)[0]["forward_kl"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert curves(mixed)[0]["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)


@pytest.mark.prove
def test_two_ranks_under_zero_3_give_the_curves_of_one(
    mixed: Trial, llava: Path, cut: Path, rows: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, llava, cut, data=both_kinds(rows), losses=TERMS, deepspeed="zero3")
    for ours, theirs in zip(curves(finished(run(path, ranks=2))), curves(mixed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_what_cannot_be_learnt_from_is_refused_before_training(
    llava: Path, teacher: Path, rows: Path, tmp_path: Path
) -> None:
    good = {**json.loads(rows.read_text().splitlines()[0]), "image": str(rows.parent / "pictures/0.png")}
    torn, file = tmp_path / "torn.png", tmp_path / "bad.jsonl"
    torn.write_bytes((rows.parent / "pictures/0.png").read_bytes()[:60])

    def checked(model: Path = llava, length: int = LENGTH, **changes: Any) -> None:
        file.write_text(json.dumps(good) + "\n" + json.dumps({**good, **changes}) + "\n")
        path = write_recipe(tmp_path, model, data=both_kinds(file)[:1], losses=TERMS[:1], sequence_length=length)
        check_distill(open_run(load_recipe(str(path), [])))

    checked()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image": str(torn)}, r"distill.data: row 1 of .*bad.jsonl: .*torn.png cannot be read as an image"),
        ({"image": "no.png"}, r"row 1 of .*: .*no.png cannot be read as an image \(.*No such file"),
        ({"image": None}, r"row 1 of .*: column 'image' has no image"),
        ({"answer": ""}, r"row 1 of .*: .* or 'answer' no answer; fill in all three"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            checked(**changes)
    with pytest.raises(UserError, match=r"distill.data: .* does not read images; remove the sources"):
        checked(teacher)
    with pytest.raises(UserError, match=r"no image with its question and answer fits into a row; raise sequence"):
        checked(length=8)
