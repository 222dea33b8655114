"""The distillation loss for a Trainer script: models and data set in memory, TrainingArguments, no recipe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from peft import LoraConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler as RowSampler
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.data.packing import PackedRows
from shoal.data.sources import Given, is_source, is_stream, sources_of
from shoal.data.streams import pack
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, require_gradients, require_positions
from shoal.models.document_masks import IN_TRAINING, warn_of_mixed_documents
from shoal.models.in_memory import Model, as_model, checkpoint_of, name_of, require_tokenizer
from shoal.ranks import world_size
from shoal.recipe.distill import Distill, Lora
from shoal.recipe.losses import HiddenStates
from shoal.recipe.trainer_arguments import precisions_said

from .engine.arguments import refuse_mismatches, resolved_deepspeed
from .engine.distillation_config import DistillationConfig, as_lora, section_of, setting
from .engine.sharding import compile_no_collectives
from .objective.objective import output_head
from .student.known_cut import Drop, known_plan, known_width, refuse_other_layers, refuse_swapped
from .student.lora import adapted_modules, merge_adapters
from .student.spec import Ranks, TrainSpec, require_same_vocabulary, train_spec
from .teacher.wiring import make_trainable
from .trainer import ObjectiveTrainer, Parts

log = logging.getLogger(__name__)

ONLY_DEPTH = ("all", "layers")
"""Choices of ``trainable`` for which it does not matter which layers are gone."""


class Further(TypedDict, total=False):
    """What else a DistillationTrainer takes by name."""

    callbacks: list[TrainerCallback] | None
    """Callbacks, added to the Trainer's own."""
    optimizers: tuple[Optimizer | None, LRScheduler | None]
    """Optimizer and schedule in place of those of ``args``."""
    drop: Drop | None
    """Layers of the teacher that were dropped, counted from 0, or a plan. Losses on hidden states need them, and any
    ``trainable`` except `all` and `layers`. Default: those that shoal stored in the student's configuration."""


class DistillationTrainer(ObjectiveTrainer):
    """transformers' Trainer with shoal's losses and the arguments of TRL's trainer of the same name.

    All settings, also those of DeepSpeed (ZeRO 0 to 3), are in ``args``. Checkpoints are those of the Trainer;
    `resume_from_checkpoint` resumes. For ZeRO 3 create ``args`` first and load both models after them. Documents are
    packed into rows of ``args.sequence_length`` tokens and isolated from each other. A batch counts rows. The log has
    the loss and each of its terms, in nats per trained token. Outside training and evaluation, ``model`` is an ordinary
    model.

    Example:
        >>> args = shoal.DistillationConfig("distilled", losses=["forward_kl", "cross_entropy"], max_steps=2)
        >>> trainer = shoal.DistillationTrainer(student, model, args, dataset, processing_class=tokenizer)
        >>> trainer.train()
    """

    def __init__(
        self,
        model: Model,
        teacher_model: Model | None = None,
        args: DistillationConfig | TrainingArguments | None = None,
        train_dataset: Given | PackedRows | None = None,
        eval_dataset: Given | PackedRows | Mapping[str, Given | PackedRows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | Lora | None = None,
        **further: Unpack[Further],
    ) -> None:
        """Freeze the untrained weights, move the teacher to the device and pack the data.

        Args:
            model: The student, trained in place. A name loads it in float32. Use float32 weights, and ``args.bf16``
                for speed: plain bfloat16 weights lose small steps to rounding.
            teacher_model: The model before pruning, in any precision, or its name. None if no loss needs a teacher.
            args: Settings. Plain TrainingArguments get DistillationConfig's defaults for losses and data.
            train_dataset: Texts, rows or the name of a data set, read once per epoch. Rows of shoal.data.streams.pack
                keep their order.
            eval_dataset: The same, or a mapping of names to data sets. `eval_loss` is the mean over evaluation batches
                of the loss per trained token; with unequal batches it differs from the mean over all tokens.
            processing_class: The tokenizer of both models. Default: the one with the name of ``model``.
            peft_config: LoRA adapters; merge_adapters() adds them to the weights.
            further: callbacks, optimizers, and drop (the dropped layers, or a plan).

        Raises:
            UserError: models that do not belong together or share weights, unknown settings, arguments without an
                effect, or data that cannot be read.
        """
        _refuse_unknown(further)
        model, teacher = _loaded(model, teacher_model, args)
        args = args or DistillationConfig(f"{Path(name_of(model)).name}-distilled")
        section = _checked(model, teacher, args, peft_config)
        spec = _spec(model, teacher, section, further.get("drop"))
        is_packed = all(isinstance(rows, PackedRows | None) for rows in (train_dataset, eval_dataset))
        is_needed = section.on_policy is not None or not is_packed
        tokenizer = require_tokenizer(processing_class, model) if is_needed or processing_class else None
        trains = setting(args, "trainable") is not None or section.lora is not None
        _make_ready(model, teacher, spec, args, trains=trains)
        is_named = isinstance(eval_dataset, Mapping) and not is_source(eval_dataset)
        several: Any = eval_dataset if is_named else {"eval_dataset": eval_dataset}
        train_rows = _rows("train_dataset", train_dataset, args, section, tokenizer)
        rows = {name: _rows(name, dataset, args, section, tokenizer) for name, dataset in several.items()}
        self._in_order = isinstance(train_dataset, PackedRows)
        self._is_installed = False
        self._prepared_forward: Any = None
        live, refused = teacher if spec.runs_teacher else None, Path(str(args.output_dir)) / "refused"
        super().__init__(
            Parts(spec, model, live, tokenizer, refused=refused),
            args=args,
            train_dataset=train_rows,
            eval_dataset=rows if is_named else rows["eval_dataset"],
            processing_class=tokenizer,
            callbacks=further.get("callbacks"),
            optimizers=further.get("optimizers", (None, None)),
        )
        if teacher is not None and train_rows is not None:
            planes, precision = (train_rows.input_ids_NS, train_rows.position_ids_NS), spec.deepspeed.autocast_dtype
            warn_of_mixed_documents(teacher, *planes, IN_TRAINING, autocast_dtype=precision)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer.train."""
        with self._objective_in_force():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer.evaluation_loop."""
        with self._objective_in_force():
            return super().evaluation_loop(*args, **kwargs)

    def merge_adapters(self) -> None:
        """Add the LoRA adapters to the weights and remove them, so that the model is a plain one again."""
        merge_adapters(self.objective.student)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like Trainer.save_model.

        Raises:
            UserError: the model still has adapters; call merge_adapters() first.
        """
        if not _internal_call and adapted_modules(self.objective.student):
            raise UserError("save_model: the model has adapters; call merge_adapters() first")
        super().save_model(output_dir, _internal_call)

    def _get_train_sampler(self, train_dataset: Any = None) -> RowSampler | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows) if self._in_order else super()._get_train_sampler(train_dataset)

    @contextmanager
    def _objective_in_force(self) -> Iterator[None]:
        """The student's forward is the objective's, with what accelerate has put around it, until the block ends."""
        if self._is_installed:
            yield
            return
        student: Any = self.objective.student
        self.objective.install()
        if self._prepared_forward is not None:
            student.forward = self._prepared_forward
        self._is_installed = True
        try:
            yield
        finally:
            self._is_installed = False
            self._prepared_forward = student.forward
            self.objective.uninstall()
            vars(student).pop("_original_forward", None)  # accelerate's, which would put the objective back


def _refuse_unknown(further: Mapping[str, Any]) -> None:
    if unknown := next((name for name in further if name not in Further.__annotations__), None):
        raise UserError(
            f"shoal.DistillationTrainer: {unknown}: is an unknown argument; known are "
            f"{', '.join(Further.__annotations__)}, and settings of training, loss and data belong in "
            "args=shoal.DistillationConfig(...)"
        )


def _loaded(
    model: Model, teacher: Model | None, args: TrainingArguments | None
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Both models, loaded where they are named."""
    settings = None if args is None else setting(args, "teacher_model_init_kwargs")
    if settings and not isinstance(teacher, str):
        raise UserError("args.teacher_model_init_kwargs: applies only to a teacher given by name; remove it")
    student = as_model(model, dtype="float32", is_placed=False)
    if teacher is not None:
        teacher = as_model(teacher, "teacher_model", is_placed=False, **settings or {})
        refuse_swapped(student, teacher)
    return student, teacher


def _checked(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    args: TrainingArguments,
    peft_config: LoraConfig | Lora | None,
) -> Distill:
    """The section of a recipe that says the same of these models; ``args`` are completed."""
    if args.n_gpu > 1:
        raise UserError(
            f"args.n_gpu: one process would hold {args.n_gpu} GPUs; start one for each (torchrun, accelerate launch), "
            "or set CUDA_VISIBLE_DEVICES"
        )
    _complete_deepspeed(args)
    require_gradients(model)
    for module in (model, output_head(model)):
        if getattr(module.forward, "__func__", None) is not type(module).forward:
            raise UserError(
                f"model: the forward of its {type(module).__name__} is replaced, and the loss needs that place; load "
                "the model without device_map, and remove patches of this forward"
            )
    section = _section(args, peft_config)
    for own in (model, teacher):
        if own is not None:
            require_positions(own.config, section.sequence_length, "distill.sequence_length")
    return section


def _make_ready(
    model: PreTrainedModel, teacher: PreTrainedModel | None, spec: TrainSpec, args: TrainingArguments, *, trains: bool
) -> None:
    """Freeze the teacher, and of the student what is not trained where ``trains`` says so."""
    if teacher is not None:
        # sharded ones are empty
        places = {parameter.data_ptr() for parameter in teacher.parameters() if parameter.numel()}
        for name, parameter in model.named_parameters():
            if parameter.numel() and parameter.data_ptr() in places:
                raise UserError(
                    f"model: shares the weights of {name} with the teacher, so training would change both; pass a "
                    "copy, for example from shoal.cut_model"
                )
        refuse_other_layers(model, teacher, spec.frozen_layers)
        teacher.requires_grad_(False)
    if trains:
        make_trainable(model, spec, seed=args.seed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model: no weight requires a gradient; set trainable, or call requires_grad_()")
    _warn_of_half_precision(model, args)


def _rows(
    name: str,
    dataset: Given | PackedRows | None,
    args: TrainingArguments,
    section: Distill,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PackedRows | None:
    """The data of the argument ``name`` in rows: all of them once, or of what may have no end as much as
    ``args.max_steps`` take."""
    if dataset is None or isinstance(dataset, PackedRows):
        return dataset
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size() * section.sequence_length
    may_repeat = is_source(dataset) and name == "train_dataset"
    is_endless = args.max_steps > 0 and (is_stream(dataset) or may_repeat)
    budget = args.max_steps * step if is_endless else None
    return pack(
        sources_of(dataset, name=name, loss_on=setting(args, "loss_on"), num_tokens=budget),
        tokenizer,
        sequence_length=section.sequence_length,
        num_tokens=budget,
        seed=args.seed if args.data_seed is None else args.data_seed,
        packing=section.packing,
    )


def _section(args: TrainingArguments, peft_config: LoraConfig | Lora | None) -> Distill:
    """The section of a recipe that says the same."""
    section = section_of(args, as_lora(peft_config))
    config = resolved_deepspeed(args)
    if config is not None and precisions_said(config):
        precision = "auto"  # which leaves it to the configuration
    else:
        precision = "bf16-mixed" if args.bf16 else "fp16-mixed" if args.fp16 else "float32"
    return replace(section, precision=precision, deepspeed=config, watch=None)


def _spec(model: PreTrainedModel, teacher: PreTrainedModel | None, section: Distill, drop: Drop | None) -> TrainSpec:
    """The training of ``model``, whose teacher's layers ``drop`` are gone."""
    student = checkpoint_of(model)
    original = student if teacher is None else checkpoint_of(teacher)
    require_same_vocabulary(original, student)
    plan = known_plan(model, teacher or model, drop)
    if plan is None:
        kept, num_layers = len(decoder_layers(model)), len(decoder_layers(teacher or model))
        reads_drop = section.trainable not in ONLY_DEPTH or any(isinstance(t, HiddenStates) for t in section.terms)
        if reads_drop and kept != num_layers:
            raise UserError(
                f"drop: trainable {section.trainable!r} or a loss on states needs the teacher's layers (of "
                f"{num_layers}) that the student lacks; pass them, for example drop=plan.drop"
            )
        # nobody reads more of them than how many there are
        gone, width = tuple(range(kept, num_layers)), known_width(model, teacher or model)
        plan = Plan(Provenance({}), num_layers, gone, reason="not known", width=width)
    spec = replace(train_spec(original, student, plan, section, Ranks.here()), model=name_of(teacher or model))
    if spec.runs_teacher and teacher is None:
        raise UserError("teacher_model: is missing, and the losses compare the student with a teacher; pass one")
    if (lora := section.lora) is not None and (lora.load_in_4bit or spec.deepspeed.stage == 3):
        raise UserError(
            "peft_config: 4-bit weights and ZeRO 3 can only merge adapters with the student's files; set "
            "load_in_4bit: false and ZeRO 0 to 2, or pass a complete recipe to shoal.run"
        )
    return spec


def _complete_deepspeed(args: TrainingArguments) -> None:
    """What a DeepSpeed configuration does not say is as in the arguments: DeepSpeed would refuse a batch that it does
    not know, and clip no gradient."""
    if (config := resolved_deepspeed(args)) is not None:
        config.setdefault("train_micro_batch_size_per_gpu", args.per_device_train_batch_size)
        config.setdefault("gradient_accumulation_steps", args.gradient_accumulation_steps)
        config.setdefault("gradient_clipping", args.max_grad_norm)
        told: Any = args.hf_deepspeed_config
        refuse_mismatches(told, "args.deepspeed")
        compile_no_collectives()


def _warn_of_half_precision(model: PreTrainedModel, args: TrainingArguments) -> None:
    """DeepSpeed keeps float32 copies of such weights where it is told to train in half precision."""
    halves = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} - {torch.float32}
    config = resolved_deepspeed(args) or {}
    if halves and not any(config.get(section, {}).get("enabled") for section in ("bf16", "fp16")):
        log.warning(
            "model: its weights are %s, which rounds away steps at usual learning rates; load it with "
            "dtype='float32', and set bf16=True for the speed",
            str(min(halves, key=str)).removeprefix("torch."),
        )
