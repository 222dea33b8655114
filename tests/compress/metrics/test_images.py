"""Columns of image rows against the definition: cosines of states, and answers of models that are really cut.

Covers: shoal.data.image_rows.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import image_rows, llava_checkpoint
from PIL import Image

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PruningPlan
from shoal.compress.metrics import images as image_metrics
from shoal.compress.metrics.images import ANSWER_LOSS, INFLUENCE, image_scores
from shoal.compress.metrics.metric import Estimates
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.image_rows import asked, image_rows_fingerprint, load_image_rows
from shoal.errors import UserError
from shoal.launch.verbs.measure import measure, measure_inputs
from shoal.launch.verbs.measure_checks import check_measure
from shoal.launch.verbs.prune import prune
from shoal.launch.verbs.run import Run, open_run
from shoal.models.anatomy import decoder_layers, watched
from shoal.models.load import load_model, load_processor
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import ImageRows

TEXT = {"data": [{"path": "readmes"}], "num_tokens": 256, "sequence_length": 64, "metrics": ["block_influence"]}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_checkpoint(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_rows(tmp_path_factory.mktemp("rows"))


def run_of(model: Path, folder: Path, images: dict[str, Any] | None, **prune: Any) -> Run:
    section = TEXT if images is None else {**TEXT, "images": images}
    return open_run(parse_recipe({"model": str(model), "run_dir": str(folder), "measure": section, "prune": prune}))


@torch.inference_mode()
def answer_loss(model: Any, inputs: dict[str, Any], answer: list[int]) -> float:
    logits = model(**inputs).logits[0].double()
    start = inputs["input_ids"].shape[1] - len(answer)
    assert inputs["input_ids"][0, start:].tolist() == answer
    return -sum(logits[start + n - 1].log_softmax(0)[token].item() for n, token in enumerate(answer)) / len(answer)


def test_columns_are_what_they_are_defined_as(llava: Path, rows: Path) -> None:
    model, processor = load_model(llava), load_processor(llava)
    given = load_image_rows(ImageRows(str(rows)))
    scores = image_scores(model, asked(given, processor, model.config), len(given))
    cosines: list[list[torch.Tensor]] = [[] for _ in range(6)]
    rises: list[list[float]] = []

    def after(layer: int, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        cosines[layer].append(torch.cosine_similarity(before[0].double(), output[0].double(), dim=-1))

    cuts = [cut_model(model, [layer]) for layer in range(6)]
    for row in given:
        image = Image.open(row.image).convert("RGB")
        inputs = dict(processor(text=f"<image>{row.prompt}{row.answer}", images=[image], return_tensors="pt"))
        answer = processor.tokenizer(row.answer)["input_ids"]
        with watched(decoder_layers(model), after=after):
            intact = answer_loss(model, inputs, answer)
        rises.append([answer_loss(cut, inputs, answer) - intact for cut in cuts])
    expected = torch.tensor(rises, dtype=torch.float64)
    influence, loss = scores[INFLUENCE], scores[ANSWER_LOSS]
    assert isinstance(loss, Estimates)
    similar = torch.stack([1 - torch.cat(cosine).mean() for cosine in cosines])
    torch.testing.assert_close(torch.tensor(influence).double(), similar, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(loss.values).double(), expected.mean(0), atol=1e-6, rtol=0)
    errors = expected.std(0) / len(given) ** 0.5
    torch.testing.assert_close(torch.tensor(loss.standard_errors).double(), errors, atol=1e-6, rtol=0)
    assert expected.mean(0).std() > 1e-3


def test_the_host_waits_for_no_answer_by_itself(llava: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_model(llava), load_processor(llava)
    given = load_image_rows(ImageRows(str(rows)))
    callers, item = list[str](), torch.Tensor.item

    def called(tensor: torch.Tensor) -> Any:
        callers.append(Path(sys._getframe(1).f_code.co_filename).name)  # transformers counts the tokens of an image so
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "item", called)
    image_scores(model, asked(given, processor, model.config), len(given))
    assert callers
    assert "images.py" not in callers


@pytest.mark.parametrize(
    ("column", "message"), [(0, "finite; set dtype: float32"), (3, "finite where layer 2 is skipped;")]
)
def test_a_loss_that_is_not_finite_is_refused(
    llava: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, column: int, message: str
) -> None:
    model, processor = load_model(llava), load_processor(llava)
    given = load_image_rows(ImageRows(str(rows)))
    losses: list[torch.Tensor] = []
    plain = image_metrics.answer_loss

    def overflowing(*asked: Any) -> torch.Tensor:
        losses.append(plain(*asked) * (torch.nan if len(losses) == 7 + column else 1.0))
        return losses[-1]

    monkeypatch.setattr(image_metrics, "answer_loss", overflowing)
    with pytest.raises(UserError, match=rf"measure\.images: the loss of row 1 is not {message}"):
        image_scores(model, asked(given, processor, model.config), len(given))
    assert len(losses) == 2 * 7
    assert len(given) > 2


def test_the_image_counts(llava: Path, rows: Path) -> None:
    model, processor = load_model(llava), load_processor(llava)
    first = load_image_rows(ImageRows(str(rows), num_rows=1))
    other = [type(first[0])(first[0].where, first[0].image.with_name("2.png"), first[0].prompt, first[0].answer)]
    one, two = (image_scores(model, asked(given, processor, model.config), 1)[ANSWER_LOSS] for given in (first, other))
    assert one != two
    assert image_rows_fingerprint(first) != image_rows_fingerprint(other)


def test_layers_are_chosen_by_a_column_of_images(
    llava: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = {"path": str(rows), "num_rows": 2}
    run = run_of(llava, tmp_path / "run", images, num_drop=2, metric=ANSWER_LOSS)
    with caplog.at_level(logging.WARNING, logger="shoal"):
        prune(run)
    assert "measured with text alone" not in caplog.text
    importance = Importance.read(run.dir / Importance.FILE)
    assert [*importance.layers] == ["block_influence", INFLUENCE, ANSWER_LOSS]
    assert all(error is not None for error in importance.errors[ANSWER_LOSS])
    column = importance.layers[ANSWER_LOSS]
    lowest = sorted(range(1, 5), key=column.__getitem__)[:2]
    assert PruningPlan.read(run.dir / PruningPlan.FILE).drop == tuple(sorted(lowest))
    without = run_of(llava, tmp_path / "without", None)
    assert measure_inputs(run).keys() - measure_inputs(without).keys() == {"measure.images"}
    measure(without)
    of_text = Importance.read(without.dir / Importance.FILE)
    assert of_text.layers["block_influence"] == importance.layers["block_influence"]
    with pytest.raises(UserError, match=r"prune.metric: answer_loss_images is no metric"):
        prune(run_of(llava, tmp_path / "third", None, num_drop=2, metric=ANSWER_LOSS))


def test_what_cannot_be_asked_is_refused_at_once(llava: Path, rows: Path, teacher: Path, tmp_path: Path) -> None:
    def written(**changes: Any) -> dict[str, Any]:
        file = tmp_path / "bad.jsonl"
        good = {**json.loads(rows.read_text().splitlines()[0]), "image": str(rows.parent / "pictures/0.png")}
        file.write_text(json.dumps(good) + "\n" + json.dumps({**good, **changes}) + "\n")
        return {"path": str(file)}

    def refused(match: str, images: dict[str, Any], model: Path = llava) -> None:
        with pytest.raises(UserError, match=match):
            check_measure(run_of(model, tmp_path / "run", images))

    torn = tmp_path / "torn.png"
    torn.write_bytes((rows.parent / "pictures/0.png").read_bytes()[:60])
    check_measure(run_of(llava, tmp_path / "run", {"path": str(rows)}))
    refused(r"row 1 of .*bad.jsonl: .*torn.png cannot be read as an image", written(image=str(torn)))
    refused(r"row 1 of .*: .*no.png cannot be read as an image \(.*No such file", written(image="no.png"))
    refused(r"row 1 of .*: names no image in column 'image'; every row needs one", written(image=None))
    refused(r"row 1 of .*: needs text in 'prompt' and an answer in 'answer'", written(answer=" "))
    refused(r"has no column 'photo'; it has image, prompt, answer", {"path": str(rows), "image": "photo"})
    refused(r"measure.images: .* reads no images; leave it out", {"path": str(rows)}, teacher)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in llava.iterdir():
        if file.name != "processor_config.json":
            (bare / file.name).write_bytes(file.read_bytes())
    refused(r"no usable processor of images|holds no processor of images", {"path": str(rows)}, bare)
