"""Questions that people answer in different ways: shares in place of right and wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from shoal.artifacts.artifact import Provenance
from shoal.errors import UserError
from shoal.lab.disputed import Asked, Disputed, Settings, _asked, _rows, work
from shoal.launch.verbs.run import open_run
from shoal.recipe.recipe import parse_recipe


class AsPeople:
    """Finds every option as likely as people did."""

    def __init__(self, shares: list[float]) -> None:
        self.shares = shares

    def _encode_pair(self, context: str, continuation: str) -> tuple[str, str]:
        return context, continuation

    def log_likelihoods(self, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        return [(math.log(share), False) for share, _ in zip(self.shares, pairs, strict=True)]


def test_a_model_that_answers_as_people_do_diverges_nowhere_and_reaches_what_there_is(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "q", "options": ["a", "b"], "counts": [3, 1]}))
    rows = _rows(Settings(str(file)))
    assert rows == [("q", ["a", "b"], [0.75, 0.25])]
    ((asked),) = _asked(AsPeople([0.75, 0.25]), rows)  # pyright: ignore[reportArgumentType]
    assert (asked.agreement, asked.ceiling, asked.divergence) == (0.75, 0.75, pytest.approx(0, abs=1e-12))
    ((asked),) = _asked(AsPeople([0.25, 0.75]), rows)  # pyright: ignore[reportArgumentType]
    assert (asked.agreement, asked.divergence) == (0.25, pytest.approx(0.5 * math.log(3)))
    file.write_text(json.dumps({"question": "q", "options": ["a"], "counts": [3, 1]}))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: cannot be read .2 counts of 1 options"):
        _rows(Settings(str(file)))


def test_items_on_which_people_agree_stand_apart() -> None:
    asked = (Asked(0.9, 0.9, 0.1), Asked(0.4, 0.5, 0.2))
    lines = Disputed(Provenance({}), {"teacher": asked}).in_words().splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["teacher", "agreed", "1"], ["teacher", "disputed", "1"]]


@pytest.mark.prove
def test_every_model_of_a_run_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join(json.dumps({"question": f"q{n}", "options": ["a", "bc"], "counts": [n, 2]}) for n in (1, 5))
    )
    model = tiny_checkpoint(tmp_path / "model", "llama")
    run = open_run(parse_recipe({"model": str(model), "run_dir": str(tmp_path / "run")}))
    text = work(run, Settings(str(file)))
    assert text == work(run, Settings(str(file)))
    assert len(Disputed.load(run.dir / "lab/disputed.json").roles["teacher"]) == 2
