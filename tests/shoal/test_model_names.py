"""What names a model, and a model in the place of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import cases

from shoal.errors import UserError
from shoal.model_names import names_model
from shoal.recipe.recipe import load_recipe, read_settings


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine/eval").mkdir(parents=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/config.json").write_text("{}")


@pytest.mark.parametrize("name", ["cut", "demo:smollm2-135m", "Qwen/Qwen2.5-0.5B"])
def test_a_model_alone_is_a_recipe(name: str) -> None:
    assert names_model(name)
    assert read_settings(name, ["seed=1"])[0] == {"model": name, "seed": 1}
    assert load_recipe(name).run_dir == f"runs/{name.replace(':', '/').rpartition('/')[2]}"


@pytest.mark.parametrize(("name", "message"), cases(__file__))
def test_what_is_neither_recipe_nor_run_nor_model_is_refused(name: str, message: str) -> None:
    assert not names_model(name)
    with pytest.raises(UserError, match=message):
        load_recipe(name)


def test_no_name_of_a_run_is_a_model_before_there_is_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert not names_model("runs/mine")


def test_a_run_directory_goes_before_the_model_in_it(tmp_path: Path) -> None:
    (tmp_path / "cut/recipe.yaml").write_text("model: demo:smollm2-135m\n")
    with pytest.raises(UserError, match="is not signed with your key"):
        load_recipe("cut")
