"""Answers about images: nats per token from the definition, kept answers, identities, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import image_rows, llava_checkpoint
from PIL import Image

from shoal.artifacts.evaluation import TaskScore
from shoal.errors import UserError
from shoal.eval.evaluate import evaluate
from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.image_answers import image_answers
from shoal.eval.harness.item_cache import ItemCache
from shoal.launch.verbs.evaluate import check_eval, eval_inputs
from shoal.launch.verbs.run import open_run
from shoal.models.load import load_model, load_processor, load_tokenizer
from shoal.recipe.distill import TrainingSource
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import ImageRows


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_checkpoint(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_rows(tmp_path_factory.mktemp("rows"), num_rows=9)


def scored(folder: Path, rows: Path, items: ItemCache) -> TaskScore:
    model = load_model(folder)
    return image_answers(CausalLM(model, load_tokenizer(folder), items=items), model, ImageRows(str(rows)))


def test_a_score_is_the_mean_over_the_answers_tokens(llava: Path, rows: Path, tmp_path: Path) -> None:
    model, processor = load_model(llava), load_processor(llava)
    nats, counts = [], []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        image = Image.open(rows.parent / row["image"]).convert("RGB")
        inputs = processor(text=f"<image>{row['prompt']}{row['answer']}</s>", images=[image], return_tensors="pt")
        num_answer = len(row["answer"]) + 1  # a token a byte, and the end
        with torch.no_grad():
            logits = model(**inputs).logits[0, -num_answer - 1 : -1].double().log_softmax(-1)
        nats.append(-logits[range(num_answer), inputs["input_ids"][0, -num_answer:]].sum().item())
        counts.append(num_answer)
    cache = ItemCache(tmp_path, "model")
    score = scored(llava, rows, cache)
    assert len({*counts}) > 1
    assert score.score == pytest.approx(sum(nats) / sum(counts), rel=1e-6)
    assert [item.score for item in score.items] == pytest.approx([n / c for n, c in zip(nats, counts, strict=True)])
    assert score.ci_low < score.score < score.ci_high
    again = ItemCache(tmp_path, "model")
    assert scored(llava, rows, again) == score
    assert again.num_kept == again.num_asked == 9


def test_images_stand_beside_tasks_and_are_part_of_what_a_score_is_known_by(
    llava: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(**settings: Any) -> Any:
        section = {"tasks": [], "perplexity_tokens": 600, "sequence_length": 32, **settings}
        return open_run(parse_recipe({"model": str(llava), "run_dir": str(tmp_path / "run"), "eval": section}))

    asked = run(images={"path": str(rows)})
    check_eval(asked)
    assert "distill.data holds" not in caplog.text
    some = tmp_path / "some.jsonl"
    shown = [str(rows.parent / f"pictures/{number}.png") for number in (2, 5, 5)]
    some.write_text("".join(json.dumps({"image": name, "prompt": "?", "answer": "!"}) + "\n" for name in shown))
    source = TrainingSource(str(some), image="image", prompt="prompt", completion="answer")
    check_eval(open_run(replace(asked.recipe, distill=replace(asked.recipe.distill, data=(source,)))))
    assert "eval.images: 2 of 9 rows ask about images that distill.data holds" in caplog.text
    found = evaluate(load_model(llava), load_tokenizer(llava), asked.recipe.eval, seed=0)
    assert [score.task for score in found] == ["perplexity", "images"]
    without, fewer = eval_inputs(run(), llava), eval_inputs(run(images={"path": str(rows), "num_rows": 8}), llava)
    inputs = eval_inputs(asked, llava)
    assert inputs.keys() - without.keys() == {"eval.images"}
    assert inputs["eval.images"] != fewer["eval.images"]


def test_what_cannot_be_asked_about_images_is_refused_at_once(
    llava: Path, teacher: Path, rows: Path, tmp_path: Path
) -> None:
    def checked(model: Path, path: Path) -> None:
        settings = {"model": str(model), "run_dir": str(tmp_path / "run"), "eval": {"images": {"path": str(path)}}}
        check_eval(open_run(parse_recipe(settings)))

    with pytest.raises(UserError, match=r"eval.images: .* reads no images; leave it out"):
        checked(teacher, rows)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"image": "none.png", "prompt": "?", "answer": "!"}))
    with pytest.raises(UserError, match=r"eval.images: row 0 of .*none.png cannot be read as an image"):
        checked(llava, bad)
    with pytest.raises(UserError, match=r"eval.images: are scored with transformers alone, and eval.backend is vllm"):
        parse_recipe(
            {"model": "x", "run_dir": "y", "eval": {"images": {"path": str(rows)}, "backend": "vllm"}},
        )
