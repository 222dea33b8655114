"""A pruned model in memory, distilled from its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Unpack

from torch import enable_grad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from shoal.artifacts.training import Training
from shoal.data.default_text import is_auto, text_of
from shoal.data.packing import require_room
from shoal.data.sources import Given, is_source, sources_of
from shoal.data.streams import pack
from shoal.errors import UserError
from shoal.machine import fast_dtype, peak_memory
from shoal.models.anatomy import require_gradients
from shoal.models.in_memory import Model, as_model, left_as_it_was, name_of, require_tokenizer
from shoal.models.load import num_parameters
from shoal.ranks import world_size
from shoal.recipe.distill import Distill, Trainable, TrainingSource
from shoal.recipe.recipe import of_arguments
from shoal.recipe.section import AUTO, Shapes, shaping
from shoal.recipe.trainer_arguments import refuse_training, trained_in
from shoal.runtime import agreed, device
from shoal.train.distill import training_of
from shoal.train.distillation_trainer import DistillationTrainer
from shoal.train.engine.arguments import num_rows, training_arguments
from shoal.train.engine.distillation_config import Losses
from shoal.train.preflight.throughput import machine_rate
from shoal.train.student.known_cut import Drop, refuse_swapped
from shoal.train.student.lora import remove_adapters

from .settings import DistillSettings


class DistillArguments(DistillSettings, total=False):
    """Those of the section, and what only models in memory have."""

    drop: Drop | None
    loss_on: Literal["assistant", "all"] | None


def distill(
    student: PreTrainedModel,
    teacher: Model,
    data: Given = AUTO,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    losses: Losses = "forward_kl",
    trainable: Trainable = "all",
    seed: int = 0,
    **settings: Unpack[DistillArguments],
) -> Training:
    """Train ``student`` in place to match ``teacher``. `model` of the result is the student.

    Both models move to the accelerator, if there is one, and back. Training uses float32 weights; then the student gets
    back its own precision. distill writes no files: for checkpoints and DeepSpeed use DistillationTrainer.

    Args:
        student: The pruned model.
        teacher: The model before pruning, in any precision, or its name. It is not changed.
        data: Texts, rows, or the name of a data set. `auto`: the text of `distill.data: auto`.
        tokenizer: The tokenizer of both models. Default: the one with the student's name.
        losses: One or several terms: names (`"forward_kl"`) or mappings (`{"kind": "jsd", "beta": 0.1}`).
        trainable: Weights to train, as in `distill.trainable`.
        seed: Seed for the order of the data and all other random choices.
        settings: Other keys of the recipe's section `distill`, with its defaults, such as `batch_size` (rows of one
            step over all processes) and `trainer` (`{"learning_rate": 1e-4}`); also `drop` and `loss_on` of
            DistillationTrainer. `num_tokens` is rounded up to whole steps, and data that are too short are repeated.
            Its default: texts and rows once; for a data set's name 200,000; for `auto` about an hour on this machine.

    Raises:
        UserError: models that do not belong together, unknown settings, nothing to learn, or a loss of NaN or infinity.

    Example:
        >>> shoal.distill(student, model, texts, num_tokens=2_000, sequence_length=128, tokenizer=tokenizer).history
    """
    student, teacher = as_model(student, "student", is_placed=False), as_model(teacher, "teacher", is_placed=False)
    require_gradients(student)  # before it is left as it was, which such weights do not allow
    refuse_swapped(student, teacher)
    tokenizer = require_tokenizer(tokenizer, student)
    if is_auto(data):
        text, size = text_of(teacher), num_parameters(teacher)
        settings.setdefault("num_tokens", agreed(lambda: text.num_tokens(size, machine_rate(world_size()))))
        data = text.sources(TrainingSource(AUTO))
    drop, loss_on = settings.pop("drop", None), settings.pop("loss_on", None)
    section, seed = _section({"losses": losses, "trainable": trainable}, settings, seed), int(seed)
    has_budget = "num_tokens" in settings or is_source(data)
    if has_budget:
        refuse_training(section, ranks=world_size())
    budget = num_rows(section) * section.sequence_length if has_budget else None
    sources, how = sources_of(data, loss_on=loss_on, num_tokens=budget), {"num_tokens": budget, "seed": seed}
    rows = pack(sources, tokenizer, sequence_length=section.sequence_length, packing=section.packing, **how)
    with TemporaryDirectory() as folder, left_as_it_was(teacher), left_as_it_was(student), _in_float32(student):
        args = training_arguments(section, None, output_dir=Path(folder), seed=seed)
        work = DistillationTrainer(student, teacher, args, rows, None, tokenizer, section.lora, drop=drop)
        work.remove_callback(PrinterCallback)
        work.refused = None  # its folder ends with this call
        work.train()
        work.merge_adapters()
        inputs = _inputs(student, teacher, section, seed=seed, rows=rows.fingerprint, has_budget=has_budget)
        training = training_of(work, work.spec, inputs=inputs, rows=rows, peak_memory_bytes=peak_memory())
    return training.of(student.eval())


def _section(named: dict[str, Any], settings: Mapping[str, Any], seed: int) -> Distill:
    trainer: Any = settings.get("trainer", {})
    if isinstance(trainer, Mapping):
        if lost := [name for name in trainer if str(name).startswith("save_")]:
            raise UserError(
                f"trainer.{lost[0]}: shoal.distill saves nothing; remove it, or use shoal.DistillationTrainer"
            )
        trainer = {**trainer, "save_strategy": "no"}
    section: Distill = of_arguments(
        "distill",
        {**named, **settings, "trainer": trainer},
        taken=(*named, *DistillSettings.__annotations__),
        source="shoal.distill",
        seed=seed,
    )
    require_room(section.budget, "distill.num_tokens")
    precision = trained_in({}, fast_dtype(device()).dtype) if section.precision == "auto" else section.precision
    return replace(section, num_tokens=section.budget, precision=precision, deepspeed=None, watch=None)


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
        with enable_grad():  # whatever the caller has switched off
            yield
    finally:
        remove_adapters(student)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
