"""A result is there, is another one, or is not there: each is told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from results import evaluation

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import Scores
from shoal.artifacts.identity import Identity
from shoal.errors import UserError


def asked(path: Path, **inputs: object) -> Identity[Scores]:
    return Identity(Scores, path, {"model": "m", **inputs}, "eval")


def test_a_result_is_this_one_exactly_when_what_shapes_it_is_equal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shoal")
    path, made = tmp_path / "teacher.json", evaluation("teacher")
    assert asked(path).changed() is None
    assert not asked(path).is_done()
    assert not caplog.records
    type(made)(**{**vars(made), "provenance": Provenance({"model": "m"})}).save(path)
    assert asked(path).is_there()
    assert asked(path).is_done()
    assert asked(path).require().role == "teacher"
    assert f"eval: done already ({path})" in caplog.text
    other = asked(path, seed=1)
    assert other.changed() == ["seed is 1 in this recipe but not set there"]
    assert not other.is_done()
    assert "eval: teacher.json is out of date (seed is 1" in caplog.text
    with pytest.raises(
        UserError, match=r"belongs to another run: seed is 1 .*\. Name the run directory itself, run `shoal eval`"
    ):
        other.require()
