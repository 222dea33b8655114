"""What the distill stage refuses before it loads weights: arguments, DeepSpeed settings, models that do not match.

Covers: shoal.train.engine.arguments.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import cases
from jobs import dropping, spec_of
from ranks import as_rank
from tiny import tiny_checkpoint, tiny_tokenizer
from transformers import TrainingArguments

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.machine import Choice
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import Distill, Live, Recorded, TrainingSource
from shoal.recipe.losses import CrossEntropy, ForwardKL
from shoal.recipe.trainer_arguments import batch_split
from shoal.train.dataset import rows_to_train_on
from shoal.train.distill import check_distillable, make_trainer
from shoal.train.engine.arguments import check_names, deepspeed_config, num_rows, rows_per_step, training_arguments
from shoal.train.student.spec import Ranks, train_spec

CASES = cases(__file__)


def check(whole, cut, **settings):
    teacher, student = (Checkpoint.read(folder, LoadSettings()) for folder in (whole, cut))
    plan = Plan(Provenance({}), num_layers=6, drop=(), reason="")
    ranks = Ranks(1, 1, torch.device("cpu"))
    check_distillable(train_spec(teacher, student, plan, Distill(**settings), ranks))


def test_different_vocabularies_are_refused(teacher, tmp_path):
    student = tiny_checkpoint(tmp_path, "llama", vocab_size=300)
    with pytest.raises(
        UserError, match=r"has 272 vocabulary entries and student .* has 300; .*prune the student from this"
    ):
        check(teacher, student)


def test_what_shoal_does_itself_is_told_to_transformers_only_afterwards(tmp_path, monkeypatch):
    """As it reads torch_compile it lets all of torch compute in TF32."""
    told = []
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: told.append(self.torch_compile))
    args = training_arguments(Distill(trainer={"torch_compile": True}), None, output_dir=tmp_path, seed=0)
    assert (told, args.torch_compile, args.use_liger_kernel) == ([False], True, False)


def test_what_another_launcher_has_left_does_not_set_the_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args = training_arguments(Distill(precision="float32"), None, output_dir=tmp_path, seed=0)
    assert (args.mixed_precision, args.deepspeed_plugin) == ("no", None)


@pytest.mark.parametrize(("values", "message"), CASES["values"])
def test_a_value_that_is_none_is_refused_before_anything_is_built(values, message):
    with pytest.raises(UserError, match=message):
        check_names(Distill(trainer=values))


def test_rows_fill_whole_optimizer_steps():
    settings = Distill(
        num_tokens=1000,
        sequence_length=10,
        trainer={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    )
    assert num_rows(settings) == 128  # 100 rows, rounded up to steps of 32


@pytest.mark.parametrize(
    ("batch", "ranks", "given", "split"),
    [(16, 1, None, (4, 4)), (16, 8, None, (2, 1)), (12, 2, None, (3, 2)), (12, 2, 2, (2, 3)), (14, 2, None, (1, 7))],
)
def test_accumulation_follows_from_the_batch_of_all_ranks(monkeypatch, batch, ranks, given, split):
    for name, value in as_rank(0, ranks).items():
        monkeypatch.setenv(name, value)
    settings = Distill(batch_size=batch, trainer={} if given is None else {"per_device_train_batch_size": given})
    assert batch_split(settings) == split
    assert rows_per_step(settings) == batch


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float16_is_not_autocast_where_gradients_are_clipped_with_their_scale(monkeypatch, stage):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    config = {"zero_optimization": {"stage": stage}}
    message = rf"precision: fp16-mixed does not work with ZeRO {stage}: .*; set distill.deepspeed: .*zero0"
    refused: tuple[dict[str, Any], ...] = (
        {"precision": "fp16-mixed", "deepspeed": config},
        {"deepspeed": config | {"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}},
    )
    for settings in refused:
        with pytest.raises(UserError, match=message):
            deepspeed_config(Distill(**settings))
    monkeypatch.setattr("shoal.train.engine.arguments.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("shoal.train.engine.arguments.fast_dtype", lambda _: Choice("float16", "a V100"))
    assert "torch_autocast" not in deepspeed_config(Distill(deepspeed=config))
    without_zero = deepspeed_config(Distill(deepspeed="zero0"))
    assert without_zero["torch_autocast"] == {"enabled": True, "dtype": "float16"}


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": None},
        {"zero_optimization": {"stage": 2, "offload_optimizer": None}},
        {"bf16": None, "fp16": None, "torch_autocast": None},
        {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}},
    ],
)
def test_sections_that_say_nothing_leave_the_choice_to_the_recipe(config):
    read = deepspeed_config(Distill(precision="bf16-mixed", deepspeed=config))
    assert read["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert not {"bf16", "fp16"} & read.keys()
    assert "offload_optimizer" not in read["zero_optimization"]


@pytest.mark.parametrize(("settings", "message"), CASES["deepspeed"])
def test_deepspeed_settings_known_to_be_wrong_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        deepspeed_config(Distill(**settings))


@pytest.mark.parametrize(("trainer", "message"), CASES["schedules"])
def test_what_a_schedule_or_optimizer_lacks_is_told_before_anything_is_measured(trainer, message):
    with pytest.raises(UserError, match=message):
        check_names(Distill(trainer=trainer))
    check_names(Distill(trainer={"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}))


def adam(**params):
    return {"optimizer": {"type": "AdamW", "params": params}}


@pytest.mark.parametrize(
    ("config", "trainer", "message"),
    [
        ({"gradient_clipping": 0.5}, {}, r"gradient_clipping=0\.5 vs hf max_grad_norm=1\.0; "),
        (adam(lr=2e-5), {"learning_rate": 1e-3}, r"params\.lr=2e-05 vs hf learning_rate=0\.001"),
        (adam(betas=[0.9, 0.999]), {}, r"betas=\[0\.9, 0\.999\] vs hf adam_beta1\+adam_beta2=\[0\.9, 0\.95\]"),
    ],
)
def test_another_number_in_the_deepspeed_file_than_the_trainers_is_refused(config, trainer, message):
    with pytest.raises(
        UserError, match=rf'^distill\.deepspeed: .*{message}.*set the first to "auto", or change the second'
    ):
        check_names(Distill(deepspeed=config, trainer=trainer), ranks=2)


INPUTS = {"model": "m", "seed": 0, "distill.data": []}


def test_rows_are_packed_once_and_read_back_equal(tmp_path, monkeypatch):
    source = TrainingSource("python_docs")
    settings = Distill(data=(source,), num_tokens=640, sequence_length=64, batch_size=10)

    def rows():
        return rows_to_train_on(tiny_tokenizer(), settings, {}, tmp_path, inputs=INPUTS)

    first = rows()
    monkeypatch.setattr("shoal.train.dataset.pack", None)  # a second packing would fail
    second = rows()
    assert first.fingerprint == second.fingerprint
    assert first.counts == second.counts
    assert len(first) == 10


TWO_TERMS = (ForwardKL(), CrossEntropy())


@pytest.fixture
def rows_of(tmp_path):
    """Rows of two sources that learn from these loss terms, None = from all."""

    def rows(*losses, terms=TWO_TERMS, teacher=None):
        names = ("python_docs", "python_docs_heldout")
        data = tuple(TrainingSource(name, losses=own) for name, own in zip(names, losses, strict=True))
        settings = Distill(
            data=data, num_tokens=640, sequence_length=64, batch_size=10, losses=terms, teacher=teacher or Live()
        )
        return rows_to_train_on(tiny_tokenizer(), settings, {}, tmp_path, inputs=INPUTS)

    return rows


def test_sources_that_ask_no_teacher_have_rows_of_their_own_unless_it_is_recorded(rows_of):
    each_its_own = ((ForwardKL(),), (CrossEntropy(),))
    mixed = rows_of(None, None)
    assert mixed.fingerprint == rows_of(*each_its_own, teacher=Recorded()).fingerprint
    apart = rows_of(*each_its_own)
    of_rows = [set(row.tolist()) for row in apart.sources_NS]
    assert sorted(map(sorted, of_rows)) == [[0]] * 5 + [[1]] * 5


class Loaded(Exception):
    """No model need be loaded any further."""


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"deepspeed": "zero2"}, ["cuda:1", "cuda:1"]),
        ({"deepspeed": "zero2", "teacher": Recorded()}, ["cuda:1"]),
        ({"deepspeed": "zero0", "teacher": Live(offload=True)}, ["cuda:1", "cpu"]),
        ({"deepspeed": "zero3"}, ["cpu", "cpu"]),
    ],
)
def test_models_are_loaded_where_they_compute(monkeypatch, tmp_path, settings, places):
    """Through host memory eight ranks would hold eight copies there, and kernels of a GPU meet a student on the CPU
    where no teacher moves it."""
    spec = spec_of(Distill(**settings), dropping(2, 4), student_layers=4)
    found = []

    def load(self, *, dtype, device="cpu"):
        found.append(str(device))
        if len(found) == len(places):
            raise Loaded
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr("shoal.train.distill.device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(Checkpoint, "model", load)
    for name in ("make_trainable", "stored_names", "loaded_in"):
        monkeypatch.setattr(f"shoal.train.distill.{name}", lambda *_, **__: nullcontext())
    unused: Any = SimpleNamespace(seed=0)
    with pytest.raises(Loaded):
        make_trainer(spec, unused, unused, {}, None, stop=unused, callbacks=[])
    assert found == places
