"""The distillation loss for a Trainer script: models and data set in memory, TrainingArguments, no recipe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler as RowSampler
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.data.packing import PackedRows
from shoal.data.sources import Dataset, documents_of
from shoal.data.streams import pack
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.models.document_masks import IN_TRAINING, warn_of_mixed_documents
from shoal.models.in_memory import checkpoint_of, name_of, require_positions, require_tokenizer, require_usable
from shoal.recipe.deepspeed_file import precisions_said
from shoal.recipe.distill import Distill, Trainable
from shoal.recipe.distill_contradictions import contradictions
from shoal.recipe.losses import LossTerm, StateTerm
from shoal.recipe.messages import of_arguments
from shoal.recipe.not_together import not_together

from .engine.arguments import BATCH_SPLIT, refuse_mismatches, resolved_deepspeed
from .engine.sharding import compile_no_collectives
from .objective.objective import output_head
from .student.known_cut import Drop, known_plan, known_width, refuse_other_layers
from .student.lora import adapted_modules, merge_adapters
from .student.spec import Ranks, TrainSpec, require_same_vocabulary, train_spec
from .student.trainable import keep_zeros
from .teacher.wiring import make_trainable
from .trainer import ObjectiveTrainer, Parts

log = logging.getLogger(__name__)

Losses = str | Mapping[str, Any] | LossTerm | Sequence[str | Mapping[str, Any] | LossTerm]
"""One loss term or several, each as its kind (`"forward_kl"`), as a mapping (`{"kind": "jsd", "beta": 0.1}`) or as a
dataclass of shoal.recipe.losses; docs/training/losses.md has all kinds."""
SAME_AS_IN_RECIPE = (
    "sequence_length",
    "packing",
    "head_chunk",
    "on_policy",
    "lora",
    "stop_on_spike",
    "fused",
    "compile",
)
"""Keys of the recipe's section `distill` that mean the same here."""
ONLY_DEPTH = ("all", "layers")
"""Choices of ``trainable`` for which it does not matter which layers are gone."""


@dataclass(frozen=True)
class Given:
    """What else a DistillationTrainer takes by name."""

    callbacks: list[TrainerCallback] | None = None
    """Callbacks besides the Trainer's own."""
    optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None)
    """Optimizer and schedule in place of those of ``args``."""
    losses: Losses = "forward_kl"
    """Terms of the loss, see Losses."""
    drop: Drop | None = None
    """Layers of the teacher that the student lacks (0-based), or the plan that says so, which losses on states and most
    choices of ``trainable`` have to know; None = as the student's configuration says, where shoal has cut it."""
    trainable: Trainable | None = None
    """Weights that are trained, as distill.trainable; None = those that ask for a gradient, and with lora all."""
    loss_on: Literal["assistant", "all"] | None = None
    """Tokens of conversations that are learnt; None = what the assistant says."""


class DistillationTrainer(ObjectiveTrainer):
    """Trains ``model`` on ``teacher`` by shoal's objective, and is used as the trainers of TRL are.

    All settings of the work are those of ``args``, DeepSpeed (ZeRO 0 to 3) among them; checkpoints are the Trainer's
    own, and training goes on from them (`resume_from_checkpoint`). Before ``args`` with ZeRO 3 no model is loaded, so
    that both are sharded as they load. Documents are packed into rows of ``sequence_length`` tokens in which they do
    not see each other; a batch is so many rows. The curves have every loss term besides the sum, in nats per supervised
    token. While it does not train or evaluate, ``model`` is an ordinary model.

    Example:
        >>> trainer = DistillationTrainer(
        ...     model=student,
        ...     teacher=teacher,
        ...     args=TrainingArguments("healed", learning_rate=1e-4, bf16=True),
        ...     train_dataset=dataset,
        ...     processing_class=tokenizer,
        ...     losses=[{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.1}],
        ... )
        >>> trainer.train()
        >>> trainer.save_model()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | PackedRows | None = None,
        eval_dataset: Dataset | PackedRows | Mapping[str, Dataset | PackedRows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> None:
        """Freeze what is not trained, put the teacher on the device and pack the data.

        Args:
            model: The student, trained in place. Weights in float32, with ``args.bf16`` or ``args.fp16`` for the speed:
                steps at usual learning rates are lost in the rounding of plain bfloat16 weights.
            teacher: The model it was cut from, in any precision; frozen. None = the losses ask no teacher.
            args: Training arguments; None = transformers' own in a folder named after the model.
            train_dataset: Texts, or rows with `messages`, `prompt` and `completion`, or `text`, read once per epoch;
                rows that shoal.data.streams.pack has made are taken in their order.
            eval_dataset: The same, or several by name; gives `eval_loss`, the objective per learnt token of an
                evaluation batch, and its mean over these, which is not that over tokens where rows have unequal ones.
            processing_class: The tokenizer of both models.
            settings: What Given lists, and keys of the recipe's section `distill`, with its defaults: sequence_length
                (tokens of one row), packing (how rows are filled), head_chunk, on_policy, and lora, whose adapters
                merge_adapters() makes plain weights of. stop_on_spike is off by default.

        Raises:
            UserError: models that do not belong together or share weights, unknown settings, arguments that would be
                ignored, or data that cannot be read.
        """
        given = Given(**{each.name: settings.pop(each.name) for each in fields(Given) if each.name in settings})
        args = args or TrainingArguments(f"{Path(name_of(model)).name}-distilled")
        section = _checked(model, teacher, args, given, settings)
        spec = _spec(model, teacher, section, given.drop)
        tokenizer = None if processing_class is None else require_tokenizer(processing_class)
        _make_ready(model, teacher, spec, args, trains=given.trainable is not None or section.lora is not None)
        is_named = isinstance(eval_dataset, Mapping)
        several: Any = eval_dataset if is_named else {"eval_dataset": eval_dataset}
        how = args, section, tokenizer, given.loss_on
        train_rows, rows = _rows({"train_dataset": train_dataset}, *how)["train_dataset"], _rows(several, *how)
        self._in_order = isinstance(train_dataset, PackedRows)
        self._is_installed = False
        self._prepared_forward: Any = None
        live = teacher if spec.runs_teacher else None
        refused = Path(str(args.output_dir)) / "refused"
        super().__init__(
            Parts(spec, model, live, tokenizer, refused=refused),
            args=args,
            train_dataset=train_rows,
            eval_dataset=rows if is_named else rows["eval_dataset"],
            processing_class=tokenizer,
            callbacks=given.callbacks,
            optimizers=given.optimizers,
        )
        if teacher is not None and train_rows is not None:
            planes, precision = (train_rows.input_ids_NS, train_rows.position_ids_NS), spec.deepspeed.autocast_dtype
            warn_of_mixed_documents(teacher, *planes, IN_TRAINING, autocast_dtype=precision)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        with self._objective_in_force():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        with self._objective_in_force():
            return super().evaluation_loop(*args, **kwargs)

    def merge_adapters(self) -> None:
        """Make plain weights of what adapters have learnt, so that the model is what it was before, trained."""
        merge_adapters(self.objective.student)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's.

        Raises:
            UserError: the model has adapters, which no plain checkpoint holds.
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


def _checked(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    args: TrainingArguments,
    given: Given,
    settings: Mapping[str, Any],
) -> Distill:
    """The section of a recipe that says the same of these models; ``args`` are completed."""
    models = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    for name, own in models.items():
        require_usable(own, name)
    _refuse_arguments(args)
    _complete_deepspeed(args)
    _refuse_replaced(model)
    section = _section(args, losses=given.losses, trainable=given.trainable or "all", **settings)
    for own in models.values():
        require_positions(own, section.sequence_length)
    return section


def _make_ready(
    model: PreTrainedModel, teacher: PreTrainedModel | None, spec: TrainSpec, args: TrainingArguments, *, trains: bool
) -> None:
    """Freeze the teacher, and of the student what is not trained where ``trains`` says so."""
    if teacher is not None:
        _refuse_shared(model, teacher)
        refuse_other_layers(model, teacher, spec.frozen_layers)
        teacher.requires_grad_(False)
    if trains:
        make_trainable(model, spec, seed=args.seed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model: none of its weights asks for a gradient; set trainable, or call requires_grad_()")
    keep_zeros(model)
    _warn_of_half_precision(model, args)


def packed(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    section: Distill,
    *,
    seed: int,
    name: str = "dataset",
    loss_on: Literal["assistant", "all"] | None = None,
    num_tokens: int | None = None,
) -> PackedRows:
    """The data as rows of ``section``: all of them once, or as many tokens."""
    documents = documents_of(dataset, name=name, loss_on=loss_on)
    return pack(
        [(documents.source, documents)],
        tokenizer,
        sequence_length=section.sequence_length,
        num_tokens=num_tokens,
        seed=seed,
        packing=section.packing,
    )


def _rows(
    datasets: Mapping[str, Dataset | PackedRows | None],
    args: TrainingArguments,
    section: Distill,
    tokenizer: PreTrainedTokenizerBase | None,
    loss_on: Literal["assistant", "all"] | None,
) -> dict[str, PackedRows | None]:
    seed, rows = args.seed if args.data_seed is None else args.data_seed, dict[str, PackedRows | None]()
    is_needed = section.on_policy is not None or not all(isinstance(d, PackedRows | None) for d in datasets.values())
    if tokenizer is None and is_needed:
        raise UserError("processing_class: is missing; give the tokenizer of the models")
    for name, dataset in datasets.items():
        if dataset is None or isinstance(dataset, PackedRows):
            rows[name] = dataset
        elif tokenizer is not None:
            rows[name] = packed(dataset, tokenizer, section, seed=seed, name=name, loss_on=loss_on)
    return rows


def _section(args: TrainingArguments, *, losses: Losses, trainable: str, **given: Any) -> Distill:
    """The section of a recipe that says the same."""
    named = {"losses": losses, "trainable": trainable}
    section = of_arguments(
        Distill,
        {"stop_on_spike": None, **named, **given},
        taken=(*named, *SAME_AS_IN_RECIPE),
        source="shoal.DistillationTrainer",
        contradictions=lambda section: [*contradictions(section), *not_together(distill=section)],
    )
    config = resolved_deepspeed(args)
    if config is not None and precisions_said(config):
        precision = "auto"  # which leaves it to the configuration
    else:
        precision = "bf16-mixed" if args.bf16 else "fp16-mixed" if args.fp16 else "float32"
    trainer = {name: getattr(args, name) for name in BATCH_SPLIT}
    return replace(section, precision=precision, deepspeed=config, watch=None, trainer=trainer)


def _spec(model: PreTrainedModel, teacher: PreTrainedModel | None, section: Distill, drop: Drop | None) -> TrainSpec:
    """The training of ``model``, whose teacher's layers ``drop`` are gone."""
    student = checkpoint_of(model)
    original = student if teacher is None else checkpoint_of(teacher)
    require_same_vocabulary(original, student)
    plan = known_plan(model, teacher or model, drop)
    if plan is None:
        kept, num_layers = len(decoder_layers(model)), len(decoder_layers(teacher or model))
        reads_drop = section.trainable not in ONLY_DEPTH or any(isinstance(t, StateTerm) for t in section.terms)
        if reads_drop and kept != num_layers:
            raise UserError(
                f"drop: trainable {section.trainable!r} or a loss on states has to know which of the teacher's "
                f"{num_layers} layers the student lacks; give them, such as drop=plan.drop"
            )
        # nobody reads more of them than how many there are
        gone, width = tuple(range(kept, num_layers)), known_width(model, teacher or model)
        plan = Plan(Provenance({}), num_layers, gone, reason="not known", width=width)
    spec = train_spec(original, student, plan, section, Ranks.here())
    if spec.runs_teacher and teacher is None:
        raise UserError("teacher: is missing, and the losses compare the student with one; give the uncut model")
    if (lora := section.lora) is not None and (lora.load_in_4bit or spec.deepspeed.stage == 3):
        raise UserError(
            "lora: 4-bit weights and ZeRO 3 need the student's files to make plain weights of adapters; set "
            "load_in_4bit: false and ZeRO 0 to 2, or give a whole recipe to shoal.run"
        )
    return spec


def _refuse_arguments(args: TrainingArguments) -> None:
    """Refuse training arguments that would be ignored or be wrong with this loss."""
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    wrong = {
        "label_smoothing_factor": (args.label_smoothing_factor != 0, "the loss is `losses`; leave it out"),
        "use_liger_kernel": (args.use_liger_kernel, "would replace the forward that holds the loss; use `fused`"),
        "torch_compile": (args.torch_compile, "would compile the loss with what surrounds it; use `compile`"),
        "average_tokens_across_devices": (
            not args.average_tokens_across_devices,
            "the loss is always averaged over the tokens of all ranks; leave it out",
        ),
        "gradient_checkpointing_kwargs": (
            args.gradient_checkpointing and checkpointing.get("use_reentrant"),
            "use_reentrant: True loses gradients above frozen layers; set it to False",
        ),
        "fsdp": (bool(args.fsdp), "would shard the head away from the loss; use DeepSpeed's ZeRO instead"),
        "n_gpu": (
            args.n_gpu > 1,
            f"one process would hold {args.n_gpu} GPUs; start one for each (torchrun, accelerate launch), or set "
            "CUDA_VISIBLE_DEVICES",
        ),
    }
    for name, (is_wrong, reason) in wrong.items():
        if is_wrong:
            raise UserError(f"args.{name}: {reason}")


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
            "model: its weights are %s, in whose rounding steps at usual learning rates are lost; load it with "
            "dtype='float32', and set bf16=True for the speed",
            str(min(halves, key=str)).removeprefix("torch."),
        )


def _refuse_replaced(model: PreTrainedModel) -> None:
    for module in (model, output_head(model)):
        if getattr(module.forward, "__func__", None) is not type(module).forward:
            raise UserError(
                f"model: the forward of its {type(module).__name__} is replaced, and the loss has to take that place; "
                "load it without device_map, and leave out what patches it"
            )


def _refuse_shared(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a student that is the teacher, or looks into it: training would move both. Sharded weights are empty."""
    places = {parameter.data_ptr() for parameter in teacher.parameters() if parameter.numel()}
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.data_ptr() in places:
            raise UserError(
                f"model: shares the weights of {name} with the teacher, which would be trained too; give a copy, such "
                "as shoal.cut_model makes"
            )
