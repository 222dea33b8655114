"""Scores while training: when, under which names, and which state is kept as the best."""

import contextlib
import json
import math
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compared_runs import nats
from tiny import tiny_model, tiny_tokenizer

from shoal.eval.evaluate import QuickScores
from shoal.recipe.distill import Watch
from shoal.recipe.evaluate import Eval
from shoal.train import callbacks as module
from shoal.train.callbacks import Events, Profiler, Progress, Watcher


class Training:
    """Stands for the trainer: scores by step, and a student whose only weight is the step number."""

    def __init__(self, watcher: Watcher, scores: dict[int, float], *, higher_is_better: bool = True) -> None:
        self.step, self.logged = 0, {}
        score = partial(replace, nats(1.0), higher_is_better=higher_is_better)
        watcher.score = lambda: {"knowledge": score(score=scores.get(self.step, 0.0))}
        watcher.log = lambda logs: self.logged.setdefault(self.step, logs)
        watcher.state = lambda: {"weight": torch.tensor([float(self.step)])}
        self.watcher = watcher

    def run(self, steps: range, *, max_steps: int, stopped_at: int | None = None) -> None:
        rows = [{"step": step, **row} for step, row in self.logged.items()]
        state = SimpleNamespace(global_step=steps.start, max_steps=max_steps, log_history=rows)
        self.step = steps.start
        self.watcher.on_train_begin(None, state, None)
        for step in steps:
            self.step = state.global_step = step + 1
            self.watcher.on_step_end(None, state, SimpleNamespace(should_training_stop=stopped_at == self.step))


@pytest.mark.parametrize(("steps", "last"), [((2, 3), 3), ((4, 9), 4)])
def test_steps_are_traced_from_the_first_to_the_last_or_to_the_end(tmp_path, steps, last):
    traced = Profiler(steps, tmp_path / "profile")
    for step in range(4):
        traced.on_step_begin(None, SimpleNamespace(global_step=step), None)
        torch.ones(step + 1).exp()
        traced.on_step_end(None, SimpleNamespace(global_step=step + 1), None)
    traced.on_train_end(None, None, None)
    events = json.loads((tmp_path / "profile/rank-0.json").read_text())["traceEvents"]
    assert sum(event["name"] == "aten::exp" for event in events) == last - steps[0] + 1


def test_a_log_with_torn_lines_keeps_the_whole_ones_of_steps_that_stay(tmp_path):
    lines = [
        b'{"step": 1, "loss": 2.0}',
        b"}",
        b'\xe9{"step": 1}',
        b'{"step": 9}',
        b'{"step": 2, "lo',
        b'{"step": 2, "loss": 1.0}',
    ]
    (tmp_path / Events.FILE).write_bytes(b"\n".join(lines))
    Events(tmp_path, tokens_per_step=1).on_train_begin(None, SimpleNamespace(global_step=3), None)
    assert (tmp_path / Events.FILE).read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'


BEST: dict[str, Any] = {"tasks": ("knowledge",), "metric_for_best_model": "knowledge"}


def watcher(folder, *, inputs=None, **settings) -> Watcher:
    return Watcher(Watch(**settings), folder, inputs or {"a": 1})


@pytest.mark.parametrize(
    ("eval_steps", "steps"), [(0.25, [0, 3, 6, 9, 10]), (4, [0, 4, 8, 10]), (1, list(range(11))), (0.5, [0, 5, 10])]
)
def test_the_student_is_scored_before_the_first_step_at_every_so_many_and_after_the_last(tmp_path, eval_steps, steps):
    training = Training(watcher(tmp_path, eval_steps=eval_steps), {})
    training.run(range(10), max_steps=10)
    assert list(training.logged) == steps
    assert training.logged[0] == {"watch/knowledge": 0.0}


def test_a_step_at_which_training_is_stopped_is_scored_when_it_goes_on_so_that_it_is_saved_first(tmp_path):
    training = Training(watcher(tmp_path, eval_steps=2), {})
    own, scored = training.watcher.score, []
    training.watcher.score = lambda: scored.append(training.step) or own()
    training.run(range(4), max_steps=8, stopped_at=4)
    assert scored == [0, 2]
    for begin in (4, 6):  # one that was scored is not scored again
        training.run(range(begin, begin + 2), max_steps=8)
    assert scored == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 4), (False, 6)])
def test_the_best_state_is_kept_by_the_score_that_was_chosen(tmp_path, higher_is_better, best):
    kept = watcher(tmp_path, eval_steps=2, **BEST)
    scores = {0: 0.5, 2: 0.6, 4: 0.9, 6: 0.1, 8: 0.8, 10: 0.7}
    Training(kept, scores, higher_is_better=higher_is_better).run(range(10), max_steps=10)
    found = kept.best()
    assert found is not None
    assert (found["step"], found["score"]) == (best, scores[best])
    assert kept.best_state()["weight"].item() == best
    kept.forget()
    assert kept.best() is None


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    kept = watcher(tmp_path, eval_steps=2, **BEST)
    Training(kept, {0: math.nan, 2: 0.6, 4: math.nan}).run(range(4), max_steps=4)
    found = kept.best()
    assert found is not None
    assert found["step"] == 2


def test_a_resumed_run_remembers_the_best_of_its_earlier_life_and_not_another_runs(tmp_path):
    Training(watcher(tmp_path, eval_steps=2, **BEST), {4: 0.9}).run(range(5), max_steps=10)
    later = watcher(tmp_path, eval_steps=2, **BEST)
    Training(later, {6: 0.5, 8: 0.5, 10: 0.5}).run(range(5, 10), max_steps=10)
    found = later.best()
    assert found is not None
    assert found["step"] == 4
    assert watcher(tmp_path, **BEST, inputs={"a": 2}).best() is None


def test_scoring_leaves_training_mode_and_random_numbers_as_they_were():
    model = tiny_model("llama").train()
    settings = Eval(tasks=(), perplexity_tokens=64)
    scorer = QuickScores(tiny_tokenizer(), settings, config=model.config, seed=3)

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seeded()
    expected = drawn()
    seeded()
    scores = scorer(model)
    assert drawn() == expected
    assert model.training
    assert scores.keys() == {"perplexity"}
    assert scores["perplexity"].score == pytest.approx(np.log(model.config.vocab_size), abs=0.5)
    assert not scores["perplexity"].higher_is_better


@pytest.mark.parametrize(
    ("steps", "error", "dumped"), [((2, 3), True, True), ((2, 3), False, False), (None, True, False)]
)
def test_who_holds_a_gpus_memory_is_written_where_it_runs_out(monkeypatch, tmp_path, steps, error, dumped):
    recorded = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all": recorded.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).touch())
    with contextlib.suppress(torch.OutOfMemoryError), Profiler(steps, tmp_path / "profile"):
        if error:
            raise torch.OutOfMemoryError
    assert recorded == ([] if steps is None else ["all", None])
    assert (tmp_path / "profile" / "memory-rank-0.pickle").exists() == dumped


@pytest.mark.parametrize(
    ("peak", "others", "warnings"), [(0.8, {}, 0), (1.2, {}, 1), (1.2, {"on_policy/loop_rate": 0.1}, 0)]
)
def test_a_learning_rate_at_which_the_divergence_rises_is_said_once(
    caplog: pytest.LogCaptureFixture, peak: float, others: dict[str, float], warnings: int
) -> None:
    args, state = SimpleNamespace(learning_rate=2e-4), SimpleNamespace(global_step=0, max_steps=60)
    with Progress(tokens_per_step=1) as told:
        told.on_train_begin(args, state, None)
        for kl in [0.6, 0.8] * 3 + [1.4] + [0.7] * 10 + [peak] * 30:  # one row says nothing
            state.global_step += 1
            told.on_log(
                args, state, None, {"loss": kl, "forward_kl": kl, "seconds": 1.0, **(others if kl == peak else {})}
            )
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == warnings
    assert all("learning_rate 0.0002 is too high" in words for words in said)


def test_every_logged_step_is_a_line_of_json_and_a_resumed_training_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def logged(first: int, last: int) -> None:
        events, state = Events(tmp_path, tokens_per_step=10), SimpleNamespace(global_step=first)
        events.on_train_begin(None, state, None)
        for step in range(first + 1, last + 1):
            state.global_step = step
            events.on_log(None, state, None, {"loss": 1 / step, "epoch": 0.5})
        events.on_log(None, state, None, {"train_runtime": 1.0})

    logged(0, 3)
    file = tmp_path / Events.FILE
    file.write_text(file.read_text() + '{"step": 4, "nu')  # killed while it wrote
    monkeypatch.setattr(module.VOICE, "events", True)
    logged(2, 4)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"step": step, "num_tokens": 10 * step, "loss": 1 / step} for step in (1, 2, 3, 4)]
    assert capsys.readouterr().out.splitlines() == file.read_text().splitlines()[2:]
    logged(0, 1)
    assert len(file.read_text().splitlines()) == 1, "begun anew"
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as left, monkeypatch.context() as patched:
        patched.setattr(module.sys, "stdout", left)
        logged(0, 2)
    assert len(file.read_text().splitlines()) == 2, "whoever read has left, and training goes on"
    file.unlink()
    logged(1, 2)
    assert len(file.read_text().splitlines()) == 1, "deleted by somebody between two trainings"
