"""Recorded teacher signals: what they say, that they survive, and that those of another run are refused.

Covers: shoal.train.record.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE
from torch import Tensor
from torch.nn import functional

from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.load import Checkpoint, LoadSettings, load_model
from shoal.ranks import free_port
from shoal.recipe.distill import Recorded
from shoal.runtime import leave_distributed, set_up_distributed
from shoal.train import record as stage
from shoal.train.record import record_signals, top_k_signals
from shoal.train.teacher import recording
from shoal.train.teacher.recording import HEADER_BYTES, RecordingManifest, Wanted, decode_log_probs, encode_log_probs
from shoal.train.teacher.signals import RecordingReader

S = 12
LOAD = {"dtype": "float32", "attention": "sdpa"}
ROWS_FROM = {"seed": 0, "distill.data": "text"}
MAX_ERROR = 8e-4
"""Nats by which a log-probability that is read back can differ from the one recorded: half a code at most, and what
brings the sum back to one."""


def rows(num: int = 8, *, seed: int = 0) -> PackedRows:
    """The first ``num`` of an endless supply, two documents in each."""
    ids = torch.randint(0, 250, (64, S), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    positions = torch.cat([torch.arange(7), torch.arange(S - 7)]).int().repeat(64, 1)
    return PackedRows(ids[:num], positions[:num])


def wanted_of(teacher: Path, folder: Path, **changes: Any) -> Wanted:
    """What is wanted of the teacher, to be kept in ``folder``, which is no run's own."""
    load: Any = LOAD | {key: changes.pop(key) for key in LOAD if key in changes}
    settings = Recorded(path=str(folder), top_k=changes.pop("top_k", 5), prefix="prefix" in changes)
    checkpoint = Checkpoint.read(teacher, LoadSettings(**load))
    return Wanted(checkpoint, changes.pop("model", "teacher"), S, settings, **{"states": (1, 3), **changes})


def record(teacher: Path, folder: Path, data: PackedRows | None = None, *, verify: bool = True, **changes: Any) -> None:
    recorded, wanted = rows() if data is None else data, wanted_of(teacher, folder, **changes)
    record_signals(wanted, recorded, folder, rows_from=ROWS_FROM, rows_per_shard=3, verify=verify)


def opened(
    teacher: Path, folder: Path, data: PackedRows | None = None, *, rows_from: Any = ROWS_FROM, **changes: Any
) -> RecordingReader:
    wanted = wanted_of(teacher, folder, **changes)
    return RecordingReader(folder, rows() if data is None else data, wanted, rows_from=rows_from)


@pytest.fixture(autouse=True)
def two_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "ROWS_AT_ONCE", 2)


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


def outputs(teacher: Path, data: PackedRows, *, dtype: str = "float32", of: slice = slice(None)) -> Any:
    """What transformers' own forward gives for these rows, the states before every layer among it."""
    model, ids, positions = load_model(teacher, dtype=dtype), data.input_ids_NS[of], data.position_ids_NS[of]
    with torch.no_grad():
        # without a cache: only then transformers sees that the documents of a row are separate
        asked: dict[str, Any] = {"use_cache": False, "output_hidden_states": True}
        return model(input_ids=ids.long(), position_ids=positions.long(), **asked)


def bucket_kl(log_p_K: Tensor, tail: Tensor, log_q_K: Tensor) -> Tensor:
    """KL of the K + 1 coarse distributions, by its definition, in float64."""
    log_p_K, log_q_K, tail = log_p_K.double(), log_q_K.double(), tail.double()
    rest_q = 1 - log_q_K.exp().sum(-1)
    inside = (log_p_K.exp() * (log_p_K - log_q_K)).sum(-1)
    return inside + torch.where(tail > 0, tail * (tail.clamp(min=1e-300).log() - rest_q.log()), 0.0)


# --- what is recorded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 5, VOCAB_SIZE - 1])
def test_recorded_signals_are_the_teachers_within_the_stated_error(teacher, tmp_path, top_k, temperature):
    settings: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "states": ()}
    record(teacher, tmp_path / "signals", **settings)
    found = opened(teacher, tmp_path / "signals", **settings).rows(range(8))
    expected = functional.log_softmax(outputs(teacher, rows()).logits.double() / temperature, dim=-1)
    best = expected.topk(top_k, dim=-1)
    assert torch.equal(found.ids_BSK[..., :1], best.indices[..., :1])
    at_ids = expected.gather(-1, found.ids_BSK)
    assert (at_ids - best.values).abs().max() < 1e-5  # the same tokens, up to equal ones
    assert (found.log_probs_BSK - at_ids).abs().max() < MAX_ERROR
    tail = 1 - at_ids.exp().sum(-1)
    assert (found.tail_BS - tail).abs().max() < MAX_ERROR * tail.max() + 1e-6
    assert (found.log_probs_BSK.double().exp().sum(-1) + found.tail_BS - 1).abs().max() < 1e-6
    assert found.ids_BSK.dtype == torch.int64
    assert found.log_probs_BSK.dtype == found.tail_BS.dtype == torch.float32


def test_states_are_the_raw_outputs_of_the_layers_asked_for(teacher, tmp_path):
    record(teacher, tmp_path / "signals")
    found = opened(teacher, tmp_path / "signals").rows([4, 7])
    states = outputs(teacher, rows()).hidden_states
    assert found.states.keys() == {1, 3}
    for layer, state in found.states.items():
        assert state.dtype == torch.bfloat16
        torch.testing.assert_close(state.float(), states[layer + 1][[4, 7]], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_to_go_on_from_is_the_teachers_to_the_bit(teacher, tmp_path, dtype):
    run: dict[str, Any] = {"dtype": dtype, "prefix": 2}
    record(teacher, tmp_path / "signals", **run)
    found = opened(teacher, tmp_path / "signals", **run).rows([4, 0, 3]).prefix_BSD
    states = outputs(teacher, rows(), dtype=dtype, of=slice(3, 5)).hidden_states
    assert found is not None
    assert found.dtype == getattr(torch, dtype)
    # the same two rows at one time as when it was recorded
    assert torch.equal(found[[2, 0]], states[2])
    layout = wanted_of(teacher, tmp_path, **run).layout
    written = sum(map(len, shards(tmp_path / "signals").values()))
    assert layout.num_bytes(8) < written <= layout.num_bytes(8) + 3 * HEADER_BYTES
    plain = wanted_of(teacher, tmp_path, dtype=dtype).layout
    assert layout.num_bytes(1) - plain.num_bytes(1) == S * states[2].shape[-1] * found.element_size()


# --- how it is coded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_bucket_kl_of_recorded_signals_is_off_by_no_more_than_stated(temperature):
    """|error| <= MAX_ERROR (KL + sqrt(2 KL)) + 1e-6, for students near and far."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(400, 5000, generator=generator) / temperature
    log_p, log_probs, tail = top_k_signals(teacher, lambda x: x.clone(), top_k=32, temperature=1.0)
    ids, exact = log_p, functional.log_softmax(teacher.double(), dim=-1).gather(-1, log_p)
    stored = torch.from_numpy(decode_log_probs(encode_log_probs(log_probs).numpy())).double()
    total = stored.exp().sum(-1) + tail
    for noise in (0.0, 0.1, 1.0, 4.0):
        student = teacher + noise * torch.randn(teacher.shape, generator=generator)
        log_q = functional.log_softmax(student.double(), dim=-1).gather(-1, ids)
        true = bucket_kl(exact, 1 - exact.exp().sum(-1), log_q)
        found = bucket_kl(stored - total.log()[:, None], tail / total, log_q)
        bound = MAX_ERROR * (true + (2 * true.clamp(min=0)).sqrt()) + 1e-6
        assert ((found - true).abs() <= bound).all()


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_recording_serves_a_run_with_fewer_rows_and_refuses_one_with_more(teacher, tmp_path):
    record(teacher, tmp_path / "signals")
    assert opened(teacher, tmp_path / "signals", rows(4)).rows([3]).ids_BSK.shape == (1, S, 5)
    with pytest.raises(UserError, match=r"holds 8 rows, but this run needs 11; .* adds the missing rows"):
        opened(teacher, tmp_path / "signals", rows(11))


# --- going on -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between two shards", "in the middle of a shard", "while a shard is written"])
def test_a_recording_that_was_killed_goes_on_at_the_next_shard(teacher, tmp_path, monkeypatch, moment):
    record(teacher, tmp_path / "whole")
    calls: list[int] = []

    def then_die(function, number):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                raise Killed
            return function(*args, **kwargs)

        return call

    place, name, number = {
        "between two shards": (stage, "_record_shard", 2),
        "in the middle of a shard": (stage, "top_k_signals", 4),
        "while a shard is written": (recording, "save_file", 2),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, then_die(getattr(place, name), number))
        with pytest.raises(Killed):
            record(teacher, tmp_path / "signals")
    assert list(shards(tmp_path / "signals")) == ["shard-000000.safetensors"]
    (tmp_path / "signals" / ".shard-000001.safetensors.abc.tmp").write_bytes(b"what a real SIGKILL leaves")
    with pytest.raises(UserError, match="holds 0 rows, but this run needs 8; run `shoal record` again"):
        opened(teacher, tmp_path / "signals")

    done: list[range] = []
    original = stage._record_shard
    monkeypatch.setattr(stage, "_record_shard", lambda *args, **how: (done.append(args[2]), original(*args, **how))[1])
    record(teacher, tmp_path / "signals")
    assert done == [range(3, 6), range(6, 8)]
    assert shards(tmp_path / "signals") == shards(tmp_path / "whole")
    assert not list((tmp_path / "signals").glob(".*"))
    manifests = [RecordingManifest.load(tmp_path / name / RecordingManifest.FILE) for name in ("signals", "whole")]
    assert manifests[0].shards == manifests[1].shards
    opened(teacher, tmp_path / "signals")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_torn_shard_is_named_and_recorded_again(teacher, tmp_path, caplog, damage):
    folder = tmp_path / "signals"
    record(teacher, folder)
    whole = shards(folder)
    file = folder / "shard-000001.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-100] ^= 1
    file.write_bytes(b"" if damage == "empty" else content[:-7] if damage == "cut" else content)
    if damage == "gone":
        file.unlink()
    if damage != "flipped":  # a checksum over everything is no work for every start
        with pytest.raises(UserError, match=r"shard-000001.*run `shoal record` again"):
            opened(teacher, folder)
    record(teacher, folder)
    assert shards(folder) == whole
    assert damage == "gone" or "shard-000001.safetensors" in caplog.text


def run_rank(rank: int, port: int, teacher: Path, folder: Path) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    set_up_distributed(60)
    record(teacher, folder, prefix=2)
    leave_distributed()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork; a fresh start takes 20 seconds")
def test_two_ranks_write_the_same_bytes_as_one(teacher, tmp_path):
    record(teacher, tmp_path / "one", prefix=2)
    forked, port = multiprocessing.get_context("fork"), free_port()
    ranks = [forked.Process(target=run_rank, args=(rank, port, teacher, tmp_path / "two")) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    manifests = [RecordingManifest.load(tmp_path / name / RecordingManifest.FILE) for name in ("one", "two")]
    assert manifests[0].shards == manifests[1].shards


# --- refusals -----------------------------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model": "another"},
    "dtype": {"dtype": "bfloat16"},
    "attention": {"attention": "eager"},
    "distill.teacher.top_k": {"top_k": 6},
    r"distill.losses \(temperature\)": {"temperature": 2.0},
    r"distill.losses \(states\)": {"states": (1, 2)},
    "distill.teacher.prefix": {"prefix": 2},
}


@pytest.mark.parametrize("field", OTHERS)
def test_signals_of_another_run_are_refused_by_the_field_that_differs(teacher, tmp_path, field):
    record(teacher, tmp_path / "signals")
    kept = shards(tmp_path / "signals")
    for act in (opened, record):
        with pytest.raises(UserError, match=rf"belongs to another run: {field} is .* in this recipe but .* there"):
            act(teacher, tmp_path / "signals", **OTHERS[field])
    assert shards(tmp_path / "signals") == kept


def test_what_holds_more_serves_and_is_gone_on_with(teacher, tmp_path):
    record(teacher, tmp_path / "more", rows(4), prefix=2)
    plain: dict[str, Any] = {"states": (3,)}
    record(teacher, tmp_path / "more", **plain)
    record(teacher, tmp_path / "plain", **plain)
    more, alone = (opened(teacher, tmp_path / name, **plain).rows(range(8)) for name in ("more", "plain"))
    assert torch.equal(more.log_probs_BSK, alone.log_probs_BSK)
    assert more.prefix_BSD is None
    assert more.states.keys() == alone.states.keys() == {3}
    assert torch.equal(more.states[3], alone.states[3])


@pytest.mark.parametrize("change", ["top_k", "rows", "neither"])
def test_a_recording_of_the_runs_own_is_made_again_where_it_is_out_of_date(teacher, tmp_path, caplog, change):
    """And nothing else that lies in its folder is touched."""
    folder = tmp_path / "signals"
    own = replace(wanted_of(teacher, folder), settings=Recorded(top_k=5))
    record_signals(own, rows(), folder, rows_from=ROWS_FROM, rows_per_shard=3)
    kept = {name: (folder / name).stat().st_mtime_ns for name in shards(folder)}
    (folder / "notes.txt").write_text("mine")
    if change == "top_k":
        own = replace(own, settings=Recorded(top_k=6))
    data = rows(5, seed=1) if change == "rows" else rows(5)
    record_signals(own, data, folder, rows_from=ROWS_FROM, rows_per_shard=3, verify=False)
    assert ("is recorded again: " in caplog.text) == (change != "neither")
    made = {name: (folder / name).stat().st_mtime_ns for name in shards(folder)}
    assert made == kept if change == "neither" else made.keys() == set(sorted(kept)[:2])
    assert (folder / "notes.txt").read_text() == "mine"
    RecordingReader(folder, data, own, rows_from=ROWS_FROM)


def test_signals_of_other_rows_are_refused_with_what_shaped_them(teacher, tmp_path):
    record(teacher, tmp_path / "signals")
    data = rows()
    data.input_ids_NS[4, 2] += 1
    with pytest.raises(UserError, match=r"row 4 has other tokens \(the text or the order"):
        opened(teacher, tmp_path / "signals", data)
    with pytest.raises(UserError, match=r"row 0 has other tokens \(seed is 1 in this recipe but 0 there\)"):
        opened(teacher, tmp_path / "signals", rows(seed=1), rows_from={**ROWS_FROM, "seed": 1})
    with pytest.raises(UserError, match="row 0 has other tokens"):
        record(teacher, tmp_path / "signals", rows(seed=1))
    moved = rows()
    moved.position_ids_NS[5, 7] = 7  # another border between documents
    with pytest.raises(UserError, match="row 5 has other tokens"):
        opened(teacher, tmp_path / "signals", moved)


def test_as_many_tokens_as_the_vocabulary_has_are_refused(teacher, tmp_path):
    with pytest.raises(UserError, match=r"distill.teacher.top_k: 272 covers all of the 272 tokens .* lower it"):
        record(teacher, tmp_path / "signals", top_k=VOCAB_SIZE)
    assert not (tmp_path / "signals").exists()
