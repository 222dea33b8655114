"""A recipe file is data: every row of the list is asked for on the command line or refused, by the reader."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.data.sources import records
from shoal.errors import UserError
from shoal.launch.arguments import parse
from shoal.recipe.asked import ALLOW, KINDS, ROWS, Row
from shoal.recipe.evaluate import CONFIGS_DIR
from shoal.recipe.recipe import load_recipe
from shoal.recipe.remembered import FILE, FOLDERS, memory_of
from shoal.recipe.trainer_arguments import REFUSED_ARGUMENTS

VALUES: dict[str, Any] = {
    "export.hub_repo": "me/mine",
    "trust_remote_code": True,
    "hub_kernels": True,
    "eval.include_path": "tasks",
    "distill.teacher.path": "signals",
    "distill.deepspeed.flops_profiler.output_file": "profile.txt",
    "distill.deepspeed.torch_autocast.lower_precision_safe_modules": ["os.path"],
}
"""What stands at a place that needs another value than a section."""
ASKED = [row for row in ROWS if row.answer == "asked"]
REFUSED = [row for row in ROWS if row.answer == "refused"]


def place_of(row: Row) -> str:
    return row.place


def value_of(row: Row) -> Any:
    return VALUES.get(row.place, {"enabled": True} if row.value is None else row.value)


def said(row: Row) -> dict[str, Any]:
    """A recipe that says what ``row`` is about."""
    recipe: dict[str, Any] = {}
    *sections, key = row.place.split(".")
    node = recipe
    for name in sections:
        node[name] = {"kind": "recorded"} if name == "teacher" else {}
        node = node[name]
    node[key] = value_of(row)
    return recipe


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SHOAL_TRUSTED_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)


def written(row: Row) -> Path:
    file = Path("got.yaml")
    file.write_text(yaml.safe_dump({"model": "a/b", "run_dir": "run", **said(row)}))
    return file


@pytest.mark.parametrize("row", ASKED, ids=place_of)
def test_a_file_alone_does_not_do_and_the_command_line_does(
    row: Row, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(row)
    with pytest.raises(UserError) as refusal:
        load_recipe(file)
    (message,) = str(refusal.value).split("\n")
    assert message.startswith(f"got.yaml: {row.place}: {row.why} (got ")
    assert message.endswith(
        f"which a recipe file may do only with your consent; add --allow {row.can} to the command, or remove the key"
    )
    other = next(kind for kind in KINDS if kind != row.can)
    with pytest.raises(UserError, match="only with your consent"):
        load_recipe(file, [f"{ALLOW}={other}", "seed=1"])
    with caplog.at_level(logging.INFO, logger="shoal"):
        allowed = load_recipe(file, [f"{ALLOW}={other},{row.can}"])
    assert f"{row.place}: {row.why} (" in caplog.text, "it is said all the same"

    value = yaml.safe_dump(value_of(row), default_flow_style=True).replace("\n...", "").strip()
    assert load_recipe(file, [f"{row.place}={value}"]) == allowed, "the user's own word"

    monkeypatch.setenv("SHOAL_TRUSTED_RUNS", ".")
    assert load_recipe(file) == allowed, "a folder of the user's own recipes"
    monkeypatch.delenv("SHOAL_TRUSTED_RUNS")
    Path("run").mkdir()
    (Path("run") / FILE).write_text(memory_of({"model": "a/b", **said(row)}))
    assert load_recipe(file) == load_recipe("run") == allowed, "what was allowed in a run directory is kept there"
    (Path("run") / FILE).write_text(yaml.safe_dump({"model": "a/b", **said(row)}))
    with pytest.raises(UserError, match="only with your consent"):
        load_recipe(file)


@pytest.mark.parametrize("row", REFUSED, ids=place_of)
def test_what_nobody_may_say_is_refused_on_the_command_line_too(row: Row) -> None:
    for words in ([], [f"{ALLOW}=send,write,code"], [f"{row.place}=1"]):
        with pytest.raises(UserError, match=re.escape(f"{row.place}: {row.why}")):
            load_recipe(written(row), words)


def test_what_a_deepspeed_file_says_the_recipe_says_that_names_it() -> None:
    Path("ds.json").write_text(json.dumps({"csv_monitor": {"enabled": True, "output_path": "/elsewhere"}}))
    Path("got.yaml").write_text("{model: a/b, run_dir: run, distill: {deepspeed: ds.json}}")
    with pytest.raises(UserError, match=r"got\.yaml: distill\.deepspeed\.csv_monitor: writes curves into any folder"):
        load_recipe("got.yaml")
    assert load_recipe("got.yaml", ["distill.deepspeed=ds.json"]).distill.deepspeed == "ds.json"
    Path("ds.json").write_text(json.dumps({"csv_monitor": {"enabled": False}, "tensorboard": {"enabled": False}}))
    load_recipe("got.yaml")


def test_a_word_beside_the_value_is_not_the_value() -> None:
    """An override of another key, or below the place, leaves what the file says the file's."""
    file = written(next(row for row in ASKED if row.place == "distill.deepspeed.csv_monitor"))
    for word in ("distill.deepspeed.csv_monitor.job_name=x", "distill.deepspeed.steps_per_print=1"):
        with pytest.raises(UserError, match="only with your consent"):
            load_recipe(file, [word])


def test_allow_is_a_word_of_the_command_and_no_key() -> None:
    for words in (["--allow", "send,code"], ["allow=send,code"], ["--allow=send,code"]):
        assert parse(["run", "got.yaml", "seed=1", *words]).words[-1] == "allow=send,code"
    Path("got.yaml").write_text("{model: a/b, allow: send}")
    with pytest.raises(UserError, match=r"got\.yaml: allow: unknown key"):
        load_recipe("got.yaml")


def test_no_shipped_recipe_asks_for_anything_and_no_argument_is_refused_twice() -> None:
    for file in CONFIGS_DIR.glob("*.yaml"):
        load_recipe(file)
    assert {row.place.removeprefix("distill.trainer.") for row in REFUSED} <= set(REFUSED_ARGUMENTS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tags: [!!python/object/apply:os.getcwd []]", "could not determine a constructor"),
        ("measure: {data: https://their.host/rows}", "no such file or folder"),
        ("measure: {data: 'https://their.host/rows.jsonl'}", "no such file or folder"),
        ("measure: {data: rows.pkl}", r"cannot read '\.pkl' files"),
    ],
)
def test_a_recipe_names_no_code_and_no_address(line: str, words: str) -> None:
    Path("rows.pkl").write_bytes(b"x")
    Path("got.yaml").write_text(f"model: a/b\n{line}\n")
    with pytest.raises(UserError, match=words):
        next(records(load_recipe("got.yaml").measure.data[0]))


def test_a_recipe_reads_no_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish")
    Path("got.yaml").write_text("model: a/b\nrun_dir: $MY_SECRET/${MY_SECRET}\n")
    with pytest.raises(UserError, match=r"run_dir: holds \$MY_SECRET, and variables are not expanded") as told:
        load_recipe("got.yaml")
    assert "swordfish" not in str(told.value)


def test_a_run_directory_replaces_nothing_that_no_run_has_made(tmp_path: Path) -> None:
    Path("got.yaml").write_text("{model: a/b, run_dir: mine}")
    folder = tmp_path / "mine"
    (folder / "thesis").mkdir(parents=True)
    (folder / "package.json").touch()
    load_recipe("got.yaml")
    for name in (*FOLDERS, "report.md", "results.json", "log.jsonl"):
        (folder / name).mkdir() if name in FOLDERS else (folder / name).touch()
        with pytest.raises(UserError, match=rf"mine: not a run directory, and its {name} would be replaced"):
            load_recipe("got.yaml")
        (folder / "run.json").touch()
        load_recipe("got.yaml")
        (folder / "run.json").unlink()
        (folder / name).rmdir() if name in FOLDERS else (folder / name).unlink()
