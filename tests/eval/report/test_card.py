"""The model card parses where it will be read, says what was done, and gives no machine's secrets or paths away."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from results import evaluation, plan, training, write_formed, write_run

from shoal.artifacts.plan import PlannedChange
from shoal.eval.report.card import model_card


def metadata(card: str) -> Any:
    """As huggingface_hub reads it; its type there is narrower than what it returns."""
    return ModelCard(card).data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", recipe={"export": {"hub_repo": "someone/shallow-model"}})


def test_metadata_is_what_the_hub_parses(folder: Path) -> None:
    data = metadata(model_card(folder))
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert "layer-pruning" in data.tags
    assert data.model_name == "shallow-model"


def test_a_student_that_reads_images_is_loaded_as_one(folder: Path) -> None:
    assert "model = AutoModelForCausalLM.from_pretrained(path)" in model_card(folder)
    (folder / "student").mkdir(exist_ok=True)
    (folder / "student/config.json").write_text('{"architectures": ["LlavaForConditionalGeneration"]}')
    card = model_card(folder)
    assert metadata(card).pipeline_tag == "image-text-to-text"
    assert "from transformers import AutoModelForImageTextToText, AutoTokenizer" in card


def test_model_index_holds_the_distilled_scores(folder: Path) -> None:
    results = metadata(model_card(folder)).eval_results
    tasks = evaluation("distilled").tasks
    assert [(r.dataset_name, r.metric_value) for r in results] == [(t.task, round(t.score, 6)) for t in tasks]
    by_name = {result.dataset_name: result for result in results}
    assert by_name["retrieval_generation"].metric_type == "accuracy"
    assert by_name["retrieval_generation"].metric_args["num_items"] == 100
    assert by_name["perplexity"].metric_type == "nats_per_token"
    assert len({result.unique_identifier for result in results}) == len(results)


def test_every_result_keeps_its_own_interval_where_a_task_has_two_metrics(folder: Path) -> None:
    whole = evaluation("distilled")
    first = next(task for task in whole.tasks if task.task == "retrieval_continuation")
    second = replace(first, metric="acc_norm", items=first.items[:50], n=50, score=0.52, ci_low=0.4, ci_high=0.6)
    evaluation("distilled", (first, second)).save(folder / "eval" / "distilled.json")
    found = {result.metric_name: result for result in metadata(model_card(folder)).eval_results}
    for task in (first, second):
        result = found[task.metric]
        assert (result.dataset_config, result.metric_value) == ("continuation", round(task.score, 6))
        assert result.metric_args["num_items"] == task.n
        assert (result.metric_args["ci_low"], result.metric_args["ci_high"]) == pytest.approx(
            (task.ci_low, task.ci_high)
        )
    assert found["acc"].metric_type == "accuracy"
    assert found["acc_norm"].metric_type == "acc_norm"


def test_the_trained_form_has_a_table_of_its_own_and_gaps_and_control_are_told(tmp_path: Path) -> None:
    card = model_card(write_formed(tmp_path)).replace("\\", "")
    opening, results = card.split("## Before and after")
    outside, inside = results.split("Recovered by distillation")[0].split("### In the trained wording")
    assert "| retrieval, reworded, generated |" in outside
    assert "| ARC easy, option text |" in outside
    assert "| retrieval, generated |" not in outside
    trained = next(line for line in inside.splitlines() if line.startswith("| retrieval, generated |"))
    assert "more than the teacher" in trained
    assert "may only show a learnt wording" in inside
    assert "Still lost: the control" in opening
    gaps = card.split("### Wording and ability")[1].split("\n## ")[0]
    assert "| retrieval, generated | +4 points [−9, +17], 64 % − 60 % | " in gaps
    assert "Learnt from the text: control (the teacher after the same training)" in card
    assert "Still lost: distilled minus control" in card


def test_card_tells_what_was_cut_and_what_it_cost(folder: Path) -> None:
    card = model_card(folder)
    for text in (
        "Dropped layers (of the base model, counted from 0): 3 to 5",
        "Scores with 95 % intervals",
        "Recovered by distillation: distilled minus pruned",
        "### Teacher near chance",
        "## Read with care",
        "## Speed and size",
        'path = "someone/shallow-model"',
        "## Intended use",
        "## Limits",
        "num_tokens: 200000",
        "4,000 tokens",
    ):
        assert text in card
    assert "figures/" not in card


@pytest.mark.slow
def test_license_comes_from_the_base_models_card(tmp_path: Path, teacher: Path) -> None:
    base = shutil.copytree(teacher, tmp_path / "base")
    told = "license: other\nlicense_name: llama3\nlicense_link: https://x.test/l"
    (base / "README.md").write_text(f"---\n{told}\n---\nhi\n")
    folder = write_run(tmp_path / "run", recipe={"model": str(base)})
    data = metadata(model_card(folder))
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "https://x.test/l")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert metadata(model_card(folder)).license == "mit"
    assert metadata(model_card(folder, base_folder=base)).license == "mit"


def test_license_comes_from_the_base_models_file_where_its_card_says_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlanguage: en\n---\n")
    (base / "LICENSE.txt").write_text("Somebody's Own Terms")
    folder = write_run(tmp_path / "run", recipe={"model": str(base)})
    (folder / "distilled").mkdir()
    (folder / "distilled" / "LICENSE.txt").write_text("Somebody's Own Terms")
    card = model_card(folder)
    data = metadata(card)
    assert (data.license, data.license_name, data.license_link) == ("other", "license-of-the-base-model", "LICENSE.txt")
    assert "from the file LICENSE.txt that came with the base model; its text is in LICENSE.txt." in card


@pytest.mark.parametrize("readme", [None, "no metadata at all", "---\nlicense: [unclosed\n---\n"])
def test_unknown_license_is_called_other_and_said(tmp_path: Path, readme: str | None) -> None:
    base = tmp_path / "base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme)
    card = model_card(write_run(tmp_path / "run", recipe={"model": str(base)}))
    assert metadata(card).license == "other"
    assert "stated no license" in card


def test_a_local_base_model_keeps_its_path_to_itself(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    data = [{"path": str(tmp_path / "texts")}]
    recipe = {"model": str(base), "run_dir": str(tmp_path / "run"), "distill": {"data": data}}
    folder = write_run(tmp_path / "run", recipe=recipe)
    replace(training(), data={"sources": {str(tmp_path / "texts"): {"tokens": 5}}}).save(folder / "distill.json")
    card = model_card(folder)
    assert "Text: .../texts" in card
    assert str(tmp_path) not in card
    assert metadata(card).base_model is None


def test_card_gives_no_secret_away(tmp_path: Path) -> None:
    secret = "hf_" + "q" * 34
    folder = write_run(tmp_path, recipe={"distill": {"trainer": {"optim_args": secret}}})
    assert secret not in model_card(folder)


def test_card_tells_changes_and_calls_no_model_of_as_many_layers_a_smaller_one(tmp_path: Path) -> None:
    changes = PlannedChange("skip", "mlp 3 silent", (3,)), PlannedChange("swap", "layer 5 swapped", (5,))
    plan((), changes).save(tmp_path / "plan.json")
    card = model_card(tmp_path)
    assert "Changed (skip): mlp 3 silent" in card
    assert "Changed (swap): layer 5 swapped" in card
    assert "Dropped layers" not in card
    assert str(tmp_path) not in card
    assert "layer-pruning" not in metadata(card).tags
    assert "## What was changed" in card
    assert not any(words in card for words in ("faster stand-in", "## What was dropped"))
