"""Files and folders that are whole or absent, whoever dies while they are written."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shoal import atomic_files
from shoal.atomic_files import only_process, write_text, written_folder
from shoal.errors import UserError


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


@pytest.mark.parametrize("can_exchange", [True, False])
def test_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic_files, "_exchanged", lambda *_: False)
    for name in ("a", "b"):
        with written_folder(tmp_path / "student") as folder:
            (folder / name).write_text(name)
    assert os.listdir(tmp_path) == ["student"]
    assert os.listdir(tmp_path / "student") == ["b"]


def test_a_link_to_a_folder_on_another_disk_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk" / "student").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "student").symlink_to(tmp_path / "disk" / "student")
    with written_folder(tmp_path / "run" / "student") as folder:
        (folder / "a").write_text("new")
    assert os.listdir(tmp_path / "run") == os.listdir(tmp_path / "disk") == ["student"]
    assert (tmp_path / "disk" / "student" / "a").read_text() == "new"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="this system cannot exchange two names")
def test_folder_is_there_at_every_moment_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever dies between two renames would leave none."""
    path = tmp_path / "student"
    with written_folder(path) as folder:
        (folder / "a").write_text("old")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the place is empty for a moment"))
    with written_folder(path) as folder:
        (folder / "a").write_text("new")
    assert (path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["student"]


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


@pytest.mark.slow
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


def test_a_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path: Path) -> None:
    path, aside = tmp_path / "student", tmp_path / ".student.old"
    aside.mkdir()
    (aside / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), written_folder(path):
        raise KeyboardInterrupt
    assert (path / "weights").read_text() == "old"
    with written_folder(path) as temporary:
        (temporary / "weights").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["student"]
    assert (path / "weights").read_text() == "new"


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deep" / "x"):
        with pytest.raises(UserError, match=r"a file with this name exists .* set run_dir to another folder"):
            write_text(path, "")
        with pytest.raises(UserError, match="a file with this name exists"), written_folder(path):
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


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_lock_that_is_another_file_is_refused_and_the_file_left(tmp_path: Path, link: Any) -> None:
    (tmp_path / "mine").write_text("precious")
    link(tmp_path / "mine", tmp_path / ".lock")
    with (
        pytest.raises(UserError, match=r"\.lock: a link to another file"),
        only_process(tmp_path / ".lock", "x", wait_s=0),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "precious"
