"""What a finished training leaves: distilled/, a plain checkpoint, and distill.json."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.training import Training
from shoal.atomic_files import fingerprint
from shoal.data.packing import PackedRows
from shoal.machine import peak_memory
from shoal.progress import doing
from shoal.ranks import is_main, world_size
from shoal.redaction import redacted
from shoal.runtime import barrier, device

from .callbacks.validation import Watcher
from .engine.arguments import resolved_deepspeed
from .objective_trainer import ObjectiveTrainer
from .student.frozen import write_student
from .student.spec import TrainSpec
from .trainer import DistillTrainer

log = logging.getLogger(__name__)


def write_results(
    trainer: DistillTrainer,
    spec: TrainSpec,
    *,
    run_dir: Path,
    inputs: dict[str, Any],
    watcher: Watcher | None,
    rows: PackedRows,
    overlap: dict[str, Any],
) -> None:
    """Write distilled/ from the last state, or from the best that ``watcher`` has kept, then distill.json.

    Every rank calls this. ``spec.student`` is the checkpoint that training began with; ``overlap`` is what of
    evaluation stands in the training text.
    """
    student = trainer.objective.student
    settings: dict[str, Any] = {}
    with doing("bringing the student's weights together"):
        state = trainer.student_state()
    peak = torch.tensor(float(peak_memory()), device=device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    best = None if watcher is None else watcher.best()
    if is_main():
        assert state is not None
        if best is not None and watcher is not None:
            log.info("distilled/ is the student of step %d: %s %.4f", best["step"], best["metric"], best["score"])
            state = watcher.best_state()
            settings["best"] = {key: best[key] for key in ("step", "metric", "score")}
        student.config.use_cache = True  # the Trainer turned it off
        with doing("writing distilled/"):
            write_student(student, state, spec.student, run_dir / "distilled")
        training = training_of(trainer, spec, inputs=inputs, rows=rows, peak_memory_bytes=int(peak.item()))
        training = replace(training, settings={**training.settings, **settings}, data={**training.data, **overlap})
        training.write(run_dir / Training.FILE)
        if watcher is not None:
            watcher.forget()
    barrier()


def training_of(
    trainer: ObjectiveTrainer, spec: TrainSpec, *, inputs: dict[str, Any], rows: PackedRows, peak_memory_bytes: int
) -> Training:
    """What ``trainer`` has done on ``rows``, so far."""
    history = [row for row in trainer.state.log_history if "step" in row and "train_runtime" not in row]
    seconds = [row["seconds"] for row in history if "seconds" in row]
    return Training(
        provenance=Provenance(inputs),
        num_steps=trainer.state.global_step,
        num_tokens=_tokens_trained_on(trainer, spec),
        seconds=seconds[-1] if seconds else trainer.seconds,
        history=tuple({key: float(value) for key, value in row.items()} for row in history),
        settings={
            "trainer": redacted(trainer.args.to_sanitized_dict()),
            "deepspeed": resolved_deepspeed(trainer.args),
            "world_size": world_size(),
            "rows": fingerprint(rows.fingerprint),
            "shared_layers": spec.shared_layers,
            "trained_layers": list(spec.trained.layers),
        },
        data={"sources": rows.counts},
        peak_memory_bytes=peak_memory_bytes,
    )


def _tokens_trained_on(trainer: ObjectiveTrainer, spec: TrainSpec) -> int:
    """Tokens of all steps; where no budget is set, the last step of an epoch has fewer rows."""
    steps, dataset = trainer.state.global_step, trainer.train_dataset
    assert dataset is not None
    num_rows, rows_per_step = len(dataset), spec.tokens_per_step // spec.settings.sequence_length  # pyright: ignore[reportArgumentType]
    epochs, begun = divmod(steps, max(1, math.ceil(num_rows / rows_per_step)))
    return (epochs * num_rows + min(begun * rows_per_step, num_rows)) * spec.settings.sequence_length
