"""Trainings of a tiny cut model through the distill verb, a few seconds each, and what may go wrong inside a rank."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from ranks import environment, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from shoal.artifacts.evaluation import TaskScore
from shoal.artifacts.training import Training
from shoal.launch.verbs.prune import prune
from shoal.launch.verbs.run import open_run
from shoal.recipe.recipe import load_recipe

DROP = [2, 3]
STEPS = 8
LENGTH = 64
BATCH = 4
KEEPING: dict[str, Any] = {"trainer": {"save_strategy": "steps", "save_steps": 2}}
"""A checkpoint after every second step."""
MANY_STEPS = 60
"""Long enough to be interrupted in the middle."""


@dataclass(frozen=True)
class Trial:
    """A recipe, its run directory, and what came of it."""

    recipe: Path
    result: subprocess.CompletedProcess[str] | None = None

    @property
    def dir(self) -> Path:
        return self.recipe.parent / "run"

    @property
    def log(self) -> str:
        assert self.result is not None
        return self.result.stderr

    @property
    def training(self) -> Training:
        return Training.load(self.dir / Training.FILE)

    def curve(self, name: str = "loss", *, steps: int = STEPS) -> list[float]:
        rows = [row for row in self.training.history if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        return [row[name] for row in rows]

    def weights(self, name: str = "distilled") -> dict[str, Tensor]:
        return load_file(self.dir / name / "model.safetensors")


def prepare(folder: Path, teacher: Path) -> Path:
    """A run directory in which the cut is made already."""
    path = write_recipe(folder, teacher)
    prune(open_run(load_recipe(str(path), [])))
    return folder / "run"


def recipe(folder: Path, model: Path, cut: Path, /, **settings: Any) -> Path:
    """A recipe in ``folder`` whose student is already there, from the run directory ``cut``."""
    shutil.copytree(cut, folder / "run")
    return write_recipe(folder, model, **settings)


def small_training(*, steps: int = STEPS, **distill: Any) -> dict[str, Any]:
    """The section `distill` of a training that is small and exact; ``distill`` are further settings of it."""
    return {
        "data": "python_docs",
        "num_tokens": LENGTH * BATCH * steps,
        "sequence_length": LENGTH,
        "precision": "float32",
        "deepspeed": "zero0",
        "batch_size": BATCH,
        "watch": None,
        **distill,
        "trainer": {"learning_rate": 1e-3, "save_strategy": "no", **distill.get("trainer", {})},
    }


def write_recipe(folder: Path, model: Path, /, *, track: str = "off", **distill: Any) -> Path:
    """A recipe whose training is small and exact."""
    settings = {
        "model": str(model),
        "run_dir": str(folder / "run"),
        "dtype": "float32",
        "prune": {"drop": DROP},
        "eval": {"tasks": ["knowledge_continuation"], "limit": 4},
        "track": {"wandb": track},
        "distill": small_training(**distill),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(
    path: Path, *overrides: str, verb: str = "distill", ranks: int = 1, before: Callable[[], None] | None = None
) -> Trial:
    """The verb on every rank to its end; ``before`` is called in each of them first."""
    env = environment(WANDB_MODE="offline")
    arguments = [verb, "--config", str(path), *overrides]
    return Trial(path, run_ranks(arguments, ranks=ranks, env=env, cwd=path.parent, before=before))


def finished(trial: Trial) -> Trial:
    assert trial.result is not None
    assert trial.result.returncode == 0, trial.log[-4000:]
    return trial


def unfinished(trial: Trial, folder: Path, *, step: int, part: str = ".") -> Path:
    """The recipe of a copy of this run that looks as if it had been killed after the checkpoint of ``step``, of the
    student or of another ``part`` of the run directory."""
    shutil.copytree(trial.recipe.parent, folder)
    path = folder / "recipe.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["run_dir"] = str(folder / "run")
    path.write_text(yaml.safe_dump(settings))
    shutil.rmtree(folder / "run" / part / "distilled")
    (folder / "run" / part / Training.FILE).unlink()
    for checkpoint in (folder / "run" / part / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    return path


def checkpointed_weights(trial: Trial, step: int) -> dict[str, Tensor]:
    """The student in a checkpoint that was written under ZeRO 0."""
    (file,) = (trial.dir / "checkpoints" / f"checkpoint-{step}").glob("*/mp_rank_00_model_states.pt")
    return torch.load(file, weights_only=False)["module"]


def mask_labels_of_rows(*places: int) -> None:
    """Let the rows at these places of every batch have no supervised token."""
    from shoal.data.packing import IGNORED, ROW, PackedRows

    get_item = PackedRows.__getitem__

    def masked(rows: PackedRows, row: int) -> dict[str, Tensor]:
        found = get_item(rows, row)
        if row % BATCH in places:
            found["labels"] = torch.full_like(found["labels"], IGNORED)
        assert found[ROW] == row
        return found

    PackedRows.__getitem__ = masked  # pyright: ignore[reportAttributeAccessIssue]


def script_scores(scores: list[float], *places: int) -> None:
    """Let the watched perplexity be these numbers, look after look, once it has really been scored."""
    from shoal.eval.evaluate import QuickScores

    mask_labels_of_rows(*places)
    score, order = QuickScores.__call__, iter(scores)

    def scripted(quick: QuickScores, model: Any) -> dict[str, TaskScore]:
        found = score(quick, model)
        assert found["perplexity"].score > 0
        return {**found, "perplexity": replace(found["perplexity"], score=next(order))}

    QuickScores.__call__ = scripted  # pyright: ignore[reportAttributeAccessIssue]


def terminate(step: int) -> None:
    """SIGTERM to this process in the middle of step number ``step``, counted from 1."""
    from shoal.train.trainer import DistillTrainer

    compute = DistillTrainer.compute_loss

    def interrupted(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(trainer, *args, **kwargs)

    DistillTrainer.compute_loss = interrupted  # pyright: ignore[reportAttributeAccessIssue]


def all_of(*hooks: Callable[[], None]) -> None:
    """One after the other."""
    for hook in hooks:
        hook()


def share_nothing() -> None:
    """Let no layer be run once for teacher and student."""
    from shoal.train.student import spec

    spec.shares_prefix = lambda *_: 0


def ask_of_all_rows() -> None:
    """Let the teacher read all rows, whatever loss terms learn from them."""
    from shoal.train.student.spec import TrainSpec

    TrainSpec.asked_sources = property(lambda _: None)  # pyright: ignore[reportAttributeAccessIssue]


def spoil_loss(step: int, factor: float, rank: int) -> None:
    """From step number ``step`` on, counted from 1, one rank's loss is ``factor`` times what it is."""
    from shoal.train.trainer import DistillTrainer

    compute = DistillTrainer.compute_loss

    def spoilt(trainer: DistillTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(trainer, model, inputs, *args, **kwargs)
        if trainer.state.global_step + 1 >= step and int(os.environ["RANK"]) == rank:
            trainer._step_sums *= factor
            loss = loss * factor
        return loss

    DistillTrainer.compute_loss = spoilt  # pyright: ignore[reportAttributeAccessIssue]


def compile_graphs_only() -> None:
    """Let what is compiled stay a graph, for which no compiler is needed."""
    from shoal.train.engine import kernels

    kernels.BACKEND = "aot_eager"


def take_chunks(tokens: int) -> None:
    """Let the head see so many tokens at a time."""
    from shoal.train.teacher import wiring

    wiring.CHUNK = tokens


def run_out_of_memory(step: int, message: str) -> None:
    """Let the device be full in the middle of step number ``step``, counted from 1."""
    from shoal.train.trainer import DistillTrainer

    compute = DistillTrainer.compute_loss

    def full(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step + 1 == step:
            raise torch.OutOfMemoryError(message) if "CUDA out of memory" in message else RuntimeError(message)
        return compute(trainer, *args, **kwargs)

    DistillTrainer.compute_loss = full  # pyright: ignore[reportAttributeAccessIssue]


def spoil_gradient(step: int) -> None:
    """From step number ``step`` on, gradients are no numbers where the loss still is one."""
    from shoal.train.trainer import DistillTrainer

    compute = DistillTrainer.compute_loss

    def spoilt(trainer: DistillTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(trainer, model, inputs, *args, **kwargs)
        if trainer.state.global_step + 1 >= step:
            loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    DistillTrainer.compute_loss = spoilt  # pyright: ignore[reportAttributeAccessIssue]


def fake_streams() -> None:
    """Let DeepSpeed believe in streams, as on a GPU, and end this rank where a gradient above its bucket is let go that
    no stream was recorded for."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    class Stream:
        def wait_stream(self, _other: object) -> None: ...
        def wait_event(self, _event: object) -> None: ...
        def synchronize(self) -> None: ...

    usual, accelerator, recorded = Stream(), type(get_accelerator()), set[int]()
    for name, own in {
        "Stream": lambda _self: Stream(),
        "current_stream": lambda _self, *_: usual,
        "stream": lambda _self, _stream: nullcontext(),
        "resolves_data_dependency": lambda _self: False,
        "is_synchronized_device": lambda _self: False,
    }.items():
        setattr(accelerator, name, own)
    torch.Tensor.record_stream = lambda self, _stream: recorded.add(self.untyped_storage().data_ptr())  # pyright: ignore
    clear = DeepSpeedZeroOptimizer.clear_grad_attribute

    def checked(self: Any, param: Any) -> None:
        gradient = self.get_param_gradient_attribute(param)
        if gradient is not None and param.numel() > self.reduce_bucket_size:
            assert gradient.untyped_storage().data_ptr() in recorded, "a gradient is let go while it is added up"
            (Path.cwd() / f"seen-{os.environ['RANK']}").touch()
        clear(self, param)

    DeepSpeedZeroOptimizer.clear_grad_attribute = checked
