"""The model card parses where it will be read, says what was done, and gives no machine's secrets or paths away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from results import evaluation, plan, write_run

from shoal.edits import SkipMlp, Swap
from shoal.errors import UserError
from shoal.eval.card import model_card
from shoal.eval.report import draw_figures, read_run


def metadata(card: str) -> Any:
    """The card's metadata as huggingface_hub reads it; its type there is narrower than what it returns."""
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


def test_model_index_holds_the_distilled_scores(folder: Path) -> None:
    results = metadata(model_card(folder)).eval_results
    tasks = evaluation("distilled").tasks
    assert [(r.dataset_name, r.metric_value) for r in results] == [(t.task, round(t.score, 6)) for t in tasks]
    by_name = {result.dataset_name: result for result in results}
    assert by_name["retrieval_generation"].metric_type == "accuracy"
    assert by_name["retrieval_generation"].dataset_args["num_items"] == 100
    assert by_name["python_docs_heldout"].metric_type == "nats_per_token"
    assert len({result.unique_identifier for result in results}) == len(results)


def test_card_tells_what_was_cut_and_what_it_cost(folder: Path) -> None:
    card = model_card(folder)
    for text in (
        "Dropped layers (of the base model, counted from 0): 3 to 5",
        "Scores with 95 % intervals",
        "Distilled minus pruned, paired over the same items",
        "### No signal here",
        "## Intended use",
        "## Limits",
        "num_tokens: 200000",
        "4,000 tokens",
    ):
        assert text in card
    assert "figures/" not in card


def test_card_shows_the_figures_that_exist(folder: Path) -> None:
    draw_figures(read_run(folder))
    card = model_card(folder)
    assert "(figures/before_after.png)" in card
    assert "(figures/importance.png)" in card


def test_license_comes_from_the_base_models_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: https://x.test/l\n---\nhi\n"
    )
    folder = write_run(tmp_path / "run", recipe={"model": str(base)})
    data = metadata(model_card(folder))
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "https://x.test/l")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    assert metadata(model_card(folder)).license == "mit"
    assert metadata(model_card(folder, base_folder=base)).license == "mit"


@pytest.mark.parametrize("readme", [None, "no metadata at all", "---\nlicense: [unclosed\n---\n"])
def test_unknown_license_is_called_other_and_said(tmp_path: Path, readme: str | None) -> None:
    base = tmp_path / "base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme)
    card = model_card(write_run(tmp_path / "run", recipe={"model": str(base)}))
    assert metadata(card).license == "other"
    assert "carried no license statement" in card


def test_a_local_base_model_keeps_its_path_to_itself(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    folder = write_run(tmp_path / "run", recipe={"model": str(base), "run_dir": str(tmp_path / "run")})
    card = model_card(folder)
    assert str(tmp_path) not in card
    assert metadata(card).base_model is None


def test_card_gives_no_secret_away(tmp_path: Path) -> None:
    secret = "hf_" + "q" * 34
    folder = write_run(tmp_path, recipe={"distill": {"trainer": {"api_token": secret, "run": secret}}})
    assert secret not in model_card(folder)


def test_card_of_a_cut_model_without_evaluation_says_so(tmp_path: Path) -> None:
    plan().write(tmp_path / "plan.json")
    card = model_card(tmp_path)
    assert "Nothing was evaluated" in card
    assert "It was not trained after the cut" in card
    assert metadata(card).eval_results is None


def test_card_tells_edits_and_no_path_of_a_donor(tmp_path: Path) -> None:
    edits = (SkipMlp("skip_mlp", (3,)), Swap("swap", (5,), f"{tmp_path}/donor"))
    plan((), edits).write(tmp_path / "plan.json")
    card = model_card(tmp_path)
    assert "Edited: MLP of layer 3 zeroed" in card
    assert "Edited: layer 5 swapped with donor at weight 1" in card
    assert "Dropped layers" not in card
    assert str(tmp_path) not in card


def test_card_needs_a_plan(tmp_path: Path) -> None:
    evaluation("teacher").write(tmp_path / "eval" / "teacher.json")
    with pytest.raises(UserError, match=r"plan\.json: no such file"):
        model_card(tmp_path)
