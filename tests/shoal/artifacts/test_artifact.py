"""Artifacts on disk: read back whole, refused when damaged or of another run.

Covers: shoal.artifacts.evaluation, shoal.artifacts.importance, shoal.artifacts.plan, shoal.artifacts.schemas,
shoal.artifacts.training.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from results import evaluation
from sweep_results import importance as swept_importance

from shoal.artifacts import schemas
from shoal.artifacts.artifact import Artifact, Provenance, differences
from shoal.artifacts.evaluation import BatchSpeed, ItemScore, Scores, Speed, SpeedScore, TaskScore
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import fingerprint
from shoal.components import Component
from shoal.errors import UserError

MADE = Provenance({"model": "abc", "prune.drop": [1, 3], "seed": 0})
TASK = TaskScore(
    *("knowledge_continuation", "knowledge", "continuation", "acc"),
    *(0.25, 0.1, 0.9, 2, 0.25, True, "1", 0),
    items=(ItemScore("a", 1.0, "Köln\u2028", "Köln", rates={"cut_off": 1.0}), ItemScore("b", 0.0, weight=3.0)),
    family="steps",
    level=2.0,
    rates={"cut_off": 0.5},
)
BATCH = BatchSpeed(8, 3.0, 4.0, 0.1, None, {"first_token": (0.1, 0.2)})
ARTIFACTS = (
    Importance(MADE, num_layers=2, num_tokens=9, layers={"x": (0.1, 1 / 3)}, runs={"y": ((0.5, 1e-30), (2.0,))}),
    swept_importance(),
    Plan(MADE, num_layers=6, drop=(1, 3), reason="named"),
    Scores(MADE, role="pruned", tasks=(TASK,), num_parameters=1, num_layers=2, num_bytes=9, seconds=0.5),
    Scores(MADE, role="teacher", tasks=(TASK,), num_parameters=10**12, num_layers=2, num_bytes=9, seconds=0.5),
    Speed(MADE, {"teacher": SpeedScore(1.0, 2.0, {"prefill": (1.0, 2.0)})}, 1, 2, 3, "float32"),
    Speed(MADE, {"pruned": SpeedScore(1.0, 2.0, {}, (BATCH,), 2, 10**12, 9, 4)}, 1, 2, 3, "float32", ("no room",)),
    Training(MADE, 3, 100, 1.5, ({"step": 1.0, "loss": 0.7},), {"a": None}, {"docs": {"tokens": 3}}, 5),
)


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda artifact: type(artifact).__name__)
def test_artifact_is_read_back_equal(tmp_path: Path, artifact: Artifact) -> None:
    path = tmp_path / "deep" / "er" / "x.json"
    artifact.save(path)
    again = type(artifact).load(path)
    assert again == artifact
    assert again.provenance.fingerprint == artifact.provenance.fingerprint
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == artifact.schema()
    assert sorted(os.listdir(path.parent)) == sorted(["x.json", *["x.items.jsonl"] * isinstance(artifact, Scores)])


@pytest.mark.parametrize("kind", schemas.PUBLIC, ids=lambda kind: kind.__name__)
def test_a_public_file_follows_its_shipped_schema(tmp_path: Path, kind: type[Artifact]) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    shipped = (schemas.FOLDER / schemas.file_name(kind)).read_text(encoding="utf-8")
    assert shipped == schemas.text_of(kind), "run `python -m shoal.artifacts.schemas`"
    for artifact in (each for each in ARTIFACTS if isinstance(each, kind)):
        artifact.save(tmp_path / "x.json")
        validator(json.loads(shipped)).validate(json.loads((tmp_path / "x.json").read_text()))
        assert {*json.loads((tmp_path / "x.json").read_text())} - {"internal"} == {*json.loads(shipped)["properties"]}


def test_a_field_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    assert Plan.load(plan_with(tmp_path, more=1)) == Plan.load(plan_with(tmp_path))


def test_scores_are_there_with_all_their_items_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "teacher.json"
    EVALUATED.save(path)
    assert json.loads((tmp_path / "teacher.items.jsonl").read_text().split("\n")[0]).keys() >= {"task", "id", "score"}
    with monkeypatch.context() as patch:  # killed between the two files
        patch.setattr(Artifact, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            EVALUATED.save(path)
    assert not path.exists()
    EVALUATED.save(path)
    (tmp_path / "teacher.items.jsonl").unlink()
    with pytest.raises(UserError, match=r"its items file teacher\.items\.jsonl is missing; delete it"):
        Scores.load(path)


def test_a_sweep_with_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    swept_importance().save(path)
    path.write_text(path.read_text().replace('"adjusted_p"', '"adjusted"', 1))
    message = r"atlas.sweep.columns.0.effects.0.adjusted.*; delete it and run its stage again"
    with pytest.raises(UserError, match=message):
        Importance.load(path)


def test_units_have_names() -> None:
    units = Component((3,)), Component((3, 1)), Component((3,), "attention"), Component((3,), "kv_group", 2)
    assert [unit.name for unit in units] == ["layer 3", "layers 3, 1", "attention 3", "kv group 3.2"]


def test_provenance_records_versions_and_time() -> None:
    assert MADE.environment["torch"] == torch.__version__
    assert MADE.created.endswith("+00:00")


def test_missing_artifact_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan.json: no such file; run the stage that makes it first"):
        Plan.load(tmp_path / "plan.json")


def plan_with(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "plan.json"
    Plan(MADE, 6, (1, 3), "").save(path)
    body = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "has the schema 99 instead of shoal/plan/1; delete it"),
        ({"drop": "x"}, r"plan.json: drop: .*; delete it and run its stage again"),
        ({"reason": None}, r"plan.json: reason: .*; delete it and run its stage again"),
    ],
)
def test_artifact_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan.load(plan_with(tmp_path, **changes))


NO_JSON = (b"", b"{", b'{"schema": 1', b"\xff\xfe", b"\0" * 100)


@pytest.mark.parametrize("content", [*NO_JSON, b"[]", b"3", b"null"])
def test_what_is_no_json_or_no_artifact_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    told = "is not valid JSON .*" if content in NO_JSON else "has the schema None instead of shoal/plan/1"
    with pytest.raises(UserError, match=rf"plan.json: {told}; delete it and run its stage again"):
        Plan.load(tmp_path / "plan.json")


def test_number_that_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Importance(MADE, 1, 1, {"x": (float("nan"),)}, {}).save(tmp_path / "x.json")
    assert os.listdir(tmp_path) == []


def test_differences_names_every_field_and_both_values() -> None:
    here = {"model": "a", "seed": 0, "drop": (1, 2), "new": None}
    there = {"model": "b", "seed": 0, "drop": [1, 2], "old": 3}
    assert differences(here, there) == [
        "model is 'a' in this recipe but 'b' there",
        "new is None in this recipe but not set there",
        "old is not set in this recipe but 3 there",
    ]
    assert differences(here, here) == []


def test_fingerprint_depends_on_values_and_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": [1]})}) == 5


def numbers(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all numbers with a fraction in a JSON value."""
    if isinstance(value, float):
        yield where
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(item, (*where, key))


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda artifact: type(artifact).__name__)
@pytest.mark.parametrize("number", [math.nan, math.inf, "nan"])
def test_no_number_of_an_artifact_may_be_none(tmp_path: Path, artifact: Artifact, number: Any) -> None:
    path = tmp_path / "x.json"
    artifact.save(path)
    text = path.read_text()
    kinds: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for place in numbers(json.loads(text) | dict.fromkeys(schemas.ADDED.get(type(artifact).__name__, ()))):
        kinds.setdefault(tuple(key for key in place if isinstance(key, str)), place)
    kinds.pop(("internal", "settings", "a"), None)
    for *parents, last in kinds.values():
        body = json.loads(text)
        node = body
        for key in parents:
            node = node[key]
        node[last] = number
        path.write_text(json.dumps(body))
        with pytest.raises(UserError, match=r"x\.json: .*; delete it and run its stage again") as refused:
            type(artifact).load(path)
        told = str(refused.value).lower()
        assert str(last) in told or isinstance(last, int) or "is not valid json" in told
        assert "nan" in told or "inf" in told


EVALUATED = evaluation("pruned")
FIRST = EVALUATED.tasks[1]


def scored(**changes: Any) -> Scores:
    """An evaluation whose one task says this of itself."""
    return replace(EVALUATED, tasks=(replace(FIRST, **changes),))


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        (Plan(MADE, 6, (3, 1), ""), r"drop: \[3, 1\] must list every layer once, in increasing order"),
        (Plan(MADE, 6, (1, 1), ""), r"drop: \[1, 1\]"),
        (Plan(MADE, 6, (1, 6), ""), r"drop: layer 6 does not exist; the model has 6 layers"),
        (Plan(MADE, 2, (0, 1), ""), r"drop: all layers are dropped"),
        (Plan(MADE, 6, (1, 2), ""), r"drop: \[1, 2\] differs from the recipe's prune.drop, \[1, 3\]"),
        (replace(EVALUATED, tasks=()), "tasks: "),
        (replace(EVALUATED, tasks=(FIRST, FIRST)), r"tasks\.1: retrieval_continuation .* appears twice"),
        (scored(items=()), r"tasks\.0\.items: holds 0 items, but n is 100"),
        (scored(items=(), n=0), r"tasks\.0\.n: "),
        (scored(n=99), r"tasks\.0\.items: holds 100 items, but n is 99"),
        (scored(chance=1.0), r"tasks\.0\.chance: "),
        (scored(score=0.99, ci_high=1.0), r"tasks\.0\.score: 0\.99 is not the mean of its items"),
        (scored(ci_low=0.9, ci_high=0.8), r"tasks\.0\.ci_low: 0\.9 is above ci_high \(0\.8"),
        (scored(items=(replace(FIRST.items[0], weight=0.0), *FIRST.items[1:])), r"tasks\.0\.items\.0\.weight: "),
    ],
)
def test_an_artifact_that_contradicts_itself_is_refused(tmp_path: Path, artifact: Artifact, message: str) -> None:
    artifact.save(tmp_path / "x.json")
    with pytest.raises(UserError, match=rf"x\.json: {message}.*; delete it and run its stage again"):
        type(artifact).load(tmp_path / "x.json")
