"""The trainer for models and data sets in memory: its loss, its checkpoints, several processes, what it refuses.

Covers: shoal.train.engine.distillation_config, shoal.train.student.known_cut.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset as HubDataset
from peft import LoraConfig
from ranks import call_on_ranks, environment
from tiny import tiny_model, tiny_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

import shoal
from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import ClosedGap, Plan
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.packing import IGNORED, PackedRows
from shoal.errors import UserError
from shoal.models.checkpoint_files import CLOSED_GAPS, KEPT_LAYERS
from shoal.ranks import free_port
from shoal.recipe.distill import Distill, Lora
from shoal.recipe.losses import ForwardKL
from shoal.recipe.trainer_arguments import DEFAULTS
from shoal.train.distillation_trainer import DistillationTrainer
from shoal.train.engine.arguments import training_arguments
from shoal.train.engine.distillation_config import DistillationConfig

CONFIGS = Path(__file__).parents[2] / "configs"
DROP = (2, 3)
LENGTH = 32
TEXTS = [f"Document {number} says {number * number}, and then some more." for number in range(24)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} + 1?"},
            {"role": "assistant", "content": f"It is {number + 1}."},
        ]
    }
    for number in range(12)
]


def arguments(folder: Path, **settings: Any) -> DistillationConfig:
    given = {"learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True}
    given |= {"use_cpu": True, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    given |= {"warmup_steps": 0, "adam_beta2": 0.999, "num_train_epochs": 3, "sequence_length": LENGTH}
    return DistillationConfig(str(folder / "out"), **(given | settings))


def of_config(given: dict[str, Any]) -> dict[str, Any]:
    """What of ``given``, which loses it, is a field of the configuration."""
    return {name: given.pop(name) for name in [*given] if name in DistillationConfig.__dataclass_fields__}


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = tiny_model("llama")
    return cut_model(teacher, DROP), teacher


def trainer_of(
    folder: Path, *pair: PreTrainedModel, data: Any = TEXTS, trained_by: dict[str, Any] | None = None, **given: Any
) -> DistillationTrainer:
    student, teacher = pair or models()
    given = {"processing_class": tiny_tokenizer(), "train_dataset": data} | given
    args = arguments(folder, **of_config(given), **(trained_by or {}))
    return DistillationTrainer(student, teacher, args, **given)


def curve(trainer: DistillationTrainer, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


@torch.no_grad()
def forward_kl(student: PreTrainedModel, teacher: PreTrainedModel, rows: PackedRows) -> float:
    """KL(teacher || student) per supervised token in nats, document by document in float64."""
    total, count = 0.0, 0
    for row in rows:
        borders = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), LENGTH]
        for start, end in pairwise(borders):
            ids = row["input_ids"][None, start:end]
            learnt = row["labels"][start + 1 : end] != IGNORED
            p, q = (functional.log_softmax(model(ids).logits.double()[0, :-1], -1) for model in (teacher, student))
            total += (p.exp() * (p - q)).sum(-1)[learnt].sum().item()
            count += int(learnt.sum())
    return total / count


@pytest.mark.parametrize("data", [TEXTS, CHATS], ids=["texts", "conversations"])
def test_its_loss_is_the_divergence_per_learnt_token(tmp_path: Path, data: Any) -> None:
    student, teacher = models()
    trainer = trainer_of(tmp_path, student, teacher, data=None, eval_dataset=data, trained_by={"eval_strategy": "no"})
    rows: Any = trainer.eval_dataset
    learnt = tiny_tokenizer().decode([t for row in rows for t in row["labels"].tolist() if t != IGNORED])
    if data is CHATS:
        assert "It is 12." in learnt
        assert "What" not in learnt
    else:
        assert learnt.count("</s>") >= len(TEXTS) - 1  # one may begin a row
    # of equal batches the Trainer takes the mean of their means, so that one batch holds all
    trainer.args.per_device_eval_batch_size = len(rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(forward_kl(student, teacher, rows), rel=1e-5)


def test_a_held_out_file_is_read_once_however_long_the_training_is(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    given = {"eval_dataset": str(tmp_path / "held.jsonl"), "trained_by": {"max_steps": 50, "eval_strategy": "no"}}
    rows: Any = trainer_of(tmp_path, **given).eval_dataset
    once: Any = trainer_of(tmp_path, eval_dataset=TEXTS, trained_by={"eval_strategy": "no"}).eval_dataset
    assert len(rows) == len(once)


def test_every_document_is_read_once_per_epoch(tmp_path: Path) -> None:
    rows: Any = trainer_of(tmp_path).train_dataset
    tokenizer = tiny_tokenizer()
    expected = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS)
    assert rows.counts["train_dataset"]["documents"] == len(TEXTS)
    assert rows.counts["train_dataset"]["tokens"] == expected
    assert rows.counts["train_dataset"]["padding"] == -expected % LENGTH


def test_the_curve_does_not_depend_on_how_a_batch_is_split(tmp_path: Path) -> None:
    curves = []
    for rows, accumulation in ((4, 1), (1, 4)):
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "max_steps": 4}
        trainer = trainer_of(
            tmp_path, losses=["forward_kl", {"kind": "cross_entropy", "weight": 0.1}], trained_by=split
        )
        trainer.train()
        curves.append(curve(trainer))
        assert curve(trainer, "forward_kl")[0] < curve(trainer, "cross_entropy")[0]
    assert len(curves[0]) == 4
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_layers_are_compiled_by_the_objective_and_not_once_more_around_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, trained_by={"torch_compile": True})
    assert trainer.spec.settings.trainer["torch_compile"]
    assert (trainer.args.torch_compile, trainer.args.torch_compile_backend) == (False, None)
    around: Any = trainer.accelerator.state.dynamo_plugin
    assert around.backend == "NO"


def test_training_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    losses = ["taid"]  # which keeps a state of its own
    whole = trainer_of(tmp_path, losses=losses, trained_by=steps)
    whole.train()
    again = trainer_of(tmp_path, losses=losses, trained_by=steps)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert curve(again) == curve(whole)
    assert curve(again, "taid_t")[3:] == curve(whole, "taid_t")[3:]
    for name, weight in again.objective.student.state_dict().items():
        assert torch.equal(weight, whole.objective.student.state_dict()[name]), name
    os.remove(tmp_path / "out/checkpoint-3/objective.json")
    with pytest.raises(UserError, match=r"checkpoint-3: objective.json is missing; resume from a checkpoint of this"):
        trainer_of(tmp_path, losses=losses, trained_by=steps).train(
            resume_from_checkpoint=str(tmp_path / "out/checkpoint-3")
        )


def test_afterwards_the_student_is_an_ordinary_model_and_the_teacher_as_before(tmp_path: Path) -> None:
    student, teacher = models()
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    trainer = trainer_of(tmp_path, student, teacher, trained_by={"bf16": True, "max_steps": 3})
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    ids = torch.arange(20)[None]
    student.eval()
    logits = student(ids).logits
    assert not torch.equal(logits, cut_model(teacher, DROP)(ids).logits)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, logits)


def on_rank(rank: int, ranks: int, folder: str, port: int, stage: int | None) -> None:
    """Train here under DistributedDataParallel, or under DeepSpeed's ``stage``; rank 0 writes its curve."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from shoal.runtime import leave_distributed, set_up_distributed
    from shoal.train.engine.sharding import join_deepspeed

    if stage is None:  # under DETAIL torch 2.13.0 ends any DistributedDataParallel on a CPU with a segmentation fault
        c10d: Any = torch.distributed
        c10d.set_debug_level(c10d.DebugLevel.OFF)
    set_up_distributed(300)
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 3, "losses": ForwardKL()}
    if stage is not None:
        join_deepspeed()
        zero = {"stage": stage, "reduce_bucket_size": 10_000}
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        settings["deepspeed"] = {"zero_optimization": zero, **dict.fromkeys((*auto, "gradient_clipping"), "auto")}
    args = arguments(Path(folder), **settings)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(Path(folder) / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    trainer = DistillationTrainer(student, teacher, args, TEXTS, processing_class=tiny_tokenizer())
    trainer.train()
    if rank == 0:
        (Path(folder) / "curve.json").write_text(json.dumps([curve(trainer), curve(trainer, "grad_norm")]))
    leave_distributed()


@pytest.mark.prove
@pytest.mark.parametrize("stage", [None, 0, 2, 3], ids=["ddp", "zero0", "zero2", "zero3"])
def test_two_ranks_give_the_curve_of_one(tmp_path: Path, stage: int | None) -> None:
    student, teacher = models()
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    alone = trainer_of(tmp_path, student, teacher, losses=ForwardKL(), trained_by={"max_steps": 3})
    alone.train()
    call_on_ranks(on_rank, str(tmp_path), free_port(), stage, ranks=2)
    losses, norms = json.loads((tmp_path / "curve.json").read_text())
    assert losses == pytest.approx(curve(alone), rel=1e-4)
    assert norms == pytest.approx(curve(alone, "grad_norm"), rel=1e-3)


def with_unknown_attention() -> PreTrainedModel:
    model = cut_model(tiny_model("llama"), DROP)
    model.config._attn_implementation_internal = "paged|sdpa"  # pyright: ignore[reportAttributeAccessIssue]
    return model


def with_other_forward() -> PreTrainedModel:
    model = cut_model(tiny_model("llama"), DROP)
    model.forward = partial(type(model).forward, model)
    return model


def of_unknown_cut(drop: tuple[int, ...] = DROP) -> PreTrainedModel:
    model = cut_model(tiny_model("llama"), drop)
    delattr(model.config, KEPT_LAYERS)
    return model


def with_other_embeddings() -> PreTrainedModel:
    model = cut_model(tiny_model("llama"), DROP)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1e-3  # pyright: ignore[reportIndexIssue]
    return model


def all_frozen() -> PreTrainedModel:
    return cut_model(tiny_model("llama"), DROP).requires_grad_(False)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher_model": None}, r"teacher_model: is missing, and the losses compare the student with a teacher"),
        (
            {"model": tiny_model("llama", vocab_size=300)},
            r"teacher llama has 272 vocabulary entries and student llama has 300",
        ),
        (
            {"losses": "hidden_states", "model": of_unknown_cut()},
            r"drop: trainable 'all' or a loss on states needs the teacher's layers \(of 6",
        ),
        (
            {"trainable": "near_gaps", "model": of_unknown_cut()},
            r"drop: trainable 'near_gaps' or a loss on states needs",
        ),
        (
            {"drop": (1, 3)},
            r"drop: \[1, 3\] contradicts the student's config, which lists \[2, 3\] as dropped; pass the layers",
        ),
        (
            {"trainable": "from_first_cut", "drop": (2, 3), "model": of_unknown_cut((1, 2))},
            r"model: the weights of its layer 1 differ from the teacher's, .* pass drop=Plan.load",
        ),
        (
            {"trainable": "from_first_cut", "model": with_other_embeddings()},
            r"model: the weights of the embeddings differ from the teacher's, .* set trainable to 'layers' or 'all'",
        ),
        (
            {"compute_metrics": print},
            r"shoal.DistillationTrainer: compute_metrics: is an unknown argument; known are callbacks, opt",
        ),
        (
            {"peft_config": Lora(load_in_4bit=True)},
            r"peft_config: 4-bit weights and ZeRO 3 can only merge adapters with the student's files",
        ),
        ({"peft_config": LoraConfig(use_dora=True)}, r"peft_config.use_dora: is True; remove it, adapters here are"),
        ({"peft_config": LoraConfig(target_modules=".*proj")}, r"peft_config.target_modules: is '.\*proj'; remove it"),
        (
            {"teacher_model_init_kwargs": {"dtype": "float32"}},
            r"teacher_model_init_kwargs: applies only to a teacher given",
        ),
        ({"model": with_unknown_attention()}, r"model: its attention is paged.sdpa, which for llama is not known"),
        ({"model": with_other_forward()}, r"model: the forward of its LlamaForCausalLM is replaced"),
        (
            dict(zip(("teacher_model", "model"), models(), strict=True)),
            r"the teacher is pruned by shoal, and the student",
        ),
        ({"model": all_frozen(), "trainable": None}, r"model: no weight requires a gradient; set trainable"),
        (
            {"args": {"deepspeed": {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.5}}},
            r"args.deepspeed: ds gradient_clipping=0.5 vs hf max_grad_norm=1.0; set the first to .auto.",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    student, teacher = models()
    given = {"model": student, "teacher_model": teacher, "processing_class": tiny_tokenizer()} | given
    args = arguments(tmp_path, **given.pop("args", {}), **of_config(given))
    with pytest.raises(UserError, match=message):
        DistillationTrainer(args=args, train_dataset=TEXTS, **given)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"losses": "forwards_kl"}, "losses.0.kind: must be one of .*did you mean 'forward_kl'"),
        ({"sequence_length": "long"}, "sequence_length: must be a whole number"),
        ({"data_seed": -1}, r"seed: must be from 0 to below 2\*\*32 \(got -1\)"),
        ({"optim": "none"}, "none is not a valid OptimizerNames"),
        ({"learning_rate": 0}, "distill.trainer.learning_rate: 0 trains nothing; set it above 0"),
        ({"label_smoothing_factor": 0.1}, "distill.trainer.label_smoothing_factor: would have no effect on the loss"),
        ({"average_tokens_across_devices": False}, "distill.trainer.average_tokens_across_devices: the loss is always"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ".*use_reentrant: True loses gradients above"),
    ],
)
def test_a_configuration_is_refused_as_it_is_made(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"shoal.DistillationConfig: {message}"):
        arguments(tmp_path, **wrong)


@pytest.mark.parametrize(("length", "last"), [({"max_steps": 2}, 2), ({"num_train_epochs": 1}, 8)])
def test_a_warm_up_of_all_steps_is_refused_as_in_a_recipe(tmp_path: Path, length: dict[str, Any], last: int) -> None:
    warmup: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_steps": 10}
    trainer = trainer_of(tmp_path, trained_by={**warmup, **length})
    with pytest.raises(UserError, match=rf"warmup_steps: 10 of {last} steps, so the learning rate is never reached;"):
        trainer.train()


def test_a_student_says_itself_which_layers_are_gone_and_what_makes_up_for_them(tmp_path: Path) -> None:
    student, teacher = models()
    assert trainer_of(tmp_path, student, teacher, trainable="near_gaps").spec.plan.drop == DROP
    gap = ClosedGap(2, 3, 1.5, True, 1, 1, 1, 1)
    setattr(student.config, CLOSED_GAPS, [asdict(gap)])
    for drop in (None, DROP, Plan(Provenance({}), 6, DROP, "")):
        spec = trainer_of(tmp_path, student, teacher, trainable="from_first_cut", drop=drop).spec
        assert spec.plan.gaps == (gap,)
        assert spec.shared_layers == 1  # as above


def test_adapters_become_plain_weights_and_training_with_them_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    student, teacher = models()
    ids = torch.arange(20)[None]
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    adapters = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    given: dict[str, Any] = {"peft_config": adapters, "trainable": "near_gaps"}
    trainer = trainer_of(tmp_path, student, teacher, trained_by=steps, **given)
    trainer.train()
    with pytest.raises(UserError, match=r"save_model: the model has adapters; call merge_adapters\(\) first"):
        trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        adapted = student(ids).logits
    trainer.merge_adapters()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    plain = cut_model(teacher, DROP).state_dict()
    assert {name for name, weight in saved.state_dict().items() if not torch.equal(weight, plain[name])} == {
        f"model.layers.{layer}.{name}.weight" for layer in (1, 2) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    with torch.no_grad():
        assert torch.allclose(saved(ids).logits, adapted, atol=1e-5)
    again = trainer_of(tmp_path, *models(), trained_by=steps, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    again.merge_adapters()
    for name, weight in again.objective.student.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name]), name


def test_steps_on_the_students_own_text(tmp_path: Path) -> None:
    """Whose rows are judged: with every step on-policy the data only give prompts, and training goes on from a save."""
    on_policy = {"share": 1, "start": 0.5, "prompt_tokens": 4, "max_new_tokens": 8}
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    learnt: list[int] = []

    class Watching(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            learnt.append(int((inputs["labels"] != IGNORED).sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def trained(checkpoint: str | None = None) -> DistillationTrainer:
        trainer = Watching(
            *models(), arguments(tmp_path, **steps, on_policy=on_policy), TEXTS, processing_class=tiny_tokenizer()
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = trained()
    assert min(learnt[:2]) > 100
    again = trained(str(tmp_path / "out/checkpoint-3"))
    assert curve(again) == curve(whole)
    assert curve(again, "on_policy/kept_tokens") == curve(whole, "on_policy/kept_tokens")


def test_its_defaults_are_those_of_a_recipes_run(tmp_path: Path) -> None:
    own, of_run = DistillationConfig(str(tmp_path)), training_arguments(Distill(), None, output_dir=tmp_path, seed=0)
    names = (*DEFAULTS, "trainable", "sequence_length", "packing", "on_policy", "stop_on_spike")
    assert [getattr(own, name) for name in names] == [getattr(of_run, name) for name in names]
    assert {name: getattr(own, name) for name in DEFAULTS} == DEFAULTS
    assert [term["kind"] for term in of_run.losses] == [own.losses] == ["forward_kl"]


def test_full_determinism_of_a_recipe_is_in_force_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # the Trainer sets them, and they are undone
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    settings = Distill(trainer={"full_determinism": True})
    assert training_arguments(settings, None, output_dir=tmp_path, seed=0).full_determinism
    trainer_of(tmp_path, trained_by=settings.trainer)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention would keep no order then"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"


def test_models_by_name_and_plain_arguments_are_taken_as_by_trl(tmp_path: Path) -> None:
    student, teacher = models()
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True)
    stream = HubDataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    trainer = DistillationTrainer(str(tmp_path / "student"), str(tmp_path / "teacher"), args, stream)
    assert (trainer.spec.settings.sequence_length, trainer.args.per_device_train_batch_size) == (512, 8)
    assert len(trainer.train_dataset) == 8  # pyright: ignore[reportArgumentType]
    assert {weight.dtype for weight in trainer.objective.student.parameters()} == {torch.float32}


SCRIPT = """
import json

import shoal
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

args = shoal.DistillationConfig(
    "healed", sequence_length=32, warmup_steps=0, adam_beta2=0.999,
    losses=[{"kind": "forward_kl"}, {"kind": "hidden_states", "weight": 0.5}],
    learning_rate=1e-3, lr_scheduler_type="constant", max_steps=3, per_device_train_batch_size=4,
    logging_steps=1, save_strategy="no", report_to=[], max_grad_norm=0.1, use_cpu=True, deepspeed="zero2.json",
)
student, teacher = (AutoModelForCausalLM.from_pretrained(name, dtype="float32") for name in ("student", "teacher"))
trainer = shoal.DistillationTrainer(
    student, teacher, args, Dataset.from_list(json.load(open("chats.json"))),
    processing_class=AutoTokenizer.from_pretrained("teacher"),
)
trainer.train()
assert trainer.model_wrapped.gradient_clipping() == 0.1
trainer.save_model()
json.dump([row["loss"] for row in trainer.state.log_history if "loss" in row], open("curve.json", "w"))
"""


@pytest.mark.prove
def test_conversations_in_a_script_under_the_deepspeed_program(tmp_path: Path) -> None:
    """As a user of TRL has it: a script with TrainingArguments and a data set of messages, started on one rank."""
    student, teacher = models()
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    shutil.copy(CONFIGS / "deepspeed/zero2.json", tmp_path)
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    (tmp_path / "script.py").write_text(SCRIPT)
    program = str(Path(sys.executable).with_name("deepspeed"))
    command = [program, "--num_gpus", "1", "--master_port", str(free_port()), "script.py"]
    env = environment(TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    ended = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not (tmp_path / "compiled").exists(), "a start would take minutes, and hang where one was killed meanwhile"
    losses = [{"kind": "forward_kl"}, {"kind": "hidden_states", "weight": 0.5}]
    data = HubDataset.from_list(CHATS)
    alone = trainer_of(
        tmp_path, student, teacher, data=data, losses=losses, trained_by={"max_steps": 3, "max_grad_norm": 0.1}
    )
    alone.train()
    assert json.loads((tmp_path / "curve.json").read_text()) == pytest.approx(curve(alone), rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "healed").state_dict()
    for name, weight in student.state_dict().items():
        assert torch.allclose(saved[name], weight, atol=1e-4), name


@pytest.mark.parametrize("broken", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_before_anything_is_trained(
    tmp_path: Path, broken: str, value: float
) -> None:
    student, teacher = models()
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        {"student": student, "teacher": teacher}[broken].get_parameter(name)[3, 5] = value
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    for heal in (
        partial(trainer_of, tmp_path, student, teacher),
        partial(shoal.distill, student, teacher, TEXTS, tokenizer=tiny_tokenizer(), sequence_length=LENGTH),
    ):
        with pytest.raises(UserError, match=rf"^{broken}: {re.escape(name)} holds NaN or infinite numbers"):
            heal()
    for name, weight in student.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_step_that_is_no_number_is_not_applied(tmp_path: Path) -> None:
    """The student is the caller's: what was learnt before stays, and nothing of that step."""

    class Spoilt(DistillationTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 1:
                self._step_sums *= torch.nan
            return loss

    teacher = tiny_model("llama")
    whole, spoilt = cut_model(teacher, DROP), cut_model(teacher, DROP)
    settings: dict[str, Any] = {"train_dataset": TEXTS, "processing_class": tiny_tokenizer()}
    DistillationTrainer(whole, teacher, arguments(tmp_path, max_steps=1), **settings).train()
    with pytest.raises(UserError, match=r"^step 2: loss is nan"):
        Spoilt(spoilt, teacher, arguments(tmp_path, max_steps=3), **settings).train()
    for (name, weight), other in zip(spoilt.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, other), name
        assert weight.grad is None
