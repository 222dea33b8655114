"""The transformers Trainer with a distillation loss, checkpoints that are complete or absent, and a clean stop.

Why the Trainer and not a loop of our own: every TrainingArguments setting keeps its meaning, and schedules, W&B,
logging and gradient checkpointing come with it. What it gets wrong for us is overridden here, one method each.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback

from shoal.errors import UserError, explained_disk_errors
from shoal.runtime import is_main, seed_everything, world_size
from shoal.terms import LossTerm, needs_teacher, term_names

from .checkpoint import commit, layout, remove_older, separate_groups
from .stop import StopRequest
from .student import SharedPrefix, final_hidden, output_head

log = logging.getLogger(__name__)


class DistillTrainer(Trainer):
    """Trains a student whose forward is shoal.train.student.install_objective's."""

    # the loss below is already divided by the token count of the whole optimizer step
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        prefix: SharedPrefix | None,
        terms: tuple[LossTerm, ...],
        inputs: dict[str, Any],
        keep_checkpoints: int,
        stop: StopRequest,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # makes the Trainer count the tokens of a whole step, over micro-batches and ranks, and hand the count over
        self.model_accepts_loss_kwargs = True
        self._teacher = teacher
        self._prefix = prefix
        self._terms = terms
        self._inputs = inputs
        self._keep_checkpoints = keep_checkpoints
        self._term_sums = torch.zeros(len(terms), dtype=torch.float64, device=self.args.device)
        self._steps_logged = 0
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self.add_callback(_StopWhenAsked(stop))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's mean loss over all supervised tokens of all ranks.

        DeepSpeed averages gradients over ranks, hence the factor world size. ``num_items_in_batch`` is the token count
        of the whole step; averaging each micro-batch over its own tokens would make the loss depend on the split.
        """
        assert num_items_in_batch is not None
        teacher_hidden_BSD = self._teacher_hidden(inputs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_gathered(output_head(self._teacher)))
            if self._prefix is not None:
                stack.enter_context(self._prefix.replaying(next(model.parameters()).dtype))
            loss_sum, term_sums = model(**inputs, teacher_hidden_BSD=teacher_hidden_BSD)
        self._term_sums += term_sums / num_items_in_batch
        loss = loss_sum * (world_size() / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _teacher_hidden(self, inputs: dict[str, Tensor]) -> Tensor | None:
        if self._prefix is None and not needs_teacher(self._terms):
            return None
        recording = contextlib.nullcontext() if self._prefix is None else self._prefix.recording()
        with recording:
            return final_hidden(self._teacher, inputs["input_ids"], inputs["position_ids"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every loss term, averaged over steps and summed over ranks, to what is logged."""
        steps = self.state.global_step - self._steps_logged
        if "loss" in logs and steps > 0:
            logs["seconds"] = self._seconds_before + time.monotonic() - self._started
            sums = self._term_sums.clone()
            if dist.is_initialized():
                dist.all_reduce(sums)
            logs |= {name: value / steps for name, value in zip(term_names(self._terms), sums.tolist(), strict=True)}
            _refuse_non_finite(logs, self.state.global_step)
            self._term_sums.zero_()
            self._steps_logged = self.state.global_step
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        # packing has drawn the order already; the same global batches for every number of ranks follow from it
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # pyright: ignore[reportArgumentType]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing inside checkpoints: DeepSpeed's files hold the weights; `distilled/` is written once, at the end."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not torch.isfinite(self._term_sums).all():
            _refuse_non_finite({"loss": float("nan")}, self.state.global_step)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if is_main() and folder.exists():  # an unfinished or damaged one of an earlier life
            shutil.rmtree(folder)
        if dist.is_initialized():
            dist.barrier()
        try:
            with explained_disk_errors(folder):
                super()._save_checkpoint(model, trial)
                zero: Any = self.args.hf_deepspeed_config
                commit(folder, self._inputs, zero_stage=zero.config["zero_optimization"]["stage"])
        except BaseException:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)
            raise
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

    def _load_callback_state(self) -> None:
        """After the state was restored: term curves and training time go on from here, not from step 0."""
        super()._load_callback_state()
        self._steps_logged = self.state.global_step
        seconds = [row["seconds"] for row in self.state.log_history if "seconds" in row]
        self._seconds_before = seconds[-1] if seconds else 0.0

    def student_state(self) -> dict[str, Tensor] | None:
        """The student's whole state dict on rank 0's CPU, None elsewhere; every rank calls this (ZeRO-3 gathers).

        Without the second name of a tied weight: gathering makes copies, which would be saved twice.
        """
        state: Any = self.accelerator.get_state_dict(self.model_wrapped)
        if not is_main():
            return None
        student: Any = self.model
        return {name: weight for name, weight in state.items() if name not in student.all_tied_weights_keys}


def _refuse_non_finite(logs: dict[str, float], step: int) -> None:
    """A NaN never heals: later steps only spread it into every weight and every checkpoint."""
    broken = [name for name, value in logs.items() if not math.isfinite(value)]
    if broken:
        raise UserError(
            f"step {step}: {broken[0]} is {logs[broken[0]]}; lower distill.trainer.learning_rate or set max_grad_norm, "
            "then start again in another run_dir"
        )


class _StopWhenAsked(TrainerCallback):
    """Turns a stop request on any rank into: finish the step on all ranks, save, return."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stop.agreed() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


@contextlib.contextmanager
def _gathered(module: nn.Module):
    """The module's parameters in full where ZeRO-3 has sharded them; elsewhere nothing happens."""
    sharded = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield
