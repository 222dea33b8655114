"""What looks on while a model trains: how far it is, its curves in W&B, scores of the student and its best state."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.integration_utils import WandbCallback

from shoal.artifacts.artifact import differences
from shoal.artifacts.evaluation import TaskScore
from shoal.atomic_files import read_json, write_json, write_text, written_folder
from shoal.errors import explained_disk_errors
from shoal.progress import doing, progress
from shoal.ranks import VOICE, is_main, rank
from shoal.recipe.distill import Watch
from shoal.redaction import redacted
from shoal.runtime import agreed, barrier
from shoal.tracking.wandb_run import attempt, is_tracking

log = logging.getLogger(__name__)

PREFIX = "watch/"
"""Beginning of the curves' names."""
BEST = "best"
RISE = 1.25
"""Times the KL of the first five rows of the log: the text alone has made 1.20 of it, a rate too high by ten 1.89."""
WORDS = {"perplexity": "loss {:.3f} nats per token"}
"""What the log says of a score; of all others its name and the number."""

Scorer = Callable[[PreTrainedModel], Mapping[str, TaskScore]]
"""All ranks call it and all get the same scores."""


class Profiler(TrainerCallback):
    """Traces the optimizer ``steps`` from first to last, counted from 1, into a file of every rank in ``folder``; with
    None nothing. Within its block it also writes there who holds a GPU's memory, where that runs out."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._first, self._last = steps or (math.inf, math.inf)
        self._folder, self._is_asked = folder, steps is not None
        self._trace: torch.profiler.profile | None = None

    def __enter__(self) -> None:
        if self._is_asked and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._is_asked and torch.cuda.is_available():
            if kind is not None and issubclass(kind, torch.OutOfMemoryError):
                self._folder.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-rank-{rank()}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._first - 1:
            self._trace = torch.profiler.profile()
            self._trace.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self._last:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trace is not None:
            self._trace.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._trace.export_chrome_trace(str(self._folder / f"rank-{rank()}.json"))
            self._trace = None


class Watcher(TrainerCallback):
    """Scores the student before the first step, at every ``eval_steps`` and after the last, and keeps the best.

    ``score`` runs it through the trainer, which knows how to make it whole and plain. The best state is a folder of its
    own beside the checkpoints: a resumed run finds what an earlier life of it has kept.
    """

    def __init__(self, settings: Watch, folder: Path, inputs: dict[str, Any]) -> None:
        self._settings = settings
        self._folder = folder / BEST
        self._inputs = inputs
        self.score: Callable[[], Mapping[str, TaskScore]]
        self.log: Callable[[dict[str, float]], None]
        self.state: Callable[[], dict[str, Tensor] | None]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = {name for row in state.log_history if row["step"] == state.global_step for name in row}
        if not any(name.startswith(PREFIX) for name in seen):
            self._watch_if_due(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps or not control.should_training_stop:  # else saved first, scored later
            self._watch_if_due(state)

    def _watch_if_due(self, state: Any) -> None:
        every = self._settings.eval_steps
        every = math.ceil(every * state.max_steps) if every < 1 else round(every)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._watch(state.global_step)

    def _watch(self, step: int) -> None:
        scores = self.score()
        self.log({PREFIX + name: score.score for name, score in scores.items()})
        if is_main():
            in_words = ", ".join(
                WORDS.get(name, f"{name} {{:.3f}}").format(score.score) for name, score in scores.items()
            )
            log.info("step %d: %s", step, in_words)
        if self._settings.metric_for_best_model is not None:
            self._keep(step, scores[self._settings.metric_for_best_model])

    def _keep(self, step: int, score: TaskScore) -> None:
        best = self.best()
        if best is not None and best["step"] != step and not math.isnan(best["score"]):
            better = score.score > best["score"] if score.higher_is_better else score.score < best["score"]
            if not better:
                return
        weights = self.state()  # every rank: ZeRO-3 gathers
        if is_main():
            assert weights is not None
            with written_folder(self._folder) as folder:
                save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
                story = {
                    "step": step,
                    "metric": self._settings.metric_for_best_model,
                    "score": score.score,
                    "inputs": self._inputs,
                }
                write_json(folder / "best.json", story)
        barrier()

    def best(self) -> dict[str, Any] | None:
        """Step, metric and score of the best state that this run has kept so far.

        Every rank calls this, and rank 0 looks: on a shared disk another node may see the file of a moment ago.
        """

        def read() -> dict[str, Any] | None:
            best = read_json(self._folder / "best.json")
            return None if not best or differences(self._inputs, best.get("inputs", {})) else best

        return agreed(read)

    def best_state(self) -> dict[str, Tensor]:
        """The weights kept at ``best()``."""
        return load_file(self._folder / "model.safetensors")

    def forget(self) -> None:
        """Remove the kept state, once it is written elsewhere."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Progress(TrainerCallback):
    """Tells steps and the time left by the clock, scoring and saving included, and beside them loss and tokens per
    second over all ranks, which is the report's rate: from the beginning, without scoring and saving.

    Entered around the whole of Trainer.train, which sets up DeepSpeed and reads a checkpoint before the first step.
    """

    def __init__(self, *, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._told = ExitStack()

    def __enter__(self) -> Progress:
        self._told.enter_context(doing("setting up DeepSpeed"))
        return self

    def __exit__(self, *failure: Any) -> None:
        self._told.__exit__(*failure)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._told.close()
        self._work = self._told.enter_context(progress("training", total=state.max_steps, unit="steps"))
        self._work.known(state.global_step)
        self._kl: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._work(state.global_step - self._work.done)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "seconds" in logs:
            rate = state.global_step * self._tokens_per_step / max(logs["seconds"], 1e-9)
            share = f", MFU {logs['mfu']:.0%}" if "mfu" in logs else ""
            self._work.note = f"loss {logs['loss']:.4f}, {rate:,.0f} tokens/s{share}"
            if "forward_kl" in logs and "on_policy/loop_rate" not in logs:  # on samples it is another number
                self._kl.append(logs["forward_kl"])
            if len(self._kl) >= 15 and (last := fmean(self._kl[-10:])) > RISE * (first := fmean(self._kl[:5])):
                cause = f"distill.trainer.learning_rate {args.learning_rate:g} is too high for this model"
                words = "forward_kl rises from %.2f to %.2f: %s; stop, and use a fifth of it in a new run_dir"
                log.warning(words, first, last, cause)
                self._kl[:5] = [math.inf]  # it is said once


class Events(TrainerCallback):
    """Writes what is logged of a step as a line of JSON to RUN_DIR/log.jsonl, and prints it where a program reads.

    A line has step, num_tokens (over all ranks, until then) and the curves' values by their names. Lines that a resumed
    training makes again are taken out first.
    """

    FILE = "log.jsonl"

    def __init__(self, run_dir: Path, *, tokens_per_step: int) -> None:
        self._file, self._tokens_per_step = run_dir / self.FILE, tokens_per_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_main():
            goes_on = state.global_step and self._file.is_file()  # a log may have been deleted
            kept = self._file.read_text(encoding="utf-8", errors="replace").splitlines() if goes_on else []
            steps = (re.fullmatch(r'\{"step": (\d+)\b.*\}', line) for line in kept)  # of one that is torn none
            kept = [step[0] for step in steps if step and int(step[1]) <= state.global_step]
            write_text(self._file, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if is_main() and logs and "train_runtime" not in logs:
            step = state.global_step
            row = {"step": step, "num_tokens": step * self._tokens_per_step, **logs}
            line = json.dumps({key: value for key, value in row.items() if key != "epoch"})
            with explained_disk_errors(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
            if VOICE.events:
                try:
                    sys.stdout.write(f"{line}\n")
                    sys.stdout.flush()
                except OSError:  # who reads it may leave before its end; Python flushes it once more as it ends
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Curves(WandbCallback):
    """transformers' own callback in the W&B run of the run directory; where that fails, it is said once, and training
    goes on."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._run_dir = run_dir

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        public = copy.copy(args)
        public.to_dict = lambda: redacted(args.to_dict())
        if is_tracking():
            with attempt("curves could not be started", self._run_dir):
                super().on_train_begin(public, state, control, model=model, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if is_tracking():
            with attempt("curves could not be logged", self._run_dir):
                super().on_log(args, state, control, model=model, logs=logs, **kwargs)
