"""The trainer of a run directory: checkpoints that are complete or absent, samples of the student, a clean stop."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel

from shoal.errors import explained_disk_errors
from shoal.progress import doing
from shoal.ranks import is_main, world_size
from shoal.runtime import barrier, seed_everything

from .callbacks.validation import Scorer, Watcher
from .engine.arguments import kept_checkpoints
from .engine.checkpoint import commit, layout, remove_older, removed_unless_complete, separate_groups
from .objective_trainer import ObjectiveTrainer, Parts

T = TypeVar("T")


class StepSampler(Sampler[int]):
    """Rows as they are packed, step by step, and inside of a step those that ask the teacher behind the others.

    A step holds the same rows as without that, and its loss is their sum. The Trainer deals a step out micro-batch by
    micro-batch, in each rank by rank. So all ranks run the teacher in the same micro-batches, but for one in which they
    have as many rows each that ask it, give or take one: a step takes as long as its slowest rank.
    """

    def __init__(self, asks_N: NDArray[np.bool_], *, rows: int, ranks: int, micro_batches: int) -> None:
        """``asks_N``: whether the teacher is asked of a row. A step has ``micro_batches`` of ``rows`` rows on every
        rank."""
        super().__init__()
        self._asks_N = asks_N
        self._shape = (micro_batches, rows, ranks)

    def __len__(self) -> int:
        return len(self._asks_N)

    def __iter__(self) -> Iterator[int]:
        per_step = int(np.prod(self._shape))
        for start in range(0, len(self), per_step):
            yield from (start + self._dealt(self._asks_N[start : start + per_step])).tolist()

    def _dealt(self, asks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Places of a step's rows in the order in which they are dealt."""
        order = asks.argsort(kind="stable")
        if asks.all() or not asks.any() or asks.size != np.prod(self._shape):
            return order
        # one to each rank in turn, until all have their micro-batch
        return order.reshape(self._shape).swapaxes(1, 2).ravel()


class DistillTrainer(ObjectiveTrainer):
    """Trains, under DeepSpeed, in RUN_DIR/checkpoints."""

    def __init__(self, parts: Parts, *, identity: dict[str, Any], **kwargs: Any) -> None:
        """``identity`` is what a checkpoint must have in common with the run that goes on from it; ``kwargs`` are the
        Trainer's."""
        super().__init__(parts, **kwargs)
        self._spec = parts.spec
        self._identity = identity
        self._keep_checkpoints = kept_checkpoints(parts.spec.settings)

    def train_on_objective(self, resume: Path | None) -> None:
        """Train to the end, or a stop, on the objective, which goes out of force then: what is told of memory rests on
        models as they are."""
        self.objective.install()
        try:
            self.train(resume_from_checkpoint=None if resume is None else str(resume))
        finally:
            self.objective.uninstall()

    def watch_with(self, watcher: Watcher, score: Scorer) -> None:
        """Let ``watcher`` score the student now and then."""

        def logged(values: dict[str, float]) -> None:
            wanted = self.control.should_log
            self.log(values)
            self.control.should_log = wanted  # the step's own values are still to come

        watcher.score, watcher.log, watcher.state = partial(self.looked_at, score), logged, self.student_state
        self.add_callback(watcher)

    def looked_at(self, look: Callable[[PreTrainedModel], T]) -> T:
        """What ``look`` sees in the student as it is now, in no time of training. Every rank calls this."""
        with self._rate.paused(), doing("scoring the student"), self.plain_student() as student:
            return look(student)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        # packing has drawn the order already; the same global batches for every number of ranks follow from it
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        spec = self._spec
        if spec.asked_sources is None or rows.sources_NS is None:
            return SequentialSampler(rows)
        # rows of sources that ask hold no others
        asks_N = np.isin(rows.sources_NS[:, 0].numpy(), [*spec.asked_sources])
        per_micro_batch, micro_batches = spec.batch_split
        return StepSampler(asks_N, rows=per_micro_batch, ranks=spec.ranks.count, micro_batches=micro_batches)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing inside checkpoints: DeepSpeed's files hold the weights; `distilled/` is written once, at the end."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if is_main() and folder.exists():  # an unfinished or damaged one of an earlier life
            shutil.rmtree(folder)
        barrier()
        saving = doing(f"saving {folder.name}")
        with removed_unless_complete(folder), explained_disk_errors(folder), self._rate.paused(), saving:
            super()._save_checkpoint(model, trial)
            zero: Any = self.args.hf_deepspeed_config
            commit(folder, self._identity, zero_stage=zero.config["zero_optimization"]["stage"])
        if is_main():
            remove_older(folder.parent, keep=self._keep_checkpoints)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        zero: Any = self.args.hf_deepspeed_config
        universal = zero.config.get("checkpoint", {}).get("load_universal", False)
        if checkpoint is not None and universal and zero.config["zero_optimization"]["stage"] == 3:
            engine: Any = self.model_wrapped
            separate_groups(engine.optimizer.optimizer, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random states are saved per rank; under another number of ranks all start anew from seed and step."""
        if checkpoint is not None and layout(Path(checkpoint))["ranks"] != world_size():
            seed_everything(self.args.seed + self.state.global_step)
        else:
            super()._load_rng_state(checkpoint)

    def student_state(self) -> dict[str, Tensor] | None:
        """The student's whole state dict on rank 0's CPU, None elsewhere; every rank calls this (ZeRO-3 gathers).

        Without the second name of a tied weight: gathering makes copies, which would be saved twice.
        """
        state: Any = self.accelerator.get_state_dict(self.model_wrapped)
        if not is_main():
            return None
        student: Any = self.model
        return {name: weight for name, weight in state.items() if name not in student.all_tied_weights_keys}
