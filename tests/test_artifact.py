"""Artifacts on disk: read back whole, refused when damaged or of another run, never half-written."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sweep_results import importance as swept_importance

from shoal.artifact import (
    Artifact,
    BatchSpeed,
    Evaluation,
    Importance,
    ItemScore,
    Provenance,
    PruningPlan,
    Speed,
    SpeedScore,
    TaskScore,
    Training,
    differences,
    fingerprint,
    require_same_run,
    write_json,
    write_text,
    written_folder,
)
from shoal.errors import UserError
from shoal.sweeps import Removal, Sweep, Unit

MADE = Provenance({"model": "abc", "prune.drop": [1, 3], "seed": 0})
TASK = TaskScore(
    task="knowledge_continuation",
    ability="knowledge",
    protocol="continuation",
    metric="acc",
    score=0.5,
    ci_low=0.1,
    ci_high=0.9,
    n=2,
    chance=0.25,
    higher_is_better=True,
    version="1",
    num_fewshot=0,
    items=(ItemScore("a", 1.0, "Köln\u2028", "Köln", rates={"cut_off": 1.0}), ItemScore("b", 0.0, weight=3.0)),
    family="steps",
    level=2.0,
    rates={"cut_off": 0.5},
)
BATCH = BatchSpeed(8, 3.0, 4.0, 0.1, None, {"first_token": (0.1, 0.2)}, {"decode_tokens_per_s": 4.5})
ARTIFACTS = (
    Importance(MADE, num_layers=2, num_tokens=9, layers={"x": (0.1, 1 / 3)}, runs={"y": ((0.5, 1e-30), (2.0,))}),
    swept_importance(),
    PruningPlan(MADE, num_layers=6, drop=(1, 3), reason="named"),
    Evaluation(MADE, role="teacher", tasks=(TASK,), num_parameters=10**12, num_layers=2, num_bytes=9, seconds=0.5),
    Speed(MADE, {"teacher": SpeedScore(1.0, 2.0, {"prefill": (1.0, 2.0)})}, 1, 2, 3, "float32"),
    Speed(MADE, {"pruned": SpeedScore(1.0, 2.0, {}, (BATCH,), 2, 10**12, 9, 4)}, 1, 2, 3, "float32", ("no room",)),
    Training(MADE, 3, 100, 1.5, ({"step": 1.0, "loss": 0.7},), {"a": None}, {"docs": {"tokens": 3}}, 5),
)


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda artifact: type(artifact).__name__)
def test_artifact_is_read_back_equal(tmp_path: Path, artifact: Artifact) -> None:
    path = tmp_path / "deep" / "er" / "x.json"
    artifact.write(path)
    again = type(artifact).read(path)
    assert again == artifact
    assert again.provenance.fingerprint == artifact.provenance.fingerprint
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == artifact.SCHEMA
    assert os.listdir(path.parent) == ["x.json"]


def test_importance_of_before_there_were_sweeps_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "importance.json"
    old = {"schema": 1, "provenance": {"inputs": {}}, "num_layers": 1, "num_tokens": 9, "layers": {}, "runs": {}}
    path.write_text(json.dumps(old))
    found = Importance.read(path)
    assert (found.orders, found.atlas, found.sweeps) == ({}, None, {})


def test_results_of_before_there_were_levels_and_batch_sizes_are_still_read(tmp_path: Path) -> None:
    made = {"schema": 1, "provenance": {"inputs": {}}}
    task = {**dataclasses.asdict(TASK), "items": [{"id": "a", "score": 1.0}]}
    for new in ("family", "level", "rates"):
        del task[new]
    sizes = {"num_parameters": 1, "num_layers": 1, "num_bytes": 1, "seconds": 1.0}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**made, "role": "teacher", "tasks": [task], **sizes}))
    (found,) = Evaluation.read(path).tasks
    assert (found.family, found.level, found.rates, found.items[0].rates) == (None, None, {}, {})
    role = {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 2.0, "samples": {}}
    settings = {"batch_size": 1, "prompt_tokens": 2, "new_tokens": 3, "dtype": "float32"}
    path.write_text(json.dumps({**made, "roles": {"teacher": role}, **settings}))
    speed = Speed.read(path)
    assert (speed.left_out, speed.roles["teacher"].batches, speed.roles["teacher"].kv_bytes_per_token) == ((), (), None)


def test_orders_and_sweeps_are_read_back_equal(tmp_path: Path) -> None:
    half = Unit((2,), "attention")
    sweeps = {"head": Sweep("head", (Unit((0,), "head", 3),), ())}
    made = Importance(MADE, 3, 1, {}, {}, orders={"block_pruner": (Removal(half, 2.5),)}, sweeps=sweeps)
    made.write(tmp_path / "x.json")
    assert Importance.read(tmp_path / "x.json") == made


def test_a_sweep_with_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    swept_importance().write(path)
    path.write_text(path.read_text().replace('"adjusted_p"', '"adjusted"', 1))
    with pytest.raises(
        UserError, match=r"atlas.sweep.columns.0.effects.0.adjusted.*; delete it and run its stage again"
    ):
        Importance.read(path)


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        (Unit((3,)), "layer 3"),
        (Unit((3, 1)), "layers 3, 1"),
        (Unit((3,), "attention"), "attention 3"),
        (Unit((3,), "kv_group", 2), "kv group 3.2"),
    ],
)
def test_units_have_names(unit: Unit, name: str) -> None:
    assert unit.name == name


def test_plan_keeps_what_it_does_not_drop() -> None:
    assert PruningPlan(MADE, num_layers=6, drop=(1, 3), reason="").keep == (0, 2, 4, 5)


def test_provenance_records_versions_and_time() -> None:
    assert MADE.environment["torch"] == torch.__version__
    assert MADE.created.endswith("+00:00")


def test_missing_artifact_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan.json: no such file; run the stage that makes it first"):
        PruningPlan.read(tmp_path / "plan.json")


def plan_with(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "plan.json"
    PruningPlan(MADE, 6, (1, 3), "").write(path)
    body = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "has schema 99, this version reads 1; delete it"),
        ({"schema": None}, "has schema None, this version reads 1; delete it"),
        ({"drop": "x"}, r"plan.json: drop: .*; delete it and run its stage again"),
        ({"reason": None}, r"plan.json: reason: .*; delete it and run its stage again"),
        ({"more": 1}, r"plan.json: more: .*; delete it and run its stage again"),
    ],
)
def test_artifact_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PruningPlan.read(plan_with(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": 1', b"\xff\xfe", b"\0" * 100])
def test_damaged_artifact_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"plan.json: is not valid JSON .*; delete it and run its stage again"):
        PruningPlan.read(path)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_json_that_is_no_artifact_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(UserError, match="has schema None"):
        PruningPlan.read(path)


def test_folder_in_place_of_an_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        PruningPlan.read(tmp_path)


def test_number_that_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Importance(MADE, 1, 1, {"x": (float("nan"),)}, {}).write(tmp_path / "x.json")
    assert os.listdir(tmp_path) == []


def test_differences_names_every_field_and_both_values() -> None:
    here = {"model": "a", "seed": 0, "drop": (1, 2), "new": None}
    there = {"model": "b", "seed": 0, "drop": [1, 2], "old": 3}
    assert differences(here, there) == [
        "model is 'a' in this recipe but 'b' there",
        "new is None in this recipe but 'absent' there",
        "old is 'absent' in this recipe but 3 there",
    ]
    assert differences(here, here) == []


def test_artifact_of_another_run_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    require_same_run({"model": "abc", "prune.drop": (1, 3)}, MADE, tmp_path, remedy="")
    with pytest.raises(UserError) as refused:
        require_same_run({"model": "xyz", "ratio": 0.5, "seed": 0}, MADE, tmp_path / "p.json", remedy="Do that.")
    assert str(refused.value) == (
        f"{tmp_path}/p.json: belongs to another run: model is 'xyz' in this recipe but 'abc' there; "
        "ratio is 0.5 in this recipe but 'absent' there. Do that."
    )


def test_fingerprint_depends_on_values_and_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": [1]})}) == 5


def test_plain_json_is_written_as_it_is(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ü": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ü": [1, None]}


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "x.txt"
    write_text(path, "old")
    monkeypatch.setattr(broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flush, seen = tmp_path / "x.txt", os.fsync, []
    monkeypatch.setattr("os.fsync", lambda descriptor: (seen.append(path.exists()), flush(descriptor)))
    write_text(path, "new")
    assert seen == [False]


def test_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "student"
    with written_folder(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert os.listdir(path.parent) == ["student"]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with written_folder(tmp_path / "student") as folder:
            (folder / name).write_text(name)
    assert os.listdir(tmp_path) == ["student"]
    assert os.listdir(tmp_path / "student") == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "student"
    with written_folder(path) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(error), written_folder(path) as folder:  # noqa: PT012
        (folder / "a").write_text("new")
        raise error
    assert os.listdir(tmp_path) == ["student"]
    assert (path / "a").read_text() == "old"


FORK = multiprocessing.get_context("fork")
"""A new interpreter would spend seconds on importing torch."""


def write_when_told(path: Path, writing: Event, told: Event) -> None:
    with written_folder(path) as folder:
        (folder / "a").write_text("half")
        writing.set()
        told.wait(60)
        (folder / "b").write_text("whole")


def test_leftover_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    path, told = tmp_path / "student", FORK.Event()
    started = [FORK.Event(), FORK.Event()]
    dead = FORK.Process(target=write_when_told, args=(path, started[0], FORK.Event()))
    living = FORK.Process(target=write_when_told, args=(path, started[1], told))
    dead.start()
    living.start()
    assert all(writing.wait(60) for writing in started)
    dead.kill()
    dead.join()
    assert len(os.listdir(tmp_path)) == 2
    with written_folder(path) as folder:
        assert len(os.listdir(tmp_path)) == 2, "the living one's and our own"
        (folder / "c").write_text("")
    assert os.listdir(path) == ["c"]
    told.set()
    living.join(60)
    assert living.exitcode == 0
    assert sorted(os.listdir(path)) == ["a", "b"], "the last one to finish wins"
    assert os.listdir(tmp_path) == ["student"]


def test_folder_that_another_process_puts_in_place_first_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename, others = tmp_path / "student", Path.rename, ["x", "y"]

    def rename_after_others(self: Path, target: Path) -> Path:
        if target == path and others:  # the place was free a moment ago
            path.mkdir()
            (path / others.pop()).write_text("")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_after_others)
    with written_folder(path) as folder:
        (folder / "ours").write_text("")
    assert os.listdir(path) == ["ours"]
    assert os.listdir(tmp_path) == ["student"]
    assert not others


def write_often(path: Path) -> None:
    for _ in range(300):
        with written_folder(path) as folder:
            (folder / "a").write_text("x")
            (folder / "b").write_text("x")


def test_processes_writing_one_folder_all_day_do_not_harm_each_other(tmp_path: Path) -> None:
    writers = [FORK.Process(target=write_often, args=(tmp_path / "student",)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert sorted(os.listdir(tmp_path / "student")) == ["a", "b"]
    assert os.listdir(tmp_path) == ["student"]


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deep" / "x"):
        with pytest.raises(UserError, match=r"a file is in the way .* set run_dir to another folder"):
            write_text(path, "")
        with pytest.raises(UserError, match="a file is in the way"), written_folder(path):
            pass


@contextmanager
def tiny_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


FULL = "the disk is full, .* Free some space or set run_dir to another disk"


def test_full_disk_is_explained_and_leaves_the_old_files(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(100_000)}
    with tiny_disk(tmp_path / "disk") as disk:
        path = disk / "student"
        write_text(disk / "x.json", "old")
        with written_folder(path) as folder:
            (folder / "a").write_text("old")
        with pytest.raises(UserError, match=f"x.json: {FULL}"):
            write_text(disk / "x.json", "new" * 100_000)
        with pytest.raises(UserError, match=f"student: {FULL}"), written_folder(path) as folder:
            (folder / "a").write_text("new" * 100_000)
        with pytest.raises(UserError, match=f"student: {FULL}"), written_folder(path) as folder:
            save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"student: {FULL}"), written_folder(path) as folder:
            torch.save(tensors, folder / "optimizer.pt")
        assert sorted(os.listdir(disk)) == ["student", "x.json"]
        assert (disk / "x.json").read_text() == (path / "a").read_text() == "old"


def write_under_limit(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(UserError, match=r"x.json: the disk is full, or your quota or file size limit is reached"):
        write_text(path, "x" * 5000)


def test_file_size_limit_is_explained(tmp_path: Path) -> None:
    writer = FORK.Process(target=write_under_limit, args=(tmp_path / "x.json",))
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    assert os.listdir(tmp_path) == []
