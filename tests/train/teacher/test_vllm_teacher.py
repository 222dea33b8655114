"""A teacher that vLLM runs: recorded like others, let in only if it agrees, and refused by what is wrong."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stand_in
from packed_rows import packed
from tiny import VOCAB_SIZE

from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import Recorded
from shoal.train.record import record_signals
from shoal.train.teacher import vllm_teacher
from shoal.train.teacher.recording import RecordingManifest, Wanted
from shoal.train.teacher.signals import RecordedRows, RecordingReader

S, TOP_K, VERSION = 12, 5, "0.33.0"
ROWS_FROM = {"seed": 0, "distill.data": "text"}
BY_VLLM = Recorded(top_k=TOP_K, backend="vllm")


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


def wanted(teacher: Path, how: Recorded, dtype: Any = "float32") -> Wanted:
    return Wanted(Checkpoint.read(teacher, LoadSettings(dtype=dtype)), "teacher", S, how)


def record(teacher: Path, folder: Path, how: Recorded = BY_VLLM) -> None:
    record_signals(wanted(teacher, how), rows(), folder, rows_from=ROWS_FROM, rows_per_shard=3)


def read(teacher: Path, folder: Path, how: Recorded = BY_VLLM, *, dtype: Any = "float32") -> RecordedRows:
    return RecordingReader(folder, rows(), wanted(teacher, how, dtype), rows_from=ROWS_FROM).rows(range(8))


@pytest.mark.sample(2)
@pytest.mark.parametrize("top_k", [VOCAB_SIZE - 1, 1])
def test_vllm_records_what_transformers_does(teacher, vllm, tmp_path, top_k):
    local, here = Recorded(top_k=top_k), Recorded(top_k=top_k, backend="vllm")
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


def test_the_divergence_that_is_limited_is_a_mean_over_tokens() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 8, 32).double().unbind()
    order = theirs.argsort(-1, descending=True)[..., :31]
    log_probs = theirs.log_softmax(-1)
    rest = 1 - log_probs.gather(-1, order).exp().sum(-1)
    said = (order, log_probs.gather(-1, order), rest)
    expected = (log_probs.exp() * (log_probs - ours.log_softmax(-1))).sum(-1).mean()
    assert vllm_teacher._bucket_kl(said, ours.flatten(0, 1), lambda hidden: hidden) == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_signals_of_vllm_are_its_own_and_a_whole_recording_starts_it_no_more(teacher, vllm, tmp_path):
    record(teacher, tmp_path / "signals")
    record(teacher, tmp_path / "signals")
    assert len(vllm.made) == 1
    with pytest.raises(UserError, match=r"another run: .*backend is 'transformers' in this recipe but 'vllm' there"):
        read(teacher, tmp_path / "signals", Recorded(top_k=TOP_K))
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
    "at another temperature": (_scale(2.0), r"vLLM and transformers disagree about the teacher .* over 36 tokens"),
    "not log-probabilities": (_scale(-1.0), r"vLLM and transformers disagree about the teacher"),
    "not numbers": (_scale(math.nan), r"vLLM and transformers disagree about the teacher .* nan"),
    "another vocabulary": (_rename, r"vLLM returned fewer than 5 log-probabilities at a position"),
    "too few": (_fewer, r"vLLM returned fewer than 5 log-probabilities at a position"),
    "truncated": (list.pop, r"vLLM returned fewer than 5 log-probabilities at a position"),
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
    with pytest.raises(UserError, match=rf"^distill\.teacher\.backend: vllm: .*{message}"):
        record(teacher, tmp_path / "signals")
    assert not [*(tmp_path / "signals").glob("shard-*")]
