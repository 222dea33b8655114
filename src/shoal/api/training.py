"""A cut model in memory, trained on the full one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from shoal.artifacts.artifact import PruningPlan, Training
from shoal.data.in_memory import Dataset, documents_of
from shoal.data.sources import pack
from shoal.errors import UserError
from shoal.machine import peak_memory
from shoal.models.in_memory import left_as_it_was, name_of, require_tokenizer, require_usable
from shoal.numerics import fast_dtype
from shoal.recipe import distill as recipe
from shoal.recipe.distill import Distill, Precision, Trainable
from shoal.recipe.messages import checked
from shoal.recipe.section import Packing, Shapes, shaping
from shoal.runtime import device
from shoal.train.distillation_trainer import DistillationTrainer, Losses, as_terms
from shoal.train.engine.arguments import num_rows, training_arguments
from shoal.train.save import training_of


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase,
    losses: Losses = "forward_kl",
    num_tokens: int | None = None,
    sequence_length: int = Distill.sequence_length,
    batch_size: int | None = None,
    learning_rate: float = 1e-4,
    trainable: Trainable = "all",
    drop: Collection[int] | PruningPlan | None = None,
    packing: Packing = "split",
    loss_on: Literal["assistant", "all"] | None = None,
    precision: Precision = "auto",
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
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
        losses: Terms of the loss, by kind or with their settings, see shoal.train.distillation_trainer.Losses.
        num_tokens: Tokens to train on, rounded up to whole steps; a smaller data set is repeated. None = all data once.
        sequence_length: Tokens of one row.
        batch_size: Rows of one optimizer step over all processes; None = 4 in each.
        learning_rate: Peak of a cosine with a tenth of warm-up.
        trainable: Weights that are trained, as distill.trainable.
        drop: Layers of the teacher that the student lacks, or the plan that says so: losses on states need them, and
            every ``trainable`` but `all` and `layers`.
        packing: How rows are filled, as distill.packing.
        loss_on: Tokens of conversations that are learnt; None = what the assistant says.
        precision: Precision of products, as distill.precision; auto = what the device multiplies fast in.
        trainer: Further arguments of transformers.TrainingArguments, as distill.trainer.
        seed: Seed of the order of the data and of all else that is drawn.

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
    require_usable(student, "student")
    require_usable(teacher, "teacher")
    tokenizer = require_tokenizer(tokenizer)
    given = dict(trainer or {})
    if lost := [name for name in given if name.startswith("save_")]:
        raise UserError(f"trainer.{lost[0]}: nothing is saved here; use shoal.DistillationTrainer, or leave it out")
    values = {
        "losses": as_terms(losses),
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "trainable": trainable,
        "packing": packing,
        "precision": fast_dtype(device()).dtype if precision == "auto" else precision,
        "deepspeed": None,
        "watch": None,
        "trainer": {"learning_rate": learning_rate, **given, "save_strategy": "no"},
        **({} if num_tokens is None else {"num_tokens": num_tokens}),
    }
    settings = checked(Distill, values, source="shoal.distill", contradictions=recipe.contradictions)
    documents = documents_of(dataset, loss_on=loss_on)
    rows = pack(
        [(documents.source, documents)],
        tokenizer,
        sequence_length=settings.sequence_length,
        num_tokens=None if num_tokens is None else num_rows(settings) * settings.sequence_length,
        seed=seed,
        packing=settings.packing,
    )
    inputs = {
        "model": name_of(teacher),
        "student": name_of(student),
        "seed": seed,
        "rows": rows.fingerprint,
        **shaping(settings, Shapes.TRAINING, "distill."),
        **{f"distill.trainer.{name}": value for name, value in settings.trainer.items()},
    }
    for name in ("distill.data", *(["distill.num_tokens"] if num_tokens is None else [])):
        del inputs[name]  # `rows` says what it was
    dtypes = {parameter: parameter.dtype for parameter in student.parameters()}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(left_as_it_was(teacher))
        stack.enter_context(left_as_it_was(student))
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        try:
            arguments = training_arguments(settings, None, output_dir=Path(folder), seed=seed)
            work = DistillationTrainer(
                student,
                teacher,
                arguments,
                train_dataset=rows,
                processing_class=tokenizer,
                losses=settings.losses,
                drop=drop,
                trainable=settings.trainable,
                sequence_length=settings.sequence_length,
                head_chunk=settings.head_chunk,
            )
            work.remove_callback(PrinterCallback)
            work.refused = None  # its folder ends with this call
            work.train()
            training = training_of(work, work.spec, inputs=inputs, rows=rows, peak_memory_bytes=peak_memory())
        finally:
            for parameter, dtype in dtypes.items():
                parameter.data = parameter.data.to(dtype)
                parameter.grad = None
    return student.eval(), training
