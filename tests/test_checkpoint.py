"""A checkpoint is complete or it does not count."""

import json
import re

import pytest

from shoal.errors import UserError
from shoal.train.checkpoint import MANIFEST, commit, last_complete, remove_older

INPUTS = {"model": "abc", "distill.trainer.learning_rate": 0.1}


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


def test_no_checkpoint_is_no_error(tmp_path):
    assert last_complete(tmp_path / "nowhere", INPUTS) is None


def truncate(folder):
    (folder / "shards" / "0.pt").write_bytes(b"x")


def flip(folder):
    (folder / "shards" / "0.pt").write_bytes(bytes(reversed(range(200))))


def lose(folder):
    (folder / "shards" / "0.pt").unlink()


def unfinished(folder):
    (folder / MANIFEST).unlink()


def tear_manifest(folder):
    (folder / MANIFEST).write_text('{"inputs"')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"shards/0\.pt has 1 bytes instead of 200"),
        (flip, r"shards/0\.pt does not match its checksum"),
        (lose, r"lacks shards/0\.pt"),
        (unfinished, "was not finished"),
        (tear_manifest, "has a damaged manifest"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage, message):
    _, newest = committed(tmp_path, 1, 2)
    damage(newest)
    with caplog.at_level("WARNING"):
        assert last_complete(tmp_path, INPUTS) == tmp_path / "checkpoint-1"
    assert "going back to the checkpoint before it" in caplog.text
    assert re.search(message, caplog.text)


def test_a_checkpoint_of_another_run_is_refused_naming_the_field(tmp_path):
    committed(tmp_path, 1)
    with pytest.raises(UserError, match=r"distill\.trainer\.learning_rate is 0\.5 in this recipe but 0\.1 there"):
        last_complete(tmp_path, {**INPUTS, "distill.trainer.learning_rate": 0.5})


def test_removal_keeps_the_newest_complete_ones_and_does_not_count_unfinished_ones(tmp_path):
    committed(tmp_path, 1, 2, 3)
    checkpoint(tmp_path, 4)
    remove_older(tmp_path, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_the_manifest_names_every_file(tmp_path):
    (folder,) = committed(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {"state.json", "shards/0.pt"}
    assert manifest["inputs"] == INPUTS
