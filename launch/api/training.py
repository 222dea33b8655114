"""A cut model in memory, trained on the full one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from shoal.artifacts.training import Training
from shoal.data.sources import Dataset
from shoal.errors import UserError
from shoal.machine import fast_dtype, peak_memory
from shoal.models.anatomy import decoder_layers
from shoal.models.checkpoint_files import KEPT_LAYERS
from shoal.models.in_memory import left_as_it_was, name_of, require_tokenizer, require_usable
from shoal.recipe.deepspeed_file import trained_in
from shoal.recipe.distill import Distill
from shoal.recipe.distill_contradictions import contradictions
from shoal.recipe.messages import of_arguments
from shoal.recipe.not_together import not_together
from shoal.recipe.section import Shapes, shaping
from shoal.runtime import device
from shoal.train.distill import training_of
from shoal.train.distillation_trainer import SAME_AS_IN_RECIPE, DistillationTrainer, packed
from shoal.train.engine.arguments import num_rows, training_arguments
from shoal.train.student.lora import remove_adapters

TAKEN = (*SAME_AS_IN_RECIPE, "batch_size", "trainable", "precision", "trainer")
"""Keys of the recipe's section `distill` that mean the same here, besides those that are named."""


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[PreTrainedModel, Training]:
    """``student``, trained in place to match ``teacher``, and how that went.

    Both models are moved to the accelerator if there is one. The student's weights are trained in float32 and come back
    in their own precision, in eval mode. Nothing is written to the disk; who wants checkpoints, DeepSpeed or an
    evaluation while training uses shoal.DistillationTrainer.

    Args:
        student: The cut model.
        teacher: The model it was cut from, in any precision; left as it was.
        dataset: Texts, or rows (a list of mappings, a `datasets.Dataset`) with `messages`, `prompt` and `completion`,
            or `text`. Of conversations the assistant's tokens are learnt.
        tokenizer: The tokenizer of both.
        num_tokens: Tokens to train on, rounded up to whole steps; a smaller data set is repeated. None = all data once.
        seed: Seed of the order of the data and of all else that is drawn.
        settings: losses, drop and loss_on as shoal.DistillationTrainer takes them, learning_rate (peak of a cosine with
            a tenth of warm-up, 1e-4), and keys of the recipe's section `distill`, with its defaults: sequence_length,
            batch_size (rows of one optimizer step over all processes; None = 4 in each), packing, trainable, lora
            (adapters that are merged in the end), on_policy, stop_on_spike, precision (auto = what the device
            multiplies fast in), head_chunk, and trainer (further arguments of transformers.TrainingArguments).

    Returns:
        The student itself, and a Training: `history` has loss (nats per supervised token) and every term by step,
        `to_pandas()` a row per step.

    Raises:
        UserError: models that do not belong together or share weights, unknown settings, data that hold nothing to
            learn, or a step whose loss is no number.

    Example:
        >>> student, training = shoal.distill(student, model, texts, tokenizer=tokenizer, num_tokens=1_000_000)
        >>> training.to_pandas().plot(x="step", y="loss")
    """
    _refuse_swapped(student, teacher)
    tokenizer = require_tokenizer(tokenizer)
    drop, loss_on = settings.pop("drop", None), settings.pop("loss_on", None)
    section = _section(num_tokens, settings)
    budget = None if num_tokens is None else num_rows(section) * section.sequence_length
    rows = packed(dataset, tokenizer, section, seed=seed, loss_on=loss_on, num_tokens=budget)
    with TemporaryDirectory() as folder, left_as_it_was(teacher), left_as_it_was(student), _in_float32(student):
        arguments = training_arguments(section, None, output_dir=Path(folder), seed=seed)
        same = {name: getattr(section, name) for name in ("losses", "trainable", *SAME_AS_IN_RECIPE)}
        work = DistillationTrainer(student, teacher, arguments, rows, None, tokenizer, drop=drop, **same)
        work.remove_callback(PrinterCallback)
        work.refused = None  # its folder ends with this call
        work.train()
        work.merge_adapters()
        has_budget = num_tokens is not None
        inputs = _inputs(student, teacher, section, seed=seed, rows=rows.fingerprint, has_budget=has_budget)
        training = training_of(work, work.spec, inputs=inputs, rows=rows, peak_memory_bytes=peak_memory())
    return student.eval(), training


def _refuse_swapped(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    require_usable(student, "student")
    require_usable(teacher, "teacher")
    is_cut = [hasattr(model.config, KEPT_LAYERS) for model in (student, teacher)]
    if is_cut == [False, True] and len(decoder_layers(student)) > len(decoder_layers(teacher)):
        raise UserError(
            "shoal.distill: the teacher is a model that shoal has cut, and the student a deeper one that it has not; "
            "give the cut model first"
        )


def _section(num_tokens: int | None, settings: dict[str, Any]) -> Distill:
    named = {"losses": settings.pop("losses", "forward_kl")}
    named |= {} if num_tokens is None else {"num_tokens": num_tokens}
    trainer, learning_rate = settings.get("trainer", {}), settings.pop("learning_rate", 1e-4)
    if isinstance(trainer, Mapping):
        if lost := [name for name in trainer if name.startswith("save_")]:
            raise UserError(f"trainer.{lost[0]}: nothing is saved here; use shoal.DistillationTrainer, or leave it out")
        trainer = {"learning_rate": learning_rate, **trainer, "save_strategy": "no"}
    section = of_arguments(
        Distill,
        {**named, **settings, "trainer": trainer},
        taken=(*named, *TAKEN),
        source="shoal.distill",
        contradictions=lambda section: [*contradictions(section), *not_together(distill=section)],
    )
    precision = trained_in({}, fast_dtype(device()).dtype) if section.precision == "auto" else section.precision
    return replace(section, precision=precision, deepspeed=None, watch=None)


def _inputs(
    student: PreTrainedModel, teacher: PreTrainedModel, section: Distill, *, has_budget: bool, **content: Any
) -> dict[str, Any]:
    """What identifies the training; ``content`` says what the data were."""
    inputs = {
        "model": name_of(teacher),
        "student": name_of(student),
        **content,
        **shaping(section, Shapes.TRAINING, "distill."),
        **{f"distill.trainer.{name}": value for name, value in section.trainer.items()},
    }
    for name in ("distill.data", *(() if has_budget else ("distill.num_tokens",))):
        del inputs[name]
    return inputs


@contextmanager
def _in_float32(student: PreTrainedModel) -> Iterator[None]:
    """The student's weights in float32; after the block in their own precision, without gradients and adapters."""
    dtypes = {parameter: parameter.dtype for parameter in student.parameters()}
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        remove_adapters(student)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
