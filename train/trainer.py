"""The trainer of a run directory: checkpoints that are complete or absent, samples of the student, a clean stop."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel

from shoal.atomic_files import write_json
from shoal.errors import explained_disk_errors
from shoal.progress import doing
from shoal.runtime import barrier, is_main, seed_everything, world_size

from .callbacks.validation import Scorer, Watcher
from .engine.arguments import kept_checkpoints
from .engine.checkpoint import commit, layout, remove_older, separate_groups
from .generated.on_policy import Sampler as OnPolicySampler
from .generated.sampling import own_forwards
from .objective.host_batch import queued
from .objective_trainer import ObjectiveTrainer
from .student.spec import TrainSpec

ON_POLICY_FILE = "on_policy.json"
"""File, inside a checkpoint, of what on-policy steps keep."""
T = TypeVar("T")


class DistillTrainer(ObjectiveTrainer):
    """Trains, under DeepSpeed, in RUN_DIR/checkpoints."""

    def __init__(
        self,
        *args: Any,
        spec: TrainSpec,
        identity: dict[str, Any],
        on_policy: OnPolicySampler | None = None,
        **kwargs: Any,
    ) -> None:
        """``identity`` is what a checkpoint must have in common with the run that goes on from it; ``args`` and
        ``kwargs`` are those of ObjectiveTrainer."""
        super().__init__(*args, spec=spec, **kwargs)
        self._identity = identity
        self._keep_checkpoints = kept_checkpoints(spec.settings)
        self._on_policy = on_policy

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """In on-policy steps the batches are what the student writes now; samples hold other numbers of learnt
        tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if batches and self._on_policy is not None and self._on_policy.replaces(step, self.state.max_steps):
            with self.plain_student() as student:
                batches = self._on_policy.batches(student, batches, step=step)
            batches = self._on_policy.judged(batches, self._teacher_log_probs, step=step)
            num_items = self._get_num_items_in_batch(batches, device)
            self.keep_batches(batches, num_items)
        return batches, num_items

    def _teacher_log_probs(self, batch: Mapping[str, Any], places_N: Tensor) -> Tensor:
        """As train.generated.loops.LogProbs says."""
        with self.taught(batch) as signals:
            return self.objective.teacher_log_probs(signals, batch["input_ids"], queued(places_N, self.args.device))

    def read_curves(self) -> dict[str, float]:
        """Those of the objective, and of what the student writes."""
        return super().read_curves() | ({} if self._on_policy is None else self._on_policy.horizon.read_curves())

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

    @contextlib.contextmanager
    def plain_student(self) -> Iterator[PreTrainedModel]:
        """The student as an ordinary model, whole on every rank, under the precision that it is trained in."""
        from trl.models.utils import unwrap_model_for_generation

        wrapped: Any = self.model_wrapped
        dtype = self._autocast_dtype
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with (
            # TRL asks transformers by old names
            warnings.catch_warnings(action="ignore", category=FutureWarning),
            unwrap_model_for_generation(
                wrapped, self.accelerator, gradient_checkpointing_kwargs=checkpointing
            ) as model,
            own_forwards(self.objective.student),
            # DeepSpeed's engine enters autocast in its own forward, which a plain student does not pass through
            torch.autocast(self.args.device.type, dtype, enabled=dtype is not None),
        ):
            yield model  # pyright: ignore[reportReturnType]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        # packing has drawn the order already; the same global batches for every number of ranks follow from it
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # pyright: ignore[reportArgumentType]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing inside checkpoints: DeepSpeed's files hold the weights; `distilled/` is written once, at the end."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if is_main() and folder.exists():  # an unfinished or damaged one of an earlier life
            shutil.rmtree(folder)
        barrier()
        try:
            with explained_disk_errors(folder), self._rate.paused(), doing(f"saving {folder.name}"):
                super()._save_checkpoint(model, trial)
                if is_main() and self._on_policy is not None:
                    write_json(folder / ON_POLICY_FILE, self._on_policy.horizon.state())
                zero: Any = self.args.hf_deepspeed_config
                commit(folder, self._identity, zero_stage=zero.config["zero_optimization"]["stage"])
        except BaseException:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if is_main():
            remove_older(folder.parent, keep=self._keep_checkpoints)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._on_policy is not None:
            self._on_policy.horizon.load_state(json.loads((Path(checkpoint) / ON_POLICY_FILE).read_bytes()))
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
