"""Models that read images, from recipe to student: what an automatic choice leaves alone, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from architectures import CLIP, LLAMA, MROPE, QWEN_VISION, tiny_model
from tiny import VOCAB_SIZE, tiny_tokenizer

from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.launch.verbs.distill import check_distill
from shoal.launch.verbs.measure import check_measure, measure
from shoal.launch.verbs.pipeline import preflight
from shoal.launch.verbs.prune import prune
from shoal.launch.verbs.run import Run, open_run
from shoal.models.load import load_config
from shoal.recipe.prune import CutByScore
from shoal.recipe.recipe import parse_recipe

WORDS: dict[str, Any] = {"vocab_size": VOCAB_SIZE}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": {**LLAMA, **WORDS}, "vision_config": {**CLIP, "num_hidden_layers": 4}},
    "qwen3_vl": {
        "text_config": {**MROPE, **WORDS},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
    },
    "paligemma": {"text_config": {"model_type": "gemma", **WORDS}, "projection_dim": 32},
    "mllama": {"text_config": {"cross_attention_layers": [1, 4], **WORDS}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, settings in MODELS.items():
        vision = (
            {} if "vision_config" in settings else {"vision_config": tiny_model(name).config.vision_config.to_dict()}
        )
        tiny_model(name, **settings, **vision).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def run_of(model: Path, folder: Path, **sections: Any) -> Run:
    return open_run(parse_recipe({"model": str(model), "run_dir": str(folder / "run"), **sections}))


def test_layers_behind_which_the_image_is_added_are_never_chosen(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured = {"data": [{"path": "readmes"}], "num_tokens": 256, "sequence_length": 64}
    run = run_of(models / "qwen3_vl", tmp_path, measure=measured, prune={"num_drop": 3, "protect": []})
    assert isinstance(run.prune, CutByScore)
    assert run.prune.protect == (0, 1)
    with caplog.at_level(logging.WARNING, logger="shoal"):
        prune(run)
    assert "reads images, but is measured with text only" in caplog.text
    plan = Plan.load(run.dir / Plan.FILE)
    assert len(plan.drop) == 3
    assert not {0, 1} & {*plan.drop}
    assert "layers 0, 1 protected" in plan.reason
    named = run_of(models / "qwen3_vl", tmp_path / "named", prune={"drop": [1, 3]})
    for stage in (preflight, prune):
        with pytest.raises(UserError, match=r"drop: qwen3_vl adds features of the image after the layers 0 to 1"):
            stage(named)


def test_a_family_that_reads_in_both_directions_is_cut_and_no_more(models: Path, tmp_path: Path) -> None:
    run = run_of(models / "paligemma", tmp_path, prune={"drop": [2]})
    for stage in (check_measure, check_distill):
        with pytest.raises(UserError, match=r"paligemma: its language model reads text in both directions"):
            stage(run)
    prune(run)
    assert load_config(run.dir / "student").text_config.num_hidden_layers == 5


def test_layers_that_text_passes_by_are_not_measured_with_text(models: Path, tmp_path: Path) -> None:
    run = run_of(models / "mllama", tmp_path, prune={"num_drop": 2})
    assert isinstance(run.prune, CutByScore)
    assert run.prune.protect == (0, -1, 1, 4)
    for stage in (preflight, measure):
        with pytest.raises(UserError, match=r"mllama skips its layers \[1, 4\] if there is no image"):
            stage(run)
    named = run_of(models / "mllama", tmp_path / "named", prune={"drop": [1, 2]})
    prune(named)
    assert load_config(named.dir / "student").text_config.cross_attention_layers == [2]


COLUMNS = {"image": "image", "prompt": "prompt", "completion": "answer"}
IMAGES: dict[str, Any] = {"path": "rows.jsonl", "column": COLUMNS}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"measure": {"data": [IMAGES]}}, r"measure.data.0.column: must be a string \(got \{"),
        ({"data": [{"path": "a", "column": {"image": "i", "prompt": "p"}}]}, r"column.completion: is required"),
        (
            {"data": [{"path": "a", "column": {**COLUMNS, "loss_on": "all"}}]},
            r"column.loss_on: excludes distill.data.0.column.image",
        ),
        ({"on_policy": {"share": 0.5}}, r"distill.on_policy: the student writes from text only, .* has images"),
        ({"teacher": "recorded"}, r"distill.teacher: outputs for images cannot be recorded"),
    ],
)
def test_what_does_not_go_with_images_is_refused_with_the_recipe(section: dict[str, Any], message: str) -> None:
    sections = section if "measure" in section else {"distill": {"data": [IMAGES], **section}}
    with pytest.raises(UserError, match=message):
        parse_recipe({"model": "x", "run_dir": "y", **sections})
