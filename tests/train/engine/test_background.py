"""Checkpoints that are written while training goes on."""

import threading
from types import SimpleNamespace

import torch
from torch import nn

from shoal.atomic_files import file_hash
from shoal.train.engine import background
from shoal.train.engine.background import BackgroundWriter, copy_on_host


def state():
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    return {
        "module": {"weight": weight, "tied": weight, "row": weight.detach()[1]},
        "scaler": SimpleNamespace(scale=[2.0]),
        "step": torch.tensor(3),
        "none": (torch.zeros(0), None),
    }


def step(of):
    of["module"]["weight"].data.add_(1)
    of["scaler"].scale[0] = 0.0
    of["step"] += 1


def test_a_copy_is_what_stood_there_whatever_steps_do_and_none_where_memory_is_short():
    trained, kept = state(), state()
    copy = copy_on_host(trained, 64)
    step(trained)
    assert str(copy) == str(kept)
    assert isinstance(copy["module"]["weight"], nn.Parameter)
    assert copy["module"]["weight"] is copy["module"]["tied"]
    assert copy_on_host(kept, 6 * 4 + 3 * 4 + 8 - 1) is None, "a tied weight counts once"


def test_training_goes_on_while_a_copy_is_written_and_waits_where_there_is_no_room(tmp_path, monkeypatch):
    going_on, trained, path = threading.Event(), state(), tmp_path / "state.pt"

    def save(what, file):
        assert going_on.wait(10)
        torch.save(what, file)

    writer = BackgroundWriter(save)
    writer.save(trained, str(path))
    assert not writer.is_done()
    step(trained)
    going_on.set()
    assert writer.wait() == ({path: file_hash(path)}, None)
    assert str(torch.load(path, weights_only=False)) == str(state())
    monkeypatch.setattr(background, "SHARE_OF_HOST", 0.0)
    writer.save(state(), str(path))
    assert writer.is_done()
    assert writer.wait() == ({path: file_hash(path)}, None), "and what was told before is not"


def test_a_full_disk_is_told_where_ranks_meet():
    writer = BackgroundWriter(torch.save)
    writer.save({"weight": torch.zeros(2**20)}, "/dev/full")
    assert "No space left" in str(writer.wait()[1])


def test_what_is_still_being_written_at_the_end_is_given_up(tmp_path):
    begun = threading.Event()

    def save(what, file):
        begun.set()
        while file.error is None:
            file.write(bytes(2**12))

    writer = BackgroundWriter(save)
    writer.save({}, str(tmp_path / "state.pt"))
    assert begun.wait(10)
    writer.end()
    assert writer.is_done()
