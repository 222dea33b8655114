"""The transformers Trainer with a distillation loss, checkpoints that are complete or absent, and a clean stop.

Why the Trainer and not a loop of our own: every TrainingArguments setting keeps its meaning, and schedules, W&B,
logging and gradient checkpointing come with it. What it gets wrong for us is overridden here, one method each.

A loss is summed over supervised tokens and divided once, by the number of them in the whole optimizer step, over all
its micro-batches and ranks. So the curve does not depend on how a batch is split.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback

from shoal.atomic_files import write_json
from shoal.errors import UserError, explained_disk_errors
from shoal.progress import doing
from shoal.recipe.losses import term_names
from shoal.runtime import barrier, is_main, seed_everything, world_size

from .callbacks.loss_spikes import LossGuard, refuse_step
from .callbacks.validation import Score, Scorer, Watcher
from .engine.arguments import kept_checkpoints
from .engine.checkpoint import commit, layout, remove_older, separate_groups
from .engine.sharding import gathered, keep_gradient_norm, reduce_in_parts
from .engine.stop import StopRequest
from .generated.on_policy import Sampler as OnPolicySampler
from .generated.sampling import own_forwards
from .objective.activation_checkpointing import recompute_selectively
from .objective.host_batch import documents_known, on_host
from .student.spec import TrainSpec
from .teacher.wiring import Wiring

INPUTS = ("input_ids", "position_ids", "labels")
"""Planes that the student's forward takes of a batch; the teacher may read more."""
AGREEMENT = "top1_agreement"
PEAK_SHARE = "peak_share"
"""Tokens per second against those at the speed of a large matrix product on this machine."""
OBJECTIVE_FILE = "objective.json"
"""File of what loss terms keep between steps, inside a checkpoint."""


class DistillTrainer(Trainer):
    """Trains a student whose forward is that of an installed shoal.train.objective.objective.Objective."""

    # the loss below is already divided by the token count of the whole optimizer step
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        spec: TrainSpec,
        wiring: Wiring,
        identity: dict[str, Any],
        stop: StopRequest,
        on_policy: OnPolicySampler | None = None,
        peak_tokens_per_s: float | None = None,
        **kwargs: Any,
    ) -> None:
        """``identity`` is what a checkpoint must have in common with the run that goes on from it; ``args`` and
        ``kwargs`` are the Trainer's."""
        super().__init__(*args, **kwargs)
        objective = wiring.objective
        recompute_selectively(objective.student, self.args)
        # makes the Trainer count the tokens of a whole step, over micro-batches and ranks, and hand the count over
        self.model_accepts_loss_kwargs = True
        self.objective = objective
        self._wiring = wiring
        self._identity = identity
        self._tokens_per_step = spec.tokens_per_step
        self._keep_checkpoints = kept_checkpoints(spec.settings)
        self._guard = LossGuard(spec.settings.stop_on_spike)
        self._autocast_dtype = spec.deepspeed.autocast_dtype
        self._on_policy = on_policy
        self._peak_tokens_per_s = peak_tokens_per_s
        self._batches: list[dict[str, Tensor]] = []
        self._stop = stop
        self._num_items: Tensor | int = 0
        self._step_sums = self._zero_sums()
        self._term_tokens: list[int] = []
        self._window_sums = [0.0] * (2 * len(objective.terms) + 2)
        self._steps_logged = 0
        self._gradient_norm: Tensor | float | None = None
        self._rate = _Rate()
        self.add_callback(_StepEnds(self))

    def _zero_sums(self) -> Tensor:
        """Every term's sum over the step's supervised tokens, divided by their number, and the counts of top-1
        agreement."""
        return torch.zeros(len(self.objective.terms) + 2, dtype=torch.float64, device=self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step, kept until it is known to be sound, and their supervised tokens.

        In on-policy steps they are what the student writes now; samples hold other numbers of learnt tokens.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if batches and self._on_policy is not None and self._on_policy.replaces(step, self.state.max_steps):
            with self.plain_student() as student:
                batches = self._on_policy.batches(student, batches, step=step)
            num_items = self._get_num_items_in_batch(batches, device)
        self._batches, self._num_items = batches, 0 if num_items is None else num_items
        counts = [self.objective.tokens_by_term(on_host(batch)) for batch in batches]
        self._term_tokens = [sum(of_term) for of_term in zip(*counts, strict=True)]
        return batches, num_items

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
        host = on_host(inputs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(documents_known(host, self.args.device))
            signals = self._wiring.teacher(inputs)
            if self._wiring.teacher_head is not None:
                stack.enter_context(gathered(self._wiring.teacher_head))
            if self._wiring.prefix is not None:
                dtype = next(p for p in model.parameters() if p.requires_grad).dtype
                stack.enter_context(self._wiring.prefix.replaying(dtype))
            # the student's forward is the objective's: sums over this micro-batch's tokens, no means
            loss_sum, sums = model(**{name: inputs[name] for name in INPUTS}, signals=signals, on_host=host)
        num_terms = len(self.objective.terms)
        self._step_sums[:num_terms] += sums[:num_terms] / num_items_in_batch
        # agreement is asked of every so many tokens: counts, no means
        self._step_sums[num_terms:] += sums[num_terms:]
        loss = loss_sum * (world_size() / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """DeepSpeed has clipped; it is asked for the norm below."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Kept for ``end_step``: to log it the Trainer would wait for the device here."""
        engine: Any = model
        # float16 finds its scale by steps that overflow: those are skipped, and the next one is tried with another
        scaled = engine.fp16_enabled() or self._autocast_dtype is torch.float16
        skipped = scaled and getattr(engine.optimizer, "overflow", False)
        self._gradient_norm = None if skipped else engine.get_global_grad_norm()

    def end_step(self) -> bool:
        """Sum the step's curves over ranks, and refuse a step that is not sound before anything of it is saved; whether
        any rank was asked to stop.

        Here the host waits for the device, once per optimizer step: a later look would let a step that is no number
        into a checkpoint, and what the device could have begun meanwhile is the beginning of the next step. Sums, norm
        and the wish to stop come over together. DeepSpeed and, where it logs, the Trainer have waits of their own.
        """
        step, terms = self.state.global_step, self.objective.terms
        # the last number is, after the sum over ranks, whether anyone was asked to stop
        numbers = [*self._term_tokens, float(self._stop.reason is not None)]
        sums = torch.cat([self._step_sums, *(self._step_sums.new_full((1,), number) for number in numbers)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        gradient_norm = 0.0 if self._gradient_norm is None else self._gradient_norm
        *counts, stopped, num_items, norm = _numbers(sums, self._num_items, gradient_norm)
        self._step_sums = self._zero_sums()
        if not num_items:
            raise UserError(f"step {step}: its batch holds no supervised token; raise distill.batch_size")
        means = counts[: len(terms)]
        # of the step's supervised tokens those that a term learns from
        shares = [number / num_items for number in counts[len(terms) + 2 :]]
        loss = sum(term.weight * value for term, value in zip(terms, means, strict=True))
        values = {"loss": loss, **dict(zip(term_names(terms), means, strict=True))}
        if self._gradient_norm is not None:
            self._gradient_norm = norm
            # DeepSpeed calls one that is no number -1 or infinite, depending on the stage, and goes on
            values["the norm of the gradient"] = norm if 0 <= norm < math.inf else math.nan
        if problem := self._guard.problem(values):
            raise refuse_step(problem, step, self._batches, Path(str(self.args.output_dir)).parent / "refused")
        own_means = [mean / share if share else None for mean, share in zip(means, shares, strict=True)]
        self.objective.end_step(own_means, step=step, num_steps=self.state.max_steps)
        now = [*counts[: len(terms) + 2], *shares]
        self._window_sums = [before + added for before, added in zip(self._window_sums, now, strict=True)]
        if stopped:
            self._stop.ask("another rank was asked to stop")
        return stopped > 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every loss term, averaged over steps and over the tokens of all ranks that it learns from, to what is
        logged; one that has learnt from none since the last time is not there."""
        steps = self.state.global_step - self._steps_logged
        if "loss" in logs and steps > 0:
            names = term_names(self.objective.terms)
            sums, (matches, compared, *shares) = self._window_sums[: len(names)], self._window_sums[len(names) :]
            logs |= {name: value / share for name, value, share in zip(names, sums, shares, strict=True) if share}
            if compared:
                logs[AGREEMENT] = matches / compared
            logs |= self.objective.curves()
            logs |= self._rate.read(steps * self._tokens_per_step)
            if self._peak_tokens_per_s is not None:
                logs[PEAK_SHARE] = logs["tokens_per_s"] / self._peak_tokens_per_s
            if self._gradient_norm is not None:
                logs["grad_norm"] = float(self._gradient_norm)  # a number since the step's end
            self._window_sums = [0.0] * len(self._window_sums)
            self._steps_logged = self.state.global_step
        super().log(logs, start_time)

    def watch_with(self, watcher: Watcher, score: Scorer) -> None:
        """Let ``watcher`` score the student now and then."""

        def scored() -> Mapping[str, Score]:
            with self._rate.paused(), doing("scoring the student"), self.plain_student() as student:
                return score(student)

        def logged(values: dict[str, float]) -> None:
            wanted = self.control.should_log
            self.log(values)
            self.control.should_log = wanted  # the step's own values are still to come

        watcher.score, watcher.log, watcher.state = scored, logged, self.student_state
        self.add_callback(watcher)

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
                if is_main():
                    write_json(folder / OBJECTIVE_FILE, self.objective.state())
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
        history = [row for row in self.state.log_history if "loss" in row]
        self._guard.remember([row["loss"] for row in history])
        self._rate = _Rate(history[-1]["seconds"] if history else 0.0)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        self.objective.load_state(json.loads((folder / OBJECTIVE_FILE).read_text()))

    def student_state(self) -> dict[str, Tensor] | None:
        """The student's whole state dict on rank 0's CPU, None elsewhere; every rank calls this (ZeRO-3 gathers).

        Without the second name of a tied weight: gathering makes copies, which would be saved twice.
        """
        state: Any = self.accelerator.get_state_dict(self.model_wrapped)
        if not is_main():
            return None
        student: Any = self.model
        return {name: weight for name, weight in state.items() if name not in student.all_tied_weights_keys}


class _Rate:
    """Seconds of training and tokens per second, without the time for scoring and saving."""

    def __init__(self, seconds_before: float = 0.0) -> None:
        self._seconds_before = seconds_before
        self._started = self._read_at = time.monotonic()

    def read(self, num_tokens: int) -> dict[str, float]:
        """Curves for ``num_tokens`` since the last reading."""
        now = time.monotonic()
        values = {
            "seconds": self._seconds_before + now - self._started,
            "tokens_per_s": num_tokens / max(now - self._read_at, 1e-9),
        }
        self._read_at = now
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile is no training."""
        began = time.monotonic()
        try:
            yield
        finally:
            away = time.monotonic() - began
            self._started += away
            self._read_at += away


class _StepEnds(TrainerCallback):
    """After every step: its curves, and whether any rank was asked to stop: finish it on all ranks, save, return."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        keep_gradient_norm(self._trainer.model_wrapped)
        reduce_in_parts(self._trainer.model_wrapped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.end_step() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


def _numbers(values: Tensor, *more: Tensor | float) -> list[float]:
    """All of them as numbers, for which the host waits once."""
    on_device = (
        value.to(values.device, values.dtype, non_blocking=True)
        if isinstance(value, Tensor)
        else values.new_full((), value)
        for value in more
    )
    return torch.cat([values, *(value.reshape(1) for value in on_device)]).tolist()
