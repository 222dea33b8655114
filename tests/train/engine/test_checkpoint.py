"""A checkpoint is complete or it does not count."""

import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import as_rank

from shoal.errors import UserError
from shoal.train.engine import checkpoint as checkpoint_module
from shoal.train.engine.checkpoint import (
    MANIFEST,
    UNIVERSAL,
    commit,
    last_complete,
    needs_universal,
    own_steps,
    remove_older,
    removed_unless_complete,
    separate_groups,
)


@pytest.fixture(autouse=True)
def _own_key(tmp_path_factory, monkeypatch):
    """No key but that of this test, and no run directory that is vouched for."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("SHOAL_TRUSTED_RUNS", raising=False)


INPUTS = {"model": "abc", "distill.trainer.learning_rate": 0.1}
SHARD = Path("shards/0.pt")


def checkpoint(root, step):
    folder = root / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "state.json").write_text(f"step {step}")
    (folder / "shards" / "0.pt").write_bytes(bytes(range(200)))
    return folder


def committed(root, *steps):
    folders = [checkpoint(root, step) for step in steps]
    for folder in folders:
        commit(folder, INPUTS)
    return folders


def test_the_newest_complete_checkpoint_is_taken_by_number_not_by_name(tmp_path):
    committed(tmp_path, 2, 10, 9)
    assert last_complete(tmp_path, INPUTS) == tmp_path / "checkpoint-10"


def test_one_of_an_older_shoal_which_kept_no_times_is_read_again(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        stamp = checkpoint_module._stamp
        without = lambda *given: {key: value for key, value in stamp(*given).items() if key != "changed_ns"}  # noqa: E731
        older.setattr(checkpoint_module, "_stamp", without)
        (folder,) = committed(tmp_path, 1)
    assert last_complete(tmp_path, INPUTS) == folder


def test_one_of_another_version_of_a_library_says_so_and_is_taken(tmp_path, monkeypatch, caplog):
    now = checkpoint_module.environment()
    with monkeypatch.context() as older:
        older.setattr(checkpoint_module, "environment", lambda: now | {"torch": "2.1.0", "trl": "0.1"})
        (folder,) = committed(tmp_path, 1)
    assert last_complete(tmp_path, INPUTS, by_manifest=True) == folder
    assert not caplog.text
    assert last_complete(tmp_path, INPUTS) == folder
    told = f"checkpoint-1: was made with torch 2.1.0 (this is {torch.__version__}); new numbers may differ"
    assert told in caplog.text
    assert "trl" not in caplog.text


def test_a_checkpoint_whose_save_fails_goes_unless_its_manifest_vouches_for_it(tmp_path, monkeypatch):
    """A rank that dies behind the manifest breaks the barrier at the end of the others; what they saved is complete."""
    for waits, complete in ((0, None), (1, tmp_path / "checkpoint-2")):
        folder = checkpoint(tmp_path, 2)
        monkeypatch.setattr(checkpoint_module, "barrier", partial(next, iter(range(waits))))
        with pytest.raises(StopIteration), removed_unless_complete(folder):
            commit(folder, INPUTS)
        assert last_complete(tmp_path, INPUTS) == complete
        assert folder.exists() == (complete is not None)


def flip(folder):
    file = folder / "shards" / "0.pt"
    stamped = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == stamped:  # the system's clock of files ticks every few milliseconds
        file.write_bytes(bytes(reversed(range(200))))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SHARD).write_bytes(b"x"), r"shards/0\.pt has 1 bytes instead of 200"),
        (flip, r"shards/0\.pt does not match its checksum"),
        (lambda folder: (folder / SHARD).unlink(), r"shards/0\.pt is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "was not finished"),
        (lambda folder: (folder / MANIFEST).write_text('{"inputs"'), "has a damaged manifest"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage, message):
    _, newest = committed(tmp_path, 1, 2)
    damage(newest)
    with caplog.at_level("WARNING"):
        assert last_complete(tmp_path, INPUTS) == tmp_path / "checkpoint-1"
    assert "resuming from the checkpoint before it" in caplog.text
    assert re.search(message, caplog.text)


class Payload:
    def __reduce__(self):
        return print, ("code of somebody else runs",)


def planted(folder):
    """A file of another's making, its checksum put into the manifest."""
    (folder / "shards" / "0.pt").write_bytes(pickle.dumps(Payload()))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["shards/0.pt"] = checkpoint_module._stamp(folder / "shards" / "0.pt")
    (folder / MANIFEST).write_text(json.dumps(manifest))


def made_by_another(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "signature": "0" * 64}))


def of_an_older_shoal(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({key: value for key, value in manifest.items() if key != "signature"}))


@pytest.mark.parametrize("change", [planted, made_by_another, of_an_older_shoal])
def test_a_checkpoint_that_this_user_has_not_signed_is_refused_without_consent(tmp_path, monkeypatch, change):
    _, newest = committed(tmp_path / "run" / "checkpoints", 1, 2)
    folder = newest.parent
    last_complete(folder, INPUTS)
    change(newest)
    message = (
        rf"checkpoint-2: is not signed with your key .*Delete {folder} to train from the beginning.*"
        rf"SHOAL_TRUSTED_RUNS={tmp_path}/run"
    )
    for by_manifest in (False, True):
        with pytest.raises(UserError, match=message):
            last_complete(folder, INPUTS, by_manifest=by_manifest)
    monkeypatch.setenv("SHOAL_TRUSTED_RUNS", str(tmp_path / "run"))
    assert last_complete(folder, INPUTS) == newest


def test_removal_keeps_the_newest_complete_ones_and_an_unfinished_one_that_is_newer(tmp_path):
    checkpoint(tmp_path, 0)
    committed(tmp_path, 1, 2, 3)
    for step in (4, "mine"):  # the second is a user's own
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-1.tar").touch()
    remove_older(tmp_path, keep=2)
    left = ["checkpoint-1.tar", "checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-mine"]
    assert sorted(f.name for f in tmp_path.iterdir()) == left


@pytest.mark.parametrize(("saved", "asked"), [(2, 3), (3, 2), (0, 1), (1, 0)])
def test_a_zero_stage_that_lays_out_the_optimizer_differently_is_refused(tmp_path, saved, asked):
    folder = checkpoint(tmp_path, 1)
    commit(folder, INPUTS, zero_stage=saved)
    message = f"was trained under ZeRO stage {saved}, .* under stage {asked}, .*Set stage {saved} in distill.deepspeed"
    with pytest.raises(UserError, match=message):
        needs_universal(folder, zero_stage=asked)


def test_a_conversion_is_made_for_other_ranks_and_takes_nothing_from_the_checkpoint(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, 1)
    (folder / "latest").write_text("shards")
    commit(folder, INPUTS, zero_stage=1)
    for name, value in as_rank(0, 2).items():
        monkeypatch.setenv(name, value)
    made = []

    def convert(request):
        made.append(request.input_folder)
        (folder / "latest_universal").write_text("a temporary name")
        zero = Path(request.output_folder) / "zero"
        zero.mkdir()
        (zero / "fp32.pt").write_bytes(b"12345")

    monkeypatch.setattr("deepspeed.checkpoint.ds_to_universal.main", convert)
    for _ in range(2):
        assert needs_universal(folder, zero_stage=2)
        assert (folder / "latest_universal").read_text() == UNIVERSAL
    assert made == 2 * [str(folder / "shards")]
    assert last_complete(tmp_path, INPUTS) == folder, "the ranks' own files count as before"


def test_groups_that_deepspeed_mixed_up_are_apart_again(tmp_path):
    saved = [{"lr": 0.1, "weight_decay": 0.3, "params": [0]}, {"lr": 0.1, "weight_decay": 0.0, "params": [1]}]
    (tmp_path / UNIVERSAL / "zero").mkdir(parents=True)
    torch.save({"param_groups": saved}, tmp_path / UNIVERSAL / "zero" / "optimizer_state.pt")
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [w], "weight_decay": 0.3} for w in weights])
    step = torch.tensor(4.0)
    for weight in weights:
        optimizer.state[weight] = {"step": step, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    separate_groups(optimizer, tmp_path)
    own_steps(optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    for weight in weights:
        weight.grad = torch.ones(2)
    optimizer.step()
    assert [optimizer.state[weight]["step"].item() for weight in weights] == [5.0, 5.0]


@pytest.mark.parametrize("where", ["fused", "capturable", None])
def test_steps_lie_where_a_kernel_on_the_device_looks_for_them(where):
    weight = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    if where is not None:
        optimizer.param_groups[0][where] = True
    optimizer.state[weight] = {"step": torch.tensor(4.0), "exp_avg": torch.empty(2, device="meta")}
    own_steps(optimizer)
    assert optimizer.state[weight]["step"].device.type == ("cpu" if where is None else "meta")
