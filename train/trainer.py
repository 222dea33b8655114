"""The transformers Trainer with a distillation loss in place of the model's own, whatever shares the work: one process,
DistributedDataParallel or DeepSpeed; and the same in a run directory.

Why the Trainer and not a loop of our own: every TrainingArguments setting keeps its meaning, and schedules, W&B,
logging and gradient checkpointing come with it. What it gets wrong for us is overridden here, one method each.

A loss is summed over supervised tokens and divided once, by the number of them in the whole optimizer step, over all
its micro-batches and ranks. So the curve does not depend on how a batch is split.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from shoal.artifacts.evaluation import TaskScore
from shoal.atomic_files import write_json
from shoal.data.packing import IMAGES
from shoal.errors import UserError, explained_disk_errors
from shoal.models.document_masks import documents_known
from shoal.models.load import refuse_broken_weights
from shoal.progress import doing
from shoal.ranks import is_main, world_size
from shoal.recipe.losses import term_names
from shoal.recipe.trainer_arguments import OURS, refuse_warmup
from shoal.runtime import barrier, free_memory, seed_everything, together
from shoal.runtime import device as own_device
from shoal.stopping import ORPHAN_S, SAVE_S, needs

from .callbacks import Scorer, Watcher
from .curves import CurveRow, LossGuard, judged_norm, numbers, refuse_step
from .dataset import StepSampler
from .engine.arguments import kept_checkpoints
from .engine.background import BackgroundWriter
from .engine.checkpoint import commit, layout, own_steps, remove_older, removed_unless_complete, separate_groups
from .engine.sharding import (
    forwards_uncounted,
    gathered,
    keep_gradient_norm,
    place_teacher,
    record_reduced,
    reduce_in_parts,
)
from .engine.stop import StopRequest
from .objective.host_batch import on_host, stacked
from .objective.objective import Signals
from .on_policy import Sampler as OnPolicySampler
from .on_policy import checkpointing_kept, own_forwards
from .student.frozen import share_frozen
from .student.spec import TrainSpec
from .teacher.signals import RecordingReader
from .teacher.wiring import wire

log = logging.getLogger(__name__)

INPUTS = ("input_ids", "position_ids", "labels")
"""Planes that the student's forward takes of a batch; the teacher may read more."""
STEPS_AWAITED = 4
"""Usual steps that one may take, with what is saved after it, where nobody waits for this rank any more."""
OBJECTIVE_FILE = "objective.json"
"""File of what loss terms keep between steps, inside a checkpoint."""
ROW_FILE = "curves.json"
"""File, inside a checkpoint, of what the curves' next row holds so far."""
ON_POLICY_FILE = "on_policy.json"
"""File, inside a checkpoint, of what on-policy steps keep."""


@dataclass(frozen=True)
class Parts:
    """What a training is made of, whoever asks for it."""

    spec: TrainSpec
    student: PreTrainedModel
    """Made trainable."""
    teacher: PreTrainedModel | None
    """One that is to run; None = its signals are recorded, or nobody asks it."""
    tokenizer: PreTrainedTokenizerBase | None
    """Needed by on-policy steps."""
    refused: Path
    """Folder for the batch of a step that is not sound."""
    stop: StopRequest = field(default_factory=StopRequest)
    recorded: RecordingReader | None = None
    """What was recorded of a teacher that is not to run."""
    stored: Set[str] | None = None
    """Names of the tensors in the student's files, which tell frozen weights that it can hold together with the
    teacher; None = it shares none."""


class ObjectiveTrainer(Trainer):
    """Trains a student whose forward is that of an installed shoal.train.objective.objective.Objective."""

    # the loss below is already divided by the token count of the whole optimizer step
    loss_is_scaled_for_ga = True
    mfu_per_rate: float | None = None
    """Share of the GPUs' rates by data sheet that a token per second is; None = they are not known."""

    def __init__(self, parts: Parts, **kwargs: Any) -> None:
        """Join ``parts``; ``kwargs`` are the Trainer's. Then the teacher is in its place.

        Raises:
            UserError: weights that are no numbers, or loss terms that contradict the plan, the models or a recording.
        """
        spec, student, live = parts.spec, parts.student, parts.teacher
        together(lambda: refuse_broken_weights({"student": student, "teacher": live}))
        wiring = wire(spec, student, live, parts.recorded)
        kwargs["args"] = copy.copy(kwargs["args"])  # the Trainer would do both around the loss, not within
        vars(kwargs["args"]).update({**dict.fromkeys(OURS, False), "torch_compile_backend": None})
        super().__init__(model=student, data_collator=stacked, **kwargs)
        objective = wiring.objective
        # makes the Trainer count the tokens of a whole step, over micro-batches and ranks, and hand the count over
        self.model_accepts_loss_kwargs = True
        self.objective = objective
        self._wiring = wiring
        self._on_policy = (
            None
            if parts.tokenizer is None
            else OnPolicySampler.of(spec.settings, student, parts.tokenizer, seed=self.args.seed)
        )
        self._guard = LossGuard(spec.settings.stop_on_spike)
        self.spec, self._parts = spec, parts
        self._batches: list[dict[str, Tensor]] = []
        self.refused: Path | None = parts.refused
        """None = its batch is not kept."""
        self._num_items: Tensor | int = 0
        self._step_sums = self._zero_sums()
        self._term_tokens: list[int] = []
        self._gradient_norm: Tensor | float | None = None
        self._scaler: torch.amp.GradScaler | None = None
        """What scales losses in float16 without ZeRO."""
        self._judged: tuple[list[float], list[float], bool] = [], [], False
        """Of the step that ends: what its terms come to, their shares of its tokens, and whether it is the last."""
        self._all_written = True
        self.row = CurveRow(2 * len(objective.terms), self._guard)
        self._at_first = {name: copy.deepcopy(kept.state()) for name, kept in self._kept().items()}
        self.add_callback(_StepEnds(self))
        if live is not None:
            place_teacher(live, self, offload=spec.teacher_place == "offloaded")
            if parts.stored is not None and spec.deepspeed.stage < 3 and spec.teacher_place == "live":
                student.to(own_device())  # pyright: ignore[reportArgumentType]
                dtype = spec.deepspeed.autocast_dtype
                share_frozen(student, live, spec.plan.keep, autocast_dtype=dtype, stored=parts.stored)

    def begin(self) -> None:
        """Forget what another training of these models kept between its steps."""
        for name, kept in self._kept().items():
            kept.load_state(copy.deepcopy(self._at_first[name]))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # the Trainer's takes a step before it looks whether the one it goes on from was the last
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _zero_sums(self) -> Tensor:
        """Every term's sum over the step's supervised tokens, divided by their number."""
        return torch.zeros(len(self.objective.terms), dtype=torch.float64, device=self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step, kept until it is known to be sound, and their supervised tokens.

        In on-policy steps they are what the student writes now; samples hold other numbers of learnt tokens.
        """
        self.row.step_begins()
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

    @contextlib.contextmanager
    def plain_student(self) -> Iterator[PreTrainedModel]:
        """The student as an ordinary model, whole on every rank, under the precision that it is trained in."""
        from trl.models.utils import unwrap_model_for_generation

        wrapped: Any = self.model_wrapped
        dtype = self.spec.deepspeed.autocast_dtype
        with (
            # TRL asks transformers by old names
            warnings.catch_warnings(action="ignore", category=FutureWarning),
            checkpointing_kept(self.objective.student),
            unwrap_model_for_generation(wrapped, self.accelerator) as model,
            forwards_uncounted(wrapped),
            own_forwards(self.objective.student),
            # DeepSpeed's engine enters autocast in its own forward, which a plain student does not pass through
            torch.autocast(self.args.device.type, dtype, enabled=dtype is not None),
        ):
            yield model  # pyright: ignore[reportReturnType]

    @contextlib.contextmanager
    def taught(self, batch: Mapping[str, Any]) -> Iterator[Signals]:
        """What the teacher says of a micro-batch. Inside, models know its documents, and the head is whole."""
        with contextlib.ExitStack() as stack:
            if IMAGES not in batch:  # its rows are one document each, and the model makes masks of it by itself
                stack.enter_context(documents_known(on_host(batch).position_ids_BS, self.args.device))
            with torch.autocast(self.args.device.type, enabled=False):  # a teacher computes in its own precision
                signals = self._wiring.teacher(batch)
            if self._wiring.teacher_head is not None:
                stack.enter_context(gathered(self._wiring.teacher_head))
            yield signals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's mean loss over all supervised tokens of all ranks.

        Gradients are averaged over ranks, hence the factor world size. ``num_items_in_batch`` is the token count
        of the whole step; averaging each micro-batch over its own tokens would make the loss depend on the split.
        """
        assert num_items_in_batch is not None
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(self.taught(inputs))
            if self._wiring.prefix is not None:
                dtype = next(p for p in model.parameters() if p.requires_grad).dtype
                stack.enter_context(self._wiring.prefix.replaying(dtype))
            # the student's forward is the objective's: sums over this micro-batch's tokens, no means
            loss_sum, sums = model(
                **{name: inputs[name] for name in INPUTS},
                signals=signals,
                on_host=on_host(inputs),
                images=inputs.get(IMAGES),
            )
        if self.objective.student.training:  # else it is evaluated, between the steps
            self._step_sums += sums / num_items_in_batch
        loss = loss_sum * (world_size() / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """DeepSpeed has clipped; it is asked for the norm below."""
        return None if self.is_deepspeed_enabled else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Kept for ``judge_step``: to log it the Trainer would wait for the device here."""
        if not self.is_deepspeed_enabled:
            self._gradient_norm = super()._get_grad_norm(model, grad_norm)
            self._scaler = self.accelerator.scaler  # pyright: ignore[reportAttributeAccessIssue]
            return
        engine: Any = model
        # float16 finds its scale by steps that overflow: those are skipped, and the next one is tried with another
        skipped = engine.fp16_enabled() and getattr(engine.optimizer, "overflow", False)
        self._gradient_norm = None if skipped else engine.get_global_grad_norm()
        self._scaler = engine.torch_autocast_z0_gradscaler

    def judge_step(self, step: int) -> None:
        """Sum the curves of step number ``step`` over ranks, and refuse one that is not sound: before it is applied,
        or under DeepSpeed, which applies it in its backward, before anything of it is saved.

        Here the host waits for the device, once per optimizer step: a later look would let a step that is no number
        into a model or a checkpoint. Sums, norm and the wish to stop come over together. DeepSpeed and, where it logs,
        the Trainer have waits of their own.
        """
        terms = self.objective.terms
        # the last numbers are, after the sum over ranks, how many were asked to stop, and how many write nothing
        of_rank = [*self._term_tokens, float(self._parts.stop.reason is not None), float(self.is_written())]
        sums = torch.cat([self._step_sums, *(self._step_sums.new_full((1,), number) for number in of_rank)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        gradient_norm = 0.0 if self._gradient_norm is None else self._gradient_norm
        *counts, stopped, written, num_items, norm = numbers(sums, self._num_items, gradient_norm)
        self._all_written = written == world_size()
        self._step_sums = self._zero_sums()
        if not num_items:
            raise UserError(
                f"step {step}: no token of this batch is trained on (only prompts?); raise distill.batch_size"
            )
        means = counts[: len(terms)]
        # of the step's supervised tokens those that a term learns from
        shares = [number / num_items for number in counts[len(terms) :]]
        loss = sum(term.weight * value for term, value in zip(terms, means, strict=True))
        values = {"loss": loss, **dict(zip(term_names(terms), means, strict=True))}
        if self._gradient_norm is not None:
            self._gradient_norm = judged_norm(norm, self._scaler)
            if self._gradient_norm is not None:
                values["the norm of the gradient"] = self._gradient_norm
        if problem := self._guard.problem(values):
            self.objective.student.zero_grad()
            raise refuse_step(problem, step, self._batches, self.refused)
        self._judged = means, shares, stopped > 0

    def is_written(self) -> bool:
        """Whether this rank writes nothing while it trains."""
        return True

    def end_step(self) -> bool:
        """Add the step that was judged to the curves; whether any rank was asked to stop."""
        means, shares, stopped = self._judged
        own_means = [mean / share if share else None for mean, share in zip(means, shares, strict=True)]
        self.objective.end_step(own_means, step=self.state.global_step, num_steps=self.state.max_steps)
        self.row.add([*means, *shares])
        if stopped:
            self._parts.stop.ask("another rank was asked to stop")
        return stopped

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every loss term, averaged over steps and over the tokens of all ranks that it learns from, to what is
        logged; one that has learnt from none since the last time is not there."""
        if "loss" in logs and (steps := self.row.num_steps):
            terms = self.objective.terms
            names = term_names(terms)
            sums, shares = self.row.sums[: len(names)], self.row.sums[len(names) :]
            # the Trainer's own sum begins anew where training goes on inside of a row
            logs["loss"] = sum(term.weight * value for term, value in zip(terms, sums, strict=True)) / steps
            logs |= {name: value / share for name, value, share in zip(names, sums, shares, strict=True) if share}
            logs |= self.objective.curves()
            if self._on_policy is not None:
                logs |= self._on_policy.counts.read_curves()
            logs["seconds"] = self.row.seconds
            logs["tokens_per_s"] = steps * self.spec.tokens_per_step / max(self.row.row_seconds, 1e-9)
            if self.mfu_per_rate is not None:
                logs["mfu"] = self.mfu_per_rate * logs["tokens_per_s"]
            if self._gradient_norm is not None:
                logs["grad_norm"] = float(self._gradient_norm)  # a number since the step's end
            self.row.begin()
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            refuse_warmup(vars(self.args), num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if num_training_steps == 1 and not any(scheduler.get_last_lr()) and is_main():
            log.warning(
                "the training has a single step, and its warm-up starts at a learning rate of 0, so nothing is "
                "trained; raise num_tokens, or set warmup_steps of the trainer to 0"
            )
        return scheduler

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Loss and teacher read columns that the student's own forward does not have."""
        return data_collator

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if is_main():
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            for name, kept in self._kept().items():
                write_json(folder / name, kept.state())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        for name, kept in self._kept().items():
            file = Path(checkpoint) / name
            if not file.is_file():
                raise UserError(f"{checkpoint}: {name} is missing; resume from a checkpoint of this trainer")
            kept.load_state(json.loads(file.read_bytes()))

    def _kept(self) -> dict[str, Any]:
        """What keeps a state between steps, by its file inside a checkpoint."""
        counts = {} if self._on_policy is None else {ON_POLICY_FILE: self._on_policy.counts}
        return {OBJECTIVE_FILE: self.objective, ROW_FILE: self.row, **counts}


class DistillTrainer(ObjectiveTrainer):
    """Trains, under DeepSpeed, in RUN_DIR/checkpoints."""

    def __init__(self, parts: Parts, *, identity: dict[str, Any], **kwargs: Any) -> None:
        """``identity`` is what a checkpoint must have in common with the run that goes on from it; ``kwargs`` are the
        Trainer's."""
        super().__init__(parts, **kwargs)
        self._identity = identity
        self._writer: BackgroundWriter | None = None
        self._unfinished: Path | None = None
        """Folder of the checkpoint that is being written."""

    def train_on_objective(self, resume: Path | None) -> None:
        """Train to the end, or a stop, on the objective, which goes out of force then: what is told of memory rests on
        models as they are."""
        self.objective.install()
        try:
            self.train(resume_from_checkpoint=None if resume is None else str(resume))
            self.finish_saving()
        finally:
            if self._writer is not None:
                self._writer.end()
            if self._unfinished is not None and is_main():  # of a training that failed, for memory say
                shutil.rmtree(self._unfinished, ignore_errors=True)
            self.objective.uninstall()

    def watch_with(self, watcher: Watcher, score: Scorer) -> None:
        """Let ``watcher`` score the student now and then."""

        def scored() -> Mapping[str, TaskScore]:
            with doing("scoring the student"), self.plain_student() as student:
                scores = score(student)
            free_memory()  # of other sizes than what training takes, so it would lie there in pieces
            return scores

        def logged(values: dict[str, float]) -> None:
            wanted = self.control.should_log
            self.log(values)
            self.control.should_log = wanted  # the step's own values are still to come

        watcher.score, watcher.log, watcher.state = scored, logged, self.student_state
        self.add_callback(watcher)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        # packing has drawn the order already; the same global batches for every number of ranks follow from it
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        spec = self.spec
        if spec.asked_sources is None or rows.sources_NS is None:
            return SequentialSampler(rows)
        # rows of sources that ask hold no others
        asks_N = np.isin(rows.sources_NS[:, 0].numpy(), [*spec.asked_sources])
        per_micro_batch, micro_batches = spec.batch_split
        return StepSampler(asks_N, rows=per_micro_batch, ranks=spec.ranks.count, micro_batches=micro_batches)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing inside checkpoints: DeepSpeed's files hold the weights; `distilled/` is written once, at the end."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.finish_saving()
        needs(SAVE_S)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if is_main() and folder.exists():  # an unfinished or damaged one of an earlier life
            shutil.rmtree(folder)
        barrier()
        if self._writer is None:
            engine: Any = self.model_wrapped
            self._writer = BackgroundWriter(engine.checkpoint_engine.save)
            engine.checkpoint_engine.save = self._writer.save
        saving = doing(f"saving {folder.name}")
        with removed_unless_complete(folder), explained_disk_errors(folder), saving:
            super()._save_checkpoint(model, trial)
        self._unfinished = folder

    def is_written(self) -> bool:
        return self._writer is None or self._writer.is_done()

    def judge_step(self, step: int) -> None:
        try:
            super().judge_step(step)
        except UserError:  # of all ranks alike: the step before it is kept
            self.finish_saving()
            raise

    def end_step(self) -> bool:
        is_stopped = super().end_step()
        if self._all_written:
            self.finish_saving()
        return is_stopped

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on the disk, and let it count; every rank calls this."""
        folder, self._unfinished = self._unfinished, None
        if folder is None:
            return
        assert self._writer is not None
        needs(SAVE_S)
        saving = doing(f"saving {folder.name}")
        with removed_unless_complete(folder), explained_disk_errors(folder), saving:
            commit(folder, self._identity, zero_stage=self.spec.deepspeed.stage, written=self._writer.wait())
        if is_main():
            remove_older(folder.parent, keep=kept_checkpoints(self.spec.settings))
        needs(ORPHAN_S)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        zero: Any = self.args.hf_deepspeed_config
        universal = zero.config.get("checkpoint", {}).get("load_universal", False)
        if checkpoint is None or not universal:
            return
        engine: Any = self.model_wrapped
        if zero.config["zero_optimization"]["stage"] == 3:
            separate_groups(engine.optimizer.optimizer, Path(checkpoint))
        own_steps(engine.optimizer.optimizer)

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
        gathers = self.spec.deepspeed.stage == 3
        # every rank's copy would lie in the memory of its node
        state: Any = self.accelerator.get_state_dict(self.model_wrapped) if gathers or is_main() else None
        if not is_main():
            return None
        student: Any = self.model
        return {name: weight for name, weight in state.items() if name not in student.all_tied_weights_keys}


class _StepEnds(TrainerCallback):
    """After every step: its curves, and whether any rank was asked to stop: finish it on all ranks, save, return."""

    def __init__(self, trainer: ObjectiveTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.is_deepspeed_enabled:
            keep_gradient_norm(self._trainer.model_wrapped)
            reduce_in_parts(self._trainer.model_wrapped)
            record_reduced(self._trainer.model_wrapped)
        if not state.global_step:
            self._trainer.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = self._trainer.row.seconds / max(1, state.global_step)
        needs(max(ORPHAN_S, STEPS_AWAITED * seconds))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._trainer.is_deepspeed_enabled:
            self._trainer.judge_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.is_deepspeed_enabled:
            self._trainer.judge_step(state.global_step)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # the last row of the curves may be of fewer steps
        if self._trainer.end_step() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
