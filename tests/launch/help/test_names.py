"""`shoal list`: all names there are, and no others.

Covers: shoal.data.bundled.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.compress.metrics.registry import METRICS
from shoal.data.bundled import ABOUT, BUNDLED, BUNDLED_ROWS
from shoal.eval.tasks.names import refuse_unknown
from shoal.launch.arguments import LISTS
from shoal.launch.cli import main
from shoal.launch.help import names
from shoal.recipe.losses import KINDS
from shoal.recipe.recipe import load_recipe


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["list", *argv])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_parser_knows_the_lists() -> None:
    assert tuple(names.LISTS) == LISTS


def test_without_a_kind_the_kinds_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys).splitlines() == [f"shoal list {what}" for what in LISTS]


@pytest.mark.parametrize("what", LISTS)
def test_every_list_says_what_each_name_is(capsys: pytest.CaptureFixture[str], what: str) -> None:
    entries, text = names.LISTS[what](), listed(capsys, what)
    assert len(entries) >= 3
    assert all(len(about) > 10 for about in entries.values())
    if what != "tasks":
        indented = [line for line in text.splitlines() if line.startswith("  ")]  # not the note below them
        assert [line.split()[0] for line in indented if line[2] != " "] == list(entries)


def test_a_listed_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, about in names.recipes().items():
        assert load_recipe(name) == load_recipe(about.rpartition("[")[2].rstrip("]"))


def test_lists_are_those_of_the_code() -> None:
    assert list(names.losses()) == list(KINDS)
    assert list(names.metrics()) == list(METRICS)
    assert set(ABOUT) == {*BUNDLED, *BUNDLED_ROWS}


def test_every_listed_task_can_be_asked() -> None:
    found = list(names.tasks())
    assert {"retrieval_continuation", "mmlu_all_generation", "bbh_snarks_generation"} <= set(found)
    refuse_unknown(found)
