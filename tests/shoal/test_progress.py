"""What takes long says so: before 5 s are over, with rate and time left; a bar on a terminal, lines in a file.

Covers: shoal.launch.verbs.report, shoal.train.callbacks.progress.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import training_runs
from transformers.utils import logging as transformers_logging

from shoal import progress as module
from shoal.launch.verbs import distill, evaluate, measure, prune, report
from shoal.launch.verbs.run import open_run
from shoal.models.checkpoint_files import checkpoint_bytes
from shoal.progress import BYTES, POLL_S, Lines, Speaker, doing, each, progress
from shoal.recipe.recipe import load_recipe, parse_recipe
from shoal.train.callbacks.progress import Progress

MEASURE = {"num_tokens": 64, "sequence_length": 32, "batch_size": 2, "metrics": ["angular"]}
EVAL = {"tasks": ["knowledge_generation"], "limit": 2, "perplexity_tokens": 200, "sequence_length": 64}


class Clock:
    """A clock that stands until it is moved, and lets the speaker look as often as its thread would."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def run(self, speaker: Speaker, seconds: float) -> None:
        for _ in range(round(seconds / POLL_S)):
            self.now += POLL_S
            speaker.tick()


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _a_terminal_that_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def speaker(clock: Clock, caplog: pytest.LogCaptureFixture) -> Iterator[Speaker]:
    with caplog.at_level("INFO"):
        yield Speaker(clock=clock, stream=io.StringIO())


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, clock, caplog, term):
    if term is None:
        monkeypatch.delenv("TERM")
    else:
        monkeypatch.setenv("TERM", term)
    stream = Terminal()
    with caplog.at_level("INFO"):
        speaker = Speaker(clock=clock, stream=stream)
        with speaker.telling("measure", 100, "rows"):
            clock.run(speaker, 4.5)
    assert caplog.messages == ["measure: 0 of 100 rows, 0:04 so far", "measure: 0 of 100 rows in 0:05"]
    assert stream.getvalue() == ""
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level("INFO"), speaker.telling("measure", 100, "rows"):
        clock.run(speaker, 4.5)
    assert "measure" in stream.getvalue()


def test_the_first_line_comes_within_five_seconds_and_tells_rate_and_time_left(speaker, clock, caplog):
    with speaker.telling("measure", 100, "rows") as step:
        clock.run(speaker, 3.5)
        assert not caplog.messages
        step(8)
        clock.run(speaker, 0.5)
        assert caplog.messages == ["measure: 8 of 100 rows, 2 rows/s, 0:46 left"]


def test_a_line_comes_every_few_seconds_though_no_step_is_done(speaker, clock, caplog):
    with speaker.telling("measure", 2, "batches") as step:
        clock.run(speaker, 8.0)
        step()
        clock.run(speaker, 4.0)
    assert caplog.messages == [
        "measure: 0 of 2 batches, 0:04 so far",
        "measure: 0 of 2 batches, 0:08 so far",
        "measure: 1 of 2 batches, 12 s each, 0:12 left",
        "measure: 1 of 2 batches in 0:12",
    ]


def test_the_first_five_minutes_have_no_five_silent_seconds_and_hours_do_not_fill_the_log(speaker, clock, monkeypatch):
    times: list[float] = [clock.now]
    monkeypatch.setattr(module.log, "info", lambda *_: times.append(clock.now))
    with speaker.telling("work", None, ""):
        clock.run(speaker, 300)
        assert max(after - before for before, after in itertools.pairwise(times)) < 5
        clock.run(speaker, 8 * 3600)
        assert clock.now - times[-1] <= 60.5
    assert len(times) < 700


def test_work_without_steps_tells_how_long_it_has_taken(speaker, clock, caplog):
    with speaker.telling("loading the teacher", None, ""):
        clock.run(speaker, 4.0)
    assert caplog.messages == ["loading the teacher: 0:04 so far", "loading the teacher: done in 0:04"]


def test_steps_without_a_known_number_tell_the_rate_alone(speaker, clock, caplog):
    with speaker.telling("reading", None, "documents") as step:
        step(12_000)
        clock.run(speaker, 4.0)
    assert caplog.messages[0] == "reading: 12,000 documents, 3e+03 documents/s"


def test_sizes_are_told_as_such(speaker, clock, caplog):
    with speaker.telling("copying", 16_000_000_000, BYTES) as step:
        step(4_000_000_000)
        clock.run(speaker, 4.0)
    assert caplog.messages[0] == "copying: 4 GB of 16 GB, 1 GB/s, 0:12 left"


def test_what_an_earlier_run_did_says_nothing_of_the_rate(speaker, clock, caplog):
    with speaker.telling("scored", 100, "requests") as step:
        step.known(60)
        step(8)
        clock.run(speaker, 4.0)
    assert caplog.messages[0] == "scored: 68 of 100 requests, 2 requests/s, 0:16 left"


def test_of_nested_work_the_innermost_is_told(speaker, clock, caplog):
    with speaker.telling("search", 3, "plans"):
        with speaker.telling("measure", 10, "rows"):
            clock.run(speaker, 4.0)
        clock.run(speaker, 4.0)
    assert [line.split(":")[0] for line in caplog.messages] == ["measure", "measure", "search", "search"]


def test_quick_work_is_not_told(speaker, clock, caplog):
    for _ in range(3):
        with speaker.telling("loading", None, ""):
            clock.run(speaker, 1.0)
    assert not caplog.messages


def test_a_failure_leaves_nothing_behind_that_would_go_on_talking(speaker, clock, caplog):
    with contextlib.suppress(ValueError), speaker.telling("measure", 10, "rows"):
        clock.run(speaker, 4.0)
        raise ValueError
    told = len(caplog.messages)
    clock.run(speaker, 20.0)
    assert told == len(caplog.messages) == 1


def test_after_a_line_of_somebody_else_there_is_no_silence_to_break(clock, caplog, monkeypatch):
    speaker = Speaker(clock=clock, stream=io.StringIO())
    monkeypatch.setattr(module, "SPEAKER", speaker)
    handler = Lines(stream := io.StringIO())
    with caplog.at_level("INFO"), speaker.telling("measure", 10, "rows"):
        clock.run(speaker, 3.0)
        handler.emit(logging.makeLogRecord({"msg": "needs plan.json"}))
        clock.run(speaker, 3.0)
        assert not caplog.messages
        clock.run(speaker, 1.0)
    assert caplog.messages[0] == "measure: 0 of 10 rows, 0:07 so far"
    assert stream.getvalue() == "needs plan.json\n"


def test_a_terminal_gets_a_bar_and_lines_stand_above_it(clock, caplog, monkeypatch):
    terminal = Terminal()
    speaker = Speaker(clock=clock, stream=terminal)
    monkeypatch.setattr(module, "SPEAKER", speaker)
    handler = Lines(terminal)
    with caplog.at_level("INFO"), speaker.telling("measure", 10, "rows") as step:
        step(5)
        step.note = "loss 1.5"
        clock.run(speaker, 5.0)
        assert not caplog.messages
        shown = terminal.getvalue().split("\r")[-1]
        assert shown.startswith("measure:  50%|")
        assert "5/10" in shown
        assert "loss 1.5" in shown
        handler.emit(logging.makeLogRecord({"msg": "a line"}))
        *_, cleared, line = terminal.getvalue().split("\r")[:-1]
        assert (cleared.strip(), line) == ("", "a line\n")
    assert not speaker.draws_bars
    assert caplog.messages == ["measure: 5 of 10 rows in 0:05, loss 1.5"]


def test_work_without_steps_shows_its_time_on_a_terminal(clock, caplog):
    speaker = Speaker(clock=clock, stream=(terminal := Terminal()))
    with caplog.at_level("INFO"), speaker.telling("loading", None, ""):
        clock.run(speaker, 3.0)
        assert terminal.getvalue().split("\r")[-1].startswith("loading: 00:0")


def test_ranks_that_do_not_log_say_nothing(clock, caplog):
    speaker = Speaker(clock=clock, stream=(terminal := Terminal()))
    with caplog.at_level("ERROR"), speaker.telling("measure", 10, "rows") as step:
        step()
        clock.run(speaker, 10.0)
    assert (caplog.messages, terminal.getvalue()) == ([], "")


def test_items_are_counted_as_they_are_done(caplog, monkeypatch):
    monkeypatch.setattr(module, "FIRST_S", 0.0)
    with caplog.at_level("INFO"):
        assert list(each("abc", "letters", unit="letters")) == ["a", "b", "c"]
    assert caplog.messages == ["letters: 3 of 3 letters in 0:00"]


SLOW = """
import sys, time
from shoal import runtime
from shoal.progress import doing
runtime.set_up_logging()
with doing("waiting"):
    time.sleep(5)
"""


@pytest.mark.slow
def test_a_thread_of_its_own_speaks_while_the_work_cannot() -> None:
    told = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, check=True).stderr
    assert re.search(r"waiting: 0:0[345] so far", told)


def test_a_forked_process_speaks_of_its_own_work_alone(caplog):
    with caplog.at_level("INFO"), progress("outer", unit="rows"):
        pid = os.fork()
        if pid == 0:
            with doing("inner"):
                os._exit(len(module.SPEAKER._works))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_training_tells_loss_and_rate_and_the_time_left_by_the_clock(
    speaker, clock, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPEAKER", speaker)
    state: Any = SimpleNamespace(global_step=2, max_steps=6)  # it goes on from step 2
    with Progress(tokens_per_step=140) as line:
        clock.run(speaker, 4.0)
        assert caplog.messages == ["setting up DeepSpeed: 0:04 so far"]
        line.on_train_begin(None, state, None)
        state.global_step = 4
        line.on_step_end(None, state, None)
        line.on_log(None, state, None, {"loss": 1.5, "seconds": 8.0})  # scoring and saving took the rest
        clock.run(speaker, 100.0)
        assert caplog.messages[-1] == "training: 4 of 6 steps, 50 s each, 1:40 left, loss 1.5000, 70 tokens/s"
        state.global_step = 6
        line.on_step_end(None, state, None)
    assert caplog.messages[-1] == "training: 6 of 6 steps in 1:40, loss 1.5000, 70 tokens/s"
    clock.run(speaker, 100.0)
    assert caplog.messages[-1] == "training: 6 of 6 steps in 1:40, loss 1.5000, 70 tokens/s"


def test_a_training_that_fails_is_not_told_of_any_more(speaker, clock, caplog, monkeypatch):
    monkeypatch.setattr(module, "SPEAKER", speaker)
    line = Progress(tokens_per_step=140)
    with contextlib.suppress(ValueError), line:
        line.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=6), None)
        raise ValueError
    clock.run(speaker, 100.0)
    assert not caplog.messages


def test_nothing_is_said_while_another_process_speaks(speaker, clock, caplog):
    with speaker.telling("distill", None, ""):
        with speaker.still(lambda: True):
            clock.run(speaker, 60.0)
        assert not caplog.messages
        clock.run(speaker, 0.5)
    assert caplog.messages[0] == "distill: 1:01 so far"


@pytest.fixture
def every_end_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "FIRST_S", 0.0)
    caplog.set_level("INFO")


def tell_every_end() -> None:
    module.FIRST_S = 0.0


def told(messages: list[str], *names: str) -> None:
    missing = [name for name in names if not any(line.startswith(f"{name}: ") for line in messages)]
    assert not missing, messages


@pytest.mark.slow
@pytest.mark.usefixtures("every_end_is_told")
def test_measuring_tells_of_every_pass(teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = ["block_influence", "angular", "single_drop_perplexity", "taylor", "laco_acceptance"]
    settings = {
        **MEASURE,
        "diagnostics": True,
        "metrics": metrics,
        "sweep": {"tasks": ["knowledge_continuation"], "limit": 8, "operators": ["layer"]},
    }
    measure.measure(
        open_run(
            parse_recipe(
                {"model": str(teacher), "dtype": "float32", "run_dir": str(tmp_path / "run"), "measure": settings}
            )
        )
    )
    told(
        caplog.messages,
        f"loading {teacher}",
        "text: rows packed",
        "measure: block_influence, angular",
        "measure: single drops",
        "measure: gradients",
        "measure: merges",
        "sweep: likelihoods",
        "sweep: scored",
        "measure: intervals of the atlas",
        "measure: drawing figures",
        "diagnostics: one pass",
        "diagnostics: skips",
        "diagnostics: gradients",
    )


@pytest.mark.slow
@pytest.mark.usefixtures("every_end_is_told")
def test_measuring_layer_by_layer_tells_of_every_layer(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**MEASURE, "metrics": ["block_influence"], "memory_gb": 0.9 * checkpoint_bytes(teacher) / 2**30}
    measure.measure(
        open_run(
            parse_recipe({"model": str(teacher), "dtype": "float32", "run_dir": str(tmp_path), "measure": settings})
        )
    )
    told(caplog.messages, "measure, layer by layer")


@pytest.mark.slow
@pytest.mark.usefixtures("every_end_is_told")
def test_pruning_tells_of_copying_and_of_both_proofs(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prune.prune(
        open_run(
            parse_recipe(
                {"model": str(teacher), "dtype": "float32", "run_dir": str(tmp_path / "run"), "prune": {"drop": [1, 3]}}
            )
        )
    )
    told(
        caplog.messages,
        "prune: copying",
        "prune: reading back what was copied",
        "prune: proving the student by its files",
        "prune: running the teacher as planned",
        "prune: proving the student by running it",
    )


@pytest.mark.slow
def test_the_ranks_tell_of_recording_and_of_every_part_of_a_training(teacher: Path, tmp_path: Path) -> None:
    training_runs.prepare(tmp_path, teacher)
    path = training_runs.write_recipe(
        tmp_path,
        teacher,
        data=[{"path": "python_docs", "weight": 0.5}, {"path": "teacher_text", "weight": 0.5}],
        writing={"num_tokens": 200, "new_tokens": 8, "prompt_tokens": 8},
        overlap=True,
        local={"num_tokens": 512, "batch_size": 4},
        watch={"every": 4, "tasks": ["knowledge_continuation"], "limit": 2, "perplexity_tokens": 100},
        trainer={"save_strategy": "steps", "save_steps": 4},
    )
    recorded = training_runs.finished(training_runs.run(path, verb="record", before=tell_every_end))
    told([line[9:] for line in recorded.log.splitlines()], "teacher text", "text: rows packed", "record")
    trained = training_runs.finished(training_runs.run(path, before=tell_every_end))
    told(
        [line[9:] for line in trained.log.splitlines()],
        "loading the libraries",
        "joining the other ranks",
        "working out what training takes",
        "looking for evaluation items in the training text",
        "local",
        "measuring what the machine can do at best",
        "loading DeepSpeed",
        "setting up DeepSpeed",
        "training",
        "watch: likelihoods",
        "saving checkpoint-4",
        "writing distilled/",
    )


@pytest.mark.slow
@pytest.mark.usefixtures("every_end_is_told")
def test_evaluating_and_reporting_tell_of_requests_texts_and_speed(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**EVAL, "tasks": ["knowledge_continuation", "knowledge_generation"], "speed_batch_sizes": [1]}
    run = open_run(
        parse_recipe({"model": str(teacher), "dtype": "float32", "run_dir": str(tmp_path / "run"), "eval": settings})
    )
    run.dir.mkdir()
    evaluate.evaluate(run)
    report.report(run)
    told(
        caplog.messages,
        "eval: loading the tasks",
        "eval: making prompts",
        "eval teacher: likelihoods",
        "eval teacher: writing",
        "speed: 1 at once",
        "writing the report",
    )


@pytest.mark.slow
@pytest.mark.usefixtures("every_end_is_told")
def test_a_dry_run_tells_what_it_times(teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = training_runs.write_recipe(tmp_path, teacher)
    distill.distill_dry_run(open_run(load_recipe(str(path), [])))
    told(
        caplog.messages,
        "working out memory",
        "building models of random weights",
        "timing 16 tokens of the objective",
        "timing the optimizer",
        "timing a matrix product",
        "looking for the cheapest setting that fits",
    )


def test_bars_of_transformers_are_hidden_while_ours_are_told_and_then_as_they_were(speaker, caplog, capsys):
    def loads() -> bool:
        """Whether transformers shows that it does."""
        list(transformers_logging.tqdm(range(2), desc="Loading weights"))
        return "Loading weights" in capsys.readouterr().err

    own = [lambda factory, args, kwargs: factory(*args, **kwargs)]
    before = transformers_logging.set_tqdm_hook(own[0])
    active = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.enable_progress_bar()
        assert loads()
        first, second = (speaker.telling(label, None, "") for label in ("first", "second"))
        with first:
            assert not loads()
            second.__enter__()
        assert not loads(), "another is told of yet"
        second.__exit__(None, None, None)
        assert loads()
        assert transformers_logging.set_tqdm_hook(own[0]) is own[0], "a hook of the user's is his again"
        with caplog.at_level("WARNING"), speaker.telling("first", None, ""):
            assert loads(), "ours are not shown"
    finally:
        transformers_logging.set_tqdm_hook(before)
        if not active:
            transformers_logging.disable_progress_bar()
