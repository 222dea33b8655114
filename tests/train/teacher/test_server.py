"""Teachers that a server, or vLLM, runs: recorded like others, let in only if they agree, and refused by what is wrong.

Covers: shoal.train.teacher.prompt_scores, shoal.train.teacher.agreement, shoal.train.teacher.in_process.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stand_in
from packed_rows import packed
from prompt_server import NAME, VERSION, Answer, PromptServer, serving
from tiny import VOCAB_SIZE, tiny_checkpoint
from torch import Tensor

from shoal.compress.variants.final_states import final_states
from shoal.compress.variants.streamed_model import StreamedModel
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.load import Checkpoint, LoadSettings, load_model
from shoal.recipe.distill import Check, Record, Server
from shoal.train.objective.objective import output_head
from shoal.train.record import record_signals
from shoal.train.teacher import server as client
from shoal.train.teacher.prompt_scores import PromptSignals, bucket_kl
from shoal.train.teacher.recording_format import MAX_ERROR
from shoal.train.teacher.recording_plan import RecordingManifest, recording_inputs
from shoal.train.teacher.recording_reader import RecordingReader

S = 12
TOP_K = 5
LOAD = LoadSettings(dtype="float32")
CHECK = Check(num_tokens=30)
ROWS_FROM = {"seed": 0, "distill.data": "text"}


def rows(num: int = 8) -> PackedRows:
    """The first ``num`` of an endless supply, two documents in each."""
    return packed([[7, S - 7]] * 16).first(num)


@pytest.fixture
def server(teacher: Path) -> Iterator[PromptServer]:
    """Of one test alone: a request that its client gave up would take part in the next one."""
    with serving(teacher) as server:
        yield server


def settings(server: PromptServer | None, *, check: Check | None = CHECK, **changes: Any) -> Record:
    """Of a recording by ``server``; None = by vLLM in this process."""
    keys = {field.name for field in dataclasses.fields(Server)}
    own = {"retries": 0, **{key: value for key, value in changes.items() if key in keys}}
    more = {"server": Server(server.url, **own)} if server is not None else {"backend": "vllm"}
    rest = {key: value for key, value in changes.items() if key not in keys}
    return Record(**{"top_k": TOP_K, "rows_per_shard": 3, "check": check, **more, **rest})


def reference(teacher: Path):
    def states_and_head(ids_NS: Tensor, positions_NS: Tensor):
        model = StreamedModel(teacher, dtype="float32")
        return final_states(model, ids_NS, positions_NS), output_head(model.model)

    return states_and_head


def record(teacher: Path, folder: Path, how: Record, *, num_rows: int = 8) -> None:
    record_signals(
        Checkpoint.read(teacher, LOAD),
        rows(num_rows),
        folder,
        how,
        model="teacher",
        rows_from=ROWS_FROM,
        reference=reference(teacher),
    )


def read(teacher: Path, folder: Path, how: Record):
    inputs = recording_inputs(how, Checkpoint.read(teacher, LOAD), model="teacher", sequence_length=S)
    return RecordingReader(folder, rows(), inputs=inputs, rows_from=ROWS_FROM).rows(range(8))


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


# --- what is recorded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, TOP_K, VOCAB_SIZE - 1])
def test_a_server_records_what_transformers_does(teacher, server, tmp_path, top_k):
    local = Record(top_k=top_k, rows_per_shard=3)
    record(teacher, tmp_path / "local", local)
    by_server = settings(server, top_k=top_k)
    record(teacher, tmp_path / "served", by_server)
    ours, theirs = read(teacher, tmp_path / "served", by_server), read(teacher, tmp_path / "local", local)
    assert (ours.ids_BSK == theirs.ids_BSK).float().mean() > 0.99  # up to equal ones
    assert (ours.log_probs_BSK - theirs.log_probs_BSK).abs().max() < MAX_ERROR
    assert (ours.tail_BS - theirs.tail_BS).abs().max() < 1e-5
    manifest = RecordingManifest.read(tmp_path / "served" / RecordingManifest.FILE)
    assert manifest.engine is not None
    told = {"engine": "server", "url": server.url, "model": NAME, "version": VERSION, "compared_tokens": 3 * S}
    assert {key: value for key, value in manifest.engine.items() if key != "bucket_kl"} == told
    assert 0 <= manifest.engine["bucket_kl"] < 1e-6


def test_every_document_is_a_prompt_with_a_token_behind_it_that_nobody_reads(teacher, server, tmp_path):
    record(teacher, tmp_path / "signals", settings(server, check=None, parallel=3))
    documents = [part.tolist() for row in rows().input_ids_NS for part in (row[:7], row[7:])]
    asked = [body.pop("prompt") for body in server.asked]
    assert sorted(asked) == sorted([*document, document[-1]] for document in documents)
    expected = {"model": NAME, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": TOP_K, "return_token_ids": True}
    assert all(body == expected for body in server.asked)


def test_vllm_here_records_what_its_server_does(teacher, server, tmp_path, monkeypatch):
    made = vllm_stand_in.install(monkeypatch).made
    monkeypatch.setattr(importlib.metadata, "version", lambda _: VERSION)
    record(teacher, tmp_path / "here", settings(None))
    assert len(made) == 1
    record(teacher, tmp_path / "served", settings(server))
    ours = read(teacher, tmp_path / "here", settings(None))
    theirs = read(teacher, tmp_path / "served", settings(server))
    assert all(torch.equal(own, other) for own, other in zip(ours[:3], theirs[:3], strict=True))
    engine = RecordingManifest.read(tmp_path / "here" / RecordingManifest.FILE).engine
    assert engine is not None
    assert (engine["engine"], engine["version"], engine["dtype"]) == ("vllm", VERSION, "float32")
    other = Checkpoint.read(teacher, LoadSettings(dtype="bfloat16"))
    inputs = recording_inputs(settings(None), other, model="teacher", sequence_length=S)
    with pytest.raises(UserError, match="another run: dtype is 'bfloat16' in this recipe but 'float32' there"):
        RecordingReader(tmp_path / "here", rows(), inputs=inputs, rows_from=ROWS_FROM)


def test_vllm_that_is_not_there_or_meets_several_ranks_or_long_rows_is_refused(teacher, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"record\.backend: vllm is not installed here; install it, or use backend"):
        record(teacher, tmp_path / "signals", settings(None))
    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr("shoal.inference.vllm.world_size", lambda: 2)
    with pytest.raises(UserError, match=r"cannot be run by 2 ranks; run `shoal record` without a launcher"):
        record(teacher, tmp_path / "signals", settings(None))
    monkeypatch.setattr("shoal.inference.vllm.world_size", lambda: 1)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: VERSION)
    short = tiny_checkpoint(tmp_path, "llama", max_position_embeddings=S + 1)
    with pytest.raises(UserError, match=r"takes the 13 positions of .* and a row of 12 needs 14; lower distill\.seq"):
        record(short, tmp_path / "signals", settings(None))


def test_signals_of_a_server_are_not_taken_for_those_of_transformers(teacher, server, tmp_path):
    by_server = settings(server)
    record(teacher, tmp_path / "signals", by_server)
    local = dataclasses.replace(by_server, server=None, check=Check())
    message = r"belongs to another run: .*record\.backend is 'absent' in this recipe but 'server' there"
    with pytest.raises(UserError, match=message):
        read(teacher, tmp_path / "signals", local)
    with pytest.raises(UserError, match=message):
        record(teacher, tmp_path / "signals", local)
    # another address of the same server, and another precision of the comparison, change nothing of what it says
    moved = dataclasses.replace(by_server, server=Server("http://elsewhere:1/v1"))
    other = Checkpoint.read(teacher, LoadSettings(dtype="bfloat16"))
    inputs = recording_inputs(moved, other, model="teacher", sequence_length=S)
    RecordingReader(tmp_path / "signals", rows(), inputs=inputs, rows_from=ROWS_FROM)


# --- agreement ----------------------------------------------------------------------------------------------------


def test_bucket_kl_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits_p, logits_q = (torch.randn(2, 3, 40, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    q = logits_q.softmax(-1)
    best = q.topk(4, dim=-1)
    own = torch.zeros(2, 3)
    said = PromptSignals(best.indices, best.values.log().float(), 1 - best.values.sum(-1).float(), own)
    p = logits_p.softmax(-1)
    expected = 0.0
    for row in range(2):
        for place in range(3):
            inside, ids = 0.0, best.indices[row, place].tolist()
            for token in ids:
                inside += p[row, place, token] * math.log(p[row, place, token] / q[row, place, token])
            rest_p, rest_q = (1 - float(x[row, place, ids].sum()) for x in (p, q))
            expected += float(inside) + rest_p * math.log(rest_p / rest_q)
    assert bucket_kl(said, logits_p.float(), lambda x: x) == pytest.approx(expected / 6, rel=1e-5)


def test_a_server_that_runs_another_model_is_refused(teacher, tmp_path):
    other = tiny_checkpoint(tmp_path, "llama", seed=1)
    with serving(other) as server:
        with pytest.raises(UserError, match=r"does not say what the teacher says: [\d.]+ nats .* over 36 tokens"):
            record(teacher, tmp_path / "signals", settings(server))
        assert not shards(tmp_path / "signals")
        record(teacher, tmp_path / "signals", settings(server, check=Check(num_tokens=30, max_kl=100.0)))


def test_a_server_that_is_not_compared_is_told_of(teacher, server, tmp_path, caplog):
    record(teacher, tmp_path / "signals", settings(server, check=None))
    assert "record.check is null, so that nothing shows whether it runs the teacher" in caplog.text
    engine = RecordingManifest.read(tmp_path / "signals" / RecordingManifest.FILE).engine
    assert engine is not None
    assert "bucket_kl" not in engine


# --- what goes wrong ----------------------------------------------------------------------------------------------


def _scale(factor: float):
    def fault(choice: dict[str, Any]) -> None:
        for entries in choice["prompt_logprobs"][1:]:
            for entry in entries.values():
                entry["logprob"] *= factor

    return fault


def _rename(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [
        entries and {str(int(token) + 200): entry for token, entry in entries.items()} | dict(list(entries.items())[:1])
        for entries in choice["prompt_logprobs"]
    ]


def _fewer(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [entries and dict(list(entries.items())[:2]) for entries in choice["prompt_logprobs"]]


FAULTS: dict[str, tuple[Any, str]] = {
    "at another temperature": (_scale(2.0), r"does not say what the teacher says: .* record\.check\.max_kl"),
    "not log-probabilities": (_scale(-1.0), r"probabilities that sum to .*raw_logprobs"),
    "not numbers": (_scale(math.nan), r"probabilities that sum to nan"),
    "another vocabulary": (_rename, r"tells of token \d+, and the teacher's vocabulary has 272: it runs a model with"),
    "too few": (_fewer, r"tells of 2 tokens in place 1 of a prompt where record\.top_k asks for 5"),
    "truncated": (
        lambda choice: choice["prompt_logprobs"].__delitem__(-1),
        r"tells of \d+ tokens of a prompt of \d+: it cuts",
    ),
    "another prompt": (lambda choice: choice["prompt_token_ids"].insert(0, 1), r"has read \d+ tokens, and not the \d+"),
    "nothing of prompts": (
        lambda choice: choice.__delitem__("prompt_logprobs"),
        r"without prompt_logprobs by token id",
    ),
    "words for ids": (
        lambda choice: choice.update(prompt_logprobs=[None, {"the": {"logprob": -1.0}}]),
        r"answers without prompt_logprobs by token id \(ValueError",
    ),
    "no json": (lambda choice: b"<html>", r"answers /completions with what is no JSON"),
    "another shape": (lambda choice: ["x"], r"answers without prompt_logprobs by token id"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_are_none_are_refused_by_what_is_wrong(teacher, server, tmp_path, fault):
    server.fault, message = FAULTS[fault]
    with pytest.raises(UserError, match=rf"^record\.server: {server.url}: .*{message}"):
        record(teacher, tmp_path / "signals", settings(server))
    assert not shards(tmp_path / "signals")


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "few logprobs": ({"max_logprobs": 3}, {}, r"HTTP 400: .*greater than max allowed: 3.*wants --max-logprobs 5"),
    "short model": ({"max_model_len": S + 1}, {}, r"takes 13 tokens, and a row of 12 needs 14; start it with --max-m"),
    "another name": ({}, {"model": "other"}, r"record\.server\.model: .* serves served, and not other; name one of"),
    "two models": ({"names": ["a", "b"]}, {}, r"record\.server\.model: .* serves a, b; name one of them"),
    "a key": ({"key": "k" * 12}, {}, r"HTTP 401: .*; name in record\.server\.api_key_env the environment variable"),
    "no key": ({}, {"api_key_env": "NOT_THERE"}, r"record\.server\.api_key_env: NOT_THERE is not set; export"),
    "always busy": ({"statuses": [503]}, {}, r"HTTP 503: .*overloaded.*, 1 times; .*the same command goes on"),
    "too slow": ({"delay_s": 0.5}, {"timeout_s": 0.05}, r"gives no answer within 0\.05 s, 1 times; .*timeout_s"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_server_that_refuses_is_told_of_with_the_remedy(teacher, server, tmp_path, refusal):
    state, how, message = REFUSALS[refusal]
    vars(server).update(state)
    with pytest.raises(UserError, match=message):
        record(teacher, tmp_path / "signals", settings(server, **how))
    assert not shards(tmp_path / "signals")


def test_a_server_that_is_not_there_or_speaks_no_such_protocol_is_refused(teacher, server, tmp_path):
    wrong = settings(server)
    assert wrong.server is not None
    for url, message in {
        "http://127.0.0.1:9/v1": r"cannot be reached \(ConnectError",
        server.url.removesuffix("/v1"): r"HTTP 404: .*; give in record\.server\.url the address up to the version",
    }.items():
        moved = dataclasses.replace(wrong, server=dataclasses.replace(wrong.server, url=url))
        with pytest.raises(UserError, match=message):
            record(teacher, tmp_path / "signals", moved)


def test_a_server_that_fails_for_a_while_is_asked_again(teacher, server, tmp_path, monkeypatch, caplog):
    waits = list[float]()
    monkeypatch.setattr(client.time, "sleep", waits.append)
    server.statuses = [503, 429, 500]
    record(teacher, tmp_path / "signals", settings(server, retries=3, parallel=1))
    assert [wait for wait in waits if wait] == [1, 2, 4]  # the stub sleeps too, for no time
    assert "answers /completions with HTTP 429" in caplog.text
    record(teacher, tmp_path / "whole", settings(server))
    assert shards(tmp_path / "signals") == shards(tmp_path / "whole")


def test_what_was_recorded_before_a_server_went_away_stays_and_is_gone_on_with(teacher, server, tmp_path):
    how = settings(server, check=None, parallel=1)
    server.dies_after = 9  # of three rows with two documents each in a shard
    with pytest.raises(UserError, match=r"cannot be reached \(.*: what is written stays, and the same command goes on"):
        record(teacher, tmp_path / "signals", how)
    kept = shards(tmp_path / "signals")
    assert [*kept] == ["shard-000000.safetensors"]
    server.dies_after, server.asked = None, []
    record(teacher, tmp_path / "signals", how)
    assert len(server.asked) == 10, "the first shard is there"
    record(teacher, tmp_path / "whole", how)
    assert shards(tmp_path / "signals") == shards(tmp_path / "whole")
    assert kept.items() <= shards(tmp_path / "signals").items()


def test_a_recording_that_is_whole_asks_nobody(teacher, server, tmp_path):
    record(teacher, tmp_path / "signals", settings(server))
    gone = dataclasses.replace(settings(server), server=Server("http://127.0.0.1:9/v1", retries=0))
    record(teacher, tmp_path / "signals", gone)


def test_going_on_with_another_version_is_told(teacher, server, tmp_path, caplog, monkeypatch):
    record(teacher, tmp_path / "signals", settings(server), num_rows=3)
    monkeypatch.setattr("prompt_server.VERSION", "1.0")
    record(teacher, tmp_path / "signals", settings(server))
    assert f"was begun with version {VERSION} of the engine, this is 1.0" in caplog.text


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(teacher, server, tmp_path, monkeypatch, caplog):
    server.key = "letmein-0123456789"
    monkeypatch.setenv("MY_TEACHER", server.key)
    with caplog.at_level("DEBUG"):
        record(teacher, tmp_path / "signals", settings(server, api_key_env="MY_TEACHER"))
        monkeypatch.setenv("MY_TEACHER", "wrong-0123456789")
        with pytest.raises(UserError, match=r"wrong key Bearer \(hidden\)"):
            record(teacher, tmp_path / "other", settings(server, api_key_env="MY_TEACHER"))
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 3
    for key in ("letmein", "wrong-0"):
        assert key not in caplog.text
        assert not any(key.encode() in content for content in written)
    assert json.loads((tmp_path / "signals" / "recording.json").read_text())["engine"]["url"] == server.url


@pytest.mark.parametrize("key", ["letmein-0123456789\r", "letmein-0123456789 ", "letmein-é"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_told(teacher, server, tmp_path, monkeypatch, key):
    monkeypatch.setenv("MY_TEACHER", key)
    with pytest.raises(UserError, match=r"record\.server\.api_key_env: MY_TEACHER holds what no header can") as refused:
        record(teacher, tmp_path / "signals", settings(server, api_key_env="MY_TEACHER"))
    assert "letmein" not in str(refused.value)


def test_an_answer_that_is_not_encoded_as_it_says_is_refused(teacher, server, tmp_path, monkeypatch):
    def end_headers(answer: Answer) -> None:
        answer.send_header("Content-Encoding", "gzip")
        BaseHTTPRequestHandler.end_headers(answer)

    monkeypatch.setattr(Answer, "end_headers", end_headers)
    with pytest.raises(UserError, match=r"answers /models with what is no JSON \(.*decompressing"):
        record(teacher, tmp_path / "signals", settings(server))


# --- the whole teacher --------------------------------------------------------------------------------------------


def test_tokens_are_told_of_as_the_model_finds_them(teacher, server):
    from shoal.train.teacher.prompt_scores import prompt_signals

    engine = client.ServerEngine(settings(server), length=S)
    data = rows(2)
    said = prompt_signals(engine, data.input_ids_NS, data.position_ids_NS, top_k=TOP_K, vocab_size=VOCAB_SIZE)
    model = load_model(teacher, dtype="float32")
    ids, positions = data.input_ids_NS.long(), data.position_ids_NS.long()
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    expected = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    inside = positions[:, 1:] > 0
    found = said.token_log_probs_BS
    assert torch.equal(found.isnan(), positions == 0)
    torch.testing.assert_close(found[:, 1:][inside].double(), expected[inside], rtol=0, atol=1e-5)
