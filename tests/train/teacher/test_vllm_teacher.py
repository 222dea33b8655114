"""A teacher that vLLM runs: recorded like others, let in only if it agrees, and refused by what is wrong."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm_stand_in
from packed_rows import packed
from tiny import VOCAB_SIZE

from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import Record
from shoal.train.record import record_signals
from shoal.train.teacher import vllm_teacher
from shoal.train.teacher.recording import RecordingManifest, recording_inputs
from shoal.train.teacher.signals import RecordedRows, RecordingReader

S, TOP_K, VERSION = 12, 5, "0.33.0"
ROWS_FROM = {"seed": 0, "distill.data": "text"}
BY_VLLM = Record(top_k=TOP_K, rows_per_shard=3, backend="vllm")


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[vllm_stand_in.LLM]:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: VERSION)
    monkeypatch.setattr(vllm_teacher, "COMPARED_TOKENS", 30)
    monkeypatch.setattr(vllm_stand_in.LLM, "made", [])
    monkeypatch.setattr(vllm_stand_in.LLM, "asked", [])
    return vllm_stand_in.install(monkeypatch)


def rows(num: int = 8) -> PackedRows:
    """The first ``num`` of an endless supply, two documents in each."""
    return packed([[7, S - 7]] * 16).first(num)


def record(teacher: Path, folder: Path, how: Record = BY_VLLM, *, num_rows: int = 8) -> None:
    checkpoint = Checkpoint.read(teacher, LoadSettings(dtype="float32"))
    record_signals(checkpoint, rows(num_rows), folder, how, model="teacher", rows_from=ROWS_FROM)


def read(teacher: Path, folder: Path, how: Record = BY_VLLM, *, dtype: Any = "float32") -> RecordedRows:
    checkpoint = Checkpoint.read(teacher, LoadSettings(dtype=dtype))
    inputs = recording_inputs(how, checkpoint, model="teacher", sequence_length=S)
    return RecordingReader(folder, rows(), inputs=inputs, rows_from=ROWS_FROM).rows(range(8))


@pytest.mark.sample(2)
@pytest.mark.parametrize("top_k", [VOCAB_SIZE - 1, 1])
def test_vllm_records_what_transformers_does(teacher, vllm, tmp_path, top_k):
    local, here = Record(top_k=top_k, rows_per_shard=3), Record(top_k=top_k, rows_per_shard=3, backend="vllm")
    record(teacher, tmp_path / "local", local)
    record(teacher, tmp_path / "here", here)
    ours, theirs = read(teacher, tmp_path / "here", here), read(teacher, tmp_path / "local", local)
    assert (ours.ids_BSK == theirs.ids_BSK).float().mean() > 0.99  # up to equal ones
    assert (ours.log_probs_BSK - theirs.log_probs_BSK).abs().max() < 8e-4
    assert (ours.tail_BS - theirs.tail_BS).abs().max() < 1e-5
    engine = RecordingManifest.load(tmp_path / "here" / RecordingManifest.FILE).engine
    assert engine is not None
    assert abs(engine.pop("bucket_kl")) < 1e-6
    assert engine == {"engine": "vllm", "version": VERSION, "dtype": "float32", "compared_tokens": 3 * S}
    documents = [part.tolist() for row in rows().input_ids_NS for part in (row[:7], row[7:])]
    asked = [prompt for prompt, _ in vllm.asked[-len(documents) :]]
    assert asked == [[*document, document[-1]] for document in documents], "with a token behind that nobody reads"


def test_signals_of_vllm_are_its_own_and_a_whole_recording_starts_it_no_more(teacher, vllm, tmp_path):
    record(teacher, tmp_path / "signals")
    record(teacher, tmp_path / "signals")
    assert len(vllm.made) == 1
    with pytest.raises(UserError, match=r"another run: .*record\.backend is 'absent' in this recipe but 'vllm' there"):
        read(teacher, tmp_path / "signals", Record(top_k=TOP_K, rows_per_shard=3))
    with pytest.raises(UserError, match="another run: dtype is 'bfloat16' in this recipe but 'float32' there"):
        read(teacher, tmp_path / "signals", dtype="bfloat16")


def _scale(factor: float) -> Callable[[list[Any]], None]:
    def fault(told: list[Any]) -> None:
        for entries in told[1:]:
            for entry in entries.values():
                entry.logprob *= factor

    return fault


def _rename(told: list[Any]) -> None:
    told[1:] = [{token + 200: entry for token, entry in entries.items()} for entries in told[1:]]


def _fewer(told: list[Any]) -> None:
    told[1:] = [dict(list(entries.items())[:2]) for entries in told[1:]]


FAULTS: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "at another temperature": (_scale(2.0), r"does not say what the teacher says: .* over 36 tokens"),
    "not log-probabilities": (_scale(-1.0), r"does not say what the teacher says"),
    "not numbers": (_scale(math.nan), r"does not say what the teacher says: nan"),
    "another vocabulary": (_rename, r"does not tell of 5 of the teacher's tokens in every place"),
    "too few": (_fewer, r"does not tell of 5 of the teacher's tokens in every place"),
    "truncated": (list.pop, r"does not tell of 5 of the teacher's tokens in every place"),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_are_none_are_refused_by_what_is_wrong(teacher, vllm, tmp_path, monkeypatch, fault):
    change, message = FAULTS[fault]
    answer = vllm._answer

    def wrong(self: Any, *args: Any) -> Any:
        output = answer(self, *args)
        change(output.prompt_logprobs)
        return output

    monkeypatch.setattr(vllm, "_answer", wrong)
    with pytest.raises(UserError, match=rf"^record\.backend: vllm: .*{message}"):
        record(teacher, tmp_path / "signals")
    assert not [*(tmp_path / "signals").glob("shard-*")]
