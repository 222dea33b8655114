"""Answers are kept as they come in: what was stopped loses one batch, what is repeated computes nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_answers import BATCH_SIZE, asked, instances
from ranks import call_apart
from tiny import tiny_checkpoint, tiny_model, tiny_tokenizer, tokens_fed

from shoal.eval.evaluate import Questions, role_evaluation
from shoal.eval.harness import item_cache
from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.item_cache import ItemCache, identity_of
from shoal.inference.decoder import Decoder
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.evaluate import Eval


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every forward through a model's layers."""
    return tokens_fed(monkeypatch, len)


@pytest.fixture(scope="module")
def expected() -> tuple[Any, Any]:
    return asked(None)


def asked_until_killed(folder: Path, forwards: int) -> None:
    """Ask, and die before forward number ``forwards``, counted from 0."""
    left, original = iter(range(forwards)), Decoder.hidden

    def dying(self: Decoder, *args: Any, **settings: Any) -> torch.Tensor:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **settings)

    Decoder.hidden = dying
    asked(folder)


@pytest.mark.slow
def test_a_killed_evaluation_loses_at_most_one_batch(
    tmp_path: Path, expected: tuple[Any, Any], forwards: list[int]
) -> None:
    """24 options of 12 questions are three batches of three forwards, and so are 10 prompts of three tokens; one more
    is the decoder's look at the model. It dies in the second batch of texts."""
    asked(None)
    whole = len(forwards)
    assert whole == 1 + 3 * 3 + 3 * 3
    assert call_apart(asked_until_killed, tmp_path, 14).returncode == -signal.SIGKILL
    forwards.clear()
    assert asked(tmp_path) == expected
    assert len(forwards) == 1 + 2 * 3


def test_a_torn_last_line_is_asked_again_and_what_is_whole_never(
    tmp_path: Path, expected: tuple[Any, Any], forwards: list[int]
) -> None:
    asked(tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_text()
    file.write_text(whole[:-20])
    forwards.clear()
    assert asked(tmp_path) == expected
    assert set(forwards) == {1}
    assert len(forwards) == 1 + 3
    forwards.clear()
    assert asked(tmp_path) == expected
    assert not forwards
    assert sum(line.startswith('["') for line in file.read_text().splitlines()) == 24 + 10 + 1


@pytest.mark.slow
def test_ranks_keep_files_of_their_own_and_read_all(
    tmp_path: Path, expected: tuple[Any, Any], forwards: list[int]
) -> None:
    for rank in range(2):
        asked(tmp_path, rank=rank, part=slice(rank, None, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-0.jsonl", "llama-1.jsonl"]
    forwards.clear()
    for rank in range(3):  # also on another number of ranks
        scores, texts = asked(tmp_path, rank=rank)
        assert texts == expected[1]
        assert [value for value, _ in scores] == pytest.approx([value for value, _ in expected[0]], abs=1e-5)
    assert not forwards
    assert len(list(tmp_path.iterdir())) == 2


def test_everything_that_shapes_an_answer_is_in_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    model = tiny_model("llama")
    content = model_fingerprint(folder)
    found = [identity_of(content, model)]
    assert identity_of(model_fingerprint(folder), tiny_model("llama")) == found[0]

    found.append(identity_of(model_fingerprint(tiny_checkpoint(tmp_path / "w", "llama", seed=1)), model))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    found.append(identity_of(model_fingerprint(folder), model))
    found.append(identity_of(content, tiny_model("llama", dtype=torch.bfloat16)))
    model.config._attn_implementation = "eager"
    found.append(identity_of(content, model))
    model.config._attn_implementation = "sdpa"
    assert model.generation_config is not None
    model.generation_config.eos_token_id = 65
    found.append(identity_of(content, model))
    monkeypatch.setattr(item_cache, "ENGINE", item_cache.ENGINE + 1)
    found.append(identity_of(content, tiny_model("llama")))
    assert len(set(found)) == len(found) == 7


@pytest.mark.slow
def test_a_role_asks_only_what_it_has_not_answered(
    tmp_path: Path, forwards: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama", max_position_embeddings=4096)
    tasks = ("knowledge_continuation", "retrieval_generation")

    def run(**changes: Any) -> Any:
        settings = Eval(**{"tasks": tasks, "limit": 3, "perplexity_tokens": 300, **changes})
        return role_evaluation(
            "teacher",
            Checkpoint.read(folder, LoadSettings()),
            Questions(settings, 0),
            inputs={"model": model_fingerprint(folder)},
            items=tmp_path / "items",
        )

    first = run()
    forwards.clear()
    with caplog.at_level("INFO"):
        again = run()
    assert again.tasks == first.tasks
    assert not forwards
    assert first.num_kept == 0
    assert again.num_kept == again.num_requests == first.num_requests > 3
    assert "requests are answered already in" in caplog.text
    more = run(tasks=(*tasks, "reasoning_worked"))  # another task, and another batch size: the others stay as they are
    assert forwards
    assert more.tasks[:2] == first.tasks[:2]
    assert more.num_kept == first.num_requests < more.num_requests
    forwards.clear()
    run(tasks=(*tasks, "reasoning_worked"), batch_size=2)
    assert not forwards


def test_drawn_text_is_not_kept(tmp_path: Path, forwards: list[int]) -> None:
    lm = CausalLM(tiny_model("llama"), tiny_tokenizer(), BATCH_SIZE, items=ItemCache(tmp_path, "a"))
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    torch.manual_seed(0)
    texts = lm.generate_until(instances("generate_until", [("x", settings)] * 8))
    assert len(set(texts)) > 1
    assert not os.listdir(tmp_path)
