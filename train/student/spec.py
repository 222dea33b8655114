"""One training, described once: all that assembling, preflight, the dry run and the estimates of time read of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.machine import ranks_on_this_node
from shoal.models.anatomy import text_config
from shoal.models.attention import without_kernels
from shoal.models.load import Checkpoint
from shoal.ranks import world_size
from shoal.recipe.distill import Distill, Live, Recorded, sources_that_ask
from shoal.recipe.losses import HiddenStates, needs_teacher, reads_distributions
from shoal.recipe.not_together import not_together
from shoal.recipe.section import Dtype
from shoal.recipe.trainer_arguments import batch_split, num_steps
from shoal.runtime import device

from ..engine.arguments import DeepSpeed, deepspeed_config
from .sizes import built, shapes_only
from .trainable import Trained, keys_from, parts_of, recorded_layers, shares_prefix, trained_parts

TeacherPlace = Literal["none", "live", "offloaded", "recorded"]
"""none: no loss term asks it."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a training."""

    count: int
    """Ranks over all nodes."""
    per_node: int
    """Ranks that share one host."""
    device: torch.device
    """Device of one rank, which stands for the others'."""

    @property
    def machines(self) -> int:
        """Ranks that compute at full speed at one time: those on one CPU share its cores."""
        return self.count if self.device.type != "cpu" else max(1, self.count // self.per_node)

    @classmethod
    def here(cls) -> Ranks:
        """Those that a launcher has started, this one among them."""
        return cls(world_size(), ranks_on_this_node(), device())


@dataclass(frozen=True)
class TrainSpec:
    """One training, told from configurations and the recipe; no weight is read."""

    teacher: Checkpoint
    student: Checkpoint
    plan: Plan
    settings: Distill
    ranks: Ranks
    deepspeed: DeepSpeed
    trained: Trained
    """Parts of the student that are trained."""
    frozen_layers: int
    """Lowest student layers that are the teacher's when training begins, and frozen."""
    shared_layers: int
    """Lowest student layers that the student does not run: a live teacher does for both, or their state is recorded."""
    model: str = ""
    """What the recipe calls the teacher."""
    is_forced: bool = False
    """Whether it starts although memory or disk will not do."""

    @property
    def is_control(self) -> bool:
        """Whether nothing was cut from the model that is trained."""
        return not self.plan.changes_layers

    @property
    def teacher_place(self) -> TeacherPlace:
        """Where the teacher's signals come from."""
        if isinstance(self.settings.teacher, Recorded):
            return "recorded"
        if not needs_teacher(self.settings.terms):
            return "none"
        return "offloaded" if self.settings.teacher.offload else "live"

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher is loaded."""
        return self.teacher_place in ("live", "offloaded")

    @property
    def is_recordable(self) -> bool:
        """Whether recorded signals could take a live teacher's place."""
        return not any(not_together(replace(self.settings, teacher=Recorded())))

    @property
    def live_dtype(self) -> Dtype | None:
        """Precision of a teacher that is loaded, as the recipe names it; None = the recipe's own."""
        return self.settings.teacher.dtype if isinstance(self.settings.teacher, Live) else None

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Precision of a teacher that is loaded."""
        return self.teacher.loaded_dtype(self.live_dtype)

    @property
    def asked_sources(self) -> frozenset[int] | None:
        """Numbers of the sources of whose rows the teacher is asked; None = of all."""
        # states are compared row by row; under ZeRO 3 all ranks gather a layer, whatever rows they have; and what comes
        # over from the host does so for one row too
        of_all = any(isinstance(term, HiddenStates) for term in self.settings.terms)
        of_all |= (self.deepspeed.stage == 3 and self.runs_teacher) or self.teacher_place in ("offloaded", "recorded")
        return None if of_all else sources_that_ask(self.settings)

    @property
    def reads_logits(self) -> bool:
        """Whether a loss term looks at the teacher's distributions."""
        return any(map(reads_distributions, self.settings.terms))

    @property
    def batch_split(self) -> tuple[int, int]:
        """Rows of a micro-batch on one rank, and micro-batches of an optimizer step; raises as batch_split does."""
        return batch_split(self.settings, ranks=self.ranks.count)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks."""
        return self.ranks.count * math.prod(self.batch_split) * self.settings.sequence_length

    @property
    def num_row_tokens(self) -> int:
        """Tokens of all rows: the token budget, rounded up to whole optimizer steps."""
        return math.ceil(self.settings.budget / self.tokens_per_step) * self.tokens_per_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the training."""
        return num_steps(self.settings, self.ranks.count * math.prod(self.batch_split))


def train_spec(teacher: Checkpoint, student: Checkpoint, plan: Plan, settings: Distill, ranks: Ranks) -> TrainSpec:
    """Describe the training of ``student``, which ``plan`` has cut from ``teacher``. What the log should say once per
    training of its settings is said here.

    Raises:
        UserError: DeepSpeed settings that cannot work, or what ``settings`` ask of ``plan`` and it does not have.
    """
    deepspeed = DeepSpeed(deepspeed_config(settings))
    deepspeed.warn_of_optimizer(settings.trainer)
    trained = student_parts(student, plan, settings)
    frozen = shares_prefix(trained, plan)
    if isinstance(settings.teacher, Recorded):
        spared = recorded_layers(trained, plan, settings) if settings.teacher.prefix else 0
    else:
        spared = frozen if needs_teacher(settings.terms) else 0  # else there is nobody to share them with
    return TrainSpec(teacher, student, plan, settings, ranks, deepspeed, trained, frozen, spared)


def require_same_vocabulary(teacher: Checkpoint, student: Checkpoint) -> None:
    """Refuse a student whose next-token distributions cannot be compared with the teacher's."""
    sizes = [text_config(checkpoint.config).vocab_size for checkpoint in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"teacher {teacher.folder} has {sizes[0]:,} vocabulary entries and student {student.folder} has "
            f"{sizes[1]:,}; distillation compares next-token distributions, so prune the student from this teacher"
        )


def student_parts(student: Checkpoint, plan: Plan, settings: Distill) -> Trained:
    """The parts of the student of ``plan`` that are trained."""
    if settings.trainable != "norm_and_head":
        return trained_parts(settings.trainable, plan, keys_from=keys_from(text_config(student.config)))
    # only there it matters whether head and embeddings are one table, which configurations do not say of every family
    with shapes_only():
        attention = without_kernels(student.load.attention, student.config)
        model = built(student.config, dtype=torch.float32, attention=attention)
        return parts_of(model, settings.trainable, plan)
