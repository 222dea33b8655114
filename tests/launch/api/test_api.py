"""The functions of `import shoal`: what they give is what the command's stages give, and models are left as they were.

Covers: shoal.launch.api.compressing, shoal.launch.api.evaluating, shoal.launch.api.running,
shoal.launch.api.training, shoal.models.in_memory.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import IterableDataset
from results import evaluation, write_run
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training_runs import DROP, LENGTH, STEPS, finished, prepare, recipe, run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import shoal
from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import Scores
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import ClosedGap, Plan
from shoal.artifacts.training import Training
from shoal.data.default_text import TRAINING
from shoal.data.sources import load_texts
from shoal.eval.report.run import read_run
from shoal.launch.api import running
from shoal.launch.api.evaluating import Comparison
from shoal.launch.api.running import Run
from shoal.launch.api.training import DistillArguments
from shoal.launch.verbs.evaluate import evaluate as eval_stage
from shoal.launch.verbs.launch import LaunchEnded
from shoal.launch.verbs.measure import measure as measure_stage
from shoal.launch.verbs.prune import prune as prune_stage
from shoal.launch.verbs.run import open_run
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.in_memory import as_model
from shoal.recipe.distill import Distill, TrainingSource
from shoal.recipe.recipe import load_recipe
from shoal.recipe.section import DataSource
from shoal.stats.paired import retention

TEXTS = [f"Document {number} says {number * number}, and then some more." for number in range(24)]
METRICS = ["block_influence", "angular", "present_absent", "blockpruner"]
TASKS = ["knowledge_continuation", "retrieval_generation"]
WORD: Any = "t"
NUMBER: Any = 3
"""In place of a value of another type."""


def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def docs() -> list[str]:
    return load_texts(DataSource("python_docs"))


def run_of(folder: Path, model: Path, **sections: Any) -> Any:
    settings = {"model": str(model), "run_dir": str(folder / "run"), "dtype": "float32", **sections}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return open_run(load_recipe(folder / "recipe.yaml"))


def test_import_loads_no_library_and_every_name_is_there() -> None:
    script = (
        "import sys; before = set(sys.modules); import shoal; dir(shoal); shoal.UserError\n"
        "heavy = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not heavy - {'shoal'} - set(sys.stdlib_module_names), heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert set(shoal.__all__) == set(shoal.PLACES) <= set(dir(shoal))
    assert all(callable(getattr(shoal, name)) for name in shoal.__all__)
    with pytest.raises(AttributeError, match="module 'shoal' has no attribute 'prune_model'"):
        shoal.prune_model  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importance_and_cut_are_those_of_the_stages(tmp_path: Path, teacher: Path) -> None:
    sweep = {"tasks": ["knowledge_continuation", "retrieval_generation"], "limit": 8}
    settings: Any = {"num_tokens": 512, "sequence_length": 64, "metrics": METRICS, "sweep": sweep}
    own = run_of(tmp_path, teacher, measure=settings, prune={"num_drop": 2, "metric": "angular", "contiguous": True})
    measure_stage(own)
    prune_stage(own)
    expected = Importance.load(own.dir / "importance.json")
    model, tokenizer = loaded(teacher)
    read = load_texts(DataSource("python_docs"))
    importance = shoal.measure_importance(model, tokenizer, read, **settings)
    for field in ("num_layers", "num_tokens", "layers", "runs", "errors", "orders", "atlas"):
        assert getattr(importance, field) == getattr(expected, field), field
    plan = shoal.choose_layers(importance, num_drop=2, metric="angular", contiguous=True)
    assert plan.drop == Plan.load(own.dir / "plan.json").drop
    for made in (importance, plan):
        assert made.provenance.model == type(made).load(own.dir).provenance.model == str(teacher)
    student = shoal.cut_model(model, plan)
    written = load_file(own.dir / "student/model.safetensors")
    assert written.keys() == student.state_dict().keys()
    assert all(torch.equal(weight, student.state_dict()[name]) for name, weight in written.items())


def test_scores_are_those_of_the_stage(tmp_path: Path, teacher: Path) -> None:
    own = run_of(tmp_path, teacher, eval={"tasks": TASKS, "limit": 3, "perplexity_tokens": 512, "speed": False})
    eval_stage(own)
    model, tokenizer = loaded(teacher)
    evaluation = shoal.evaluate(model, tokenizer, TASKS, limit=3, perplexity_tokens=512)
    expected = Scores.load(own.dir / "eval/teacher.json")
    assert evaluation.tasks == expected.tasks
    assert evaluation.provenance.model == expected.provenance.model == str(teacher)
    assert (evaluation.num_parameters, evaluation.num_layers) == (expected.num_parameters, 6)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("precision", ["float32", "bf16-mixed"])
def test_healing_is_that_of_the_stage(tmp_path: Path, teacher: Path, docs: list[str], precision: str) -> None:
    """The command trains under DeepSpeed; these are the same steps."""
    losses: list[Any] = [{"kind": "forward_kl"}, {"kind": "hidden_states", "weight": 0.5}]
    given = {"losses": losses, "batch_size": 4, "trainable": "from_first_cut", "precision": precision}
    told = finished(run(recipe(tmp_path / "trial", teacher, prepare(tmp_path / "cut", teacher), **given)))
    model, tokenizer = loaded(teacher)
    training = shoal.distill(
        shoal.cut_model(model, DROP),
        model,
        docs,
        tokenizer=tokenizer,
        num_tokens=told.training.num_tokens,
        sequence_length=LENGTH,
        trainer={"learning_rate": 1e-3},
        drop=DROP,
        **given,
    )
    student = training.model
    near = 1e-5 if precision == "float32" else 1e-3
    for name in ("loss", "forward_kl", "hidden_states", "grad_norm"):
        assert [row[name] for row in training.history if name in row] == pytest.approx(told.curve(name), rel=near), name
    assert (training.num_steps, training.num_tokens) == (STEPS, told.training.num_tokens)
    assert training.provenance.model == told.training.provenance.model == str(teacher)
    for name, weight in told.weights().items():
        assert torch.allclose(weight, student.state_dict()[name], rtol=near, atol=0.1 * near), name


def test_a_comparison_is_that_of_the_report_item_by_item() -> None:
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    tasks = ["knowledge_continuation", "retrieval_continuation"]
    before = shoal.evaluate(one, tiny_tokenizer(), tasks, limit=12, perplexity_tokens=1024)
    after = shoal.evaluate(other, tiny_tokenizer(), tasks[:1], limit=12, perplexity_tokens=1024, role="pruned")
    assert after.role == "pruned"
    both = shoal.compare(before, after, replace(after, role="distilled"))
    assert [row["model"] for row in both.rows()] == ["pruned"] * 2 + ["distilled"] * 2
    rows = shoal.compare(before, after).rows()
    assert [row["task"] for row in rows] == [tasks[0], "perplexity"]
    kept = [retention(first, then).value for first, then in zip(before.tasks[::2], after.tasks, strict=True)]
    assert [row["kept"] for row in rows] == kept
    assert all(twice["adjusted_p"] >= once["adjusted_p"] for twice, once in zip(both.rows(), rows, strict=False))
    for row in rows:
        first, second = (next(t for t in e.tasks if t.task == row["task"]) for e in (before, after))
        gained = [b.score - a.score for a, b in zip(first.items, second.items, strict=True)]
        weights = [item.weight for item in first.items]
        assert row["change"] == pytest.approx(sum(map(math.prod, zip(gained, weights, strict=True))) / sum(weights))
        assert row["change"] == pytest.approx(row["score"] - row["reference"])
        assert row["ci_low"] <= row["change"] <= row["ci_high"]
        better = [change > 0 if first.higher_is_better else change < 0 for change in gained if change]
        assert (row["won"], row["lost"], row["n"]) == (sum(better), len(better) - sum(better), first.n)
    with pytest.raises(shoal.UserError, match=r"compare: the evaluations have no task in common"):
        shoal.compare(replace(before, tasks=before.tasks[1:2]), after)
    with pytest.raises(shoal.UserError, match=r"task 'knowledge_continuation': n is 12 in one evaluation and 4"):
        shoal.compare(before, shoal.evaluate(other, tiny_tokenizer(), tasks[0], limit=4))


def test_healing_changes_the_student_alone_and_keeps_what_it_is_in() -> None:
    teacher = tiny_model("llama", dtype=torch.bfloat16).train()
    student = shoal.cut_model(teacher, DROP)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    untrained = {name: weight.clone() for name, weight in student.state_dict().items()}
    training = shoal.distill(
        student, teacher, TEXTS, tokenizer=tiny_tokenizer(), sequence_length=64, drop=DROP,
        trainable="near_gaps", trainer={"max_steps": 2, "learning_rate": 1e-2},
    )  # fmt: skip
    assert training.model is student
    assert [row["num_tokens"] for row in training.rows() if "loss" in row] == [256, 512]
    assert training.num_steps == 2
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    moved = {name for name, weight in student.state_dict().items() if not torch.equal(weight, untrained[name])}
    assert moved
    assert all(".layers.1." in name or ".layers.2." in name for name in moved)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert teacher.training
    assert not student.training
    assert student.config.use_cache
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_adapters_and_the_students_own_text_heal_in_memory() -> None:
    teacher = tiny_model("llama", dtype=torch.bfloat16)
    student = shoal.cut_model(teacher, DROP)
    names = [name for name, _ in student.named_parameters()]
    untrained = {name: weight.clone() for name, weight in student.state_dict().items()}
    training = shoal.distill(
        student, teacher, TEXTS, tokenizer=tiny_tokenizer(), sequence_length=64, trainable="near_gaps",
        lora={"r": 2, "target_modules": ["v_proj"]}, trainer={"max_steps": 3, "learning_rate": 1e-2},
        on_policy={"share": 1, "start": 0.3, "prompt_tokens": 8, "max_new_tokens": 8},
    )  # fmt: skip
    assert ["on_policy/kept_tokens" in row for row in training.history] == [False, True, True]
    assert [name for name, _ in student.named_parameters()] == names
    moved = {name for name, weight in student.state_dict().items() if not torch.equal(weight, untrained[name])}
    assert moved == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (1, 2)}
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in student.parameters())
    assert training.provenance.inputs["distill.lora"]["r"] == 2


def test_models_are_measured_as_evaluated_and_left_as_they_were() -> None:
    """Dropout, which a model in training mode has, would change every score."""
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.norm.requires_grad_(False)
    settings: Any = {"num_tokens": 256, "sequence_length": 64, "metrics": ["block_influence", "taylor"]}
    importance = shoal.measure_importance(model, tiny_tokenizer(pad_token=False), TEXTS, **settings)
    again = shoal.measure_importance(tiny_model("llama"), tiny_tokenizer(), TEXTS, **settings)
    assert importance.layers == again.layers
    assert model.training
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["model.norm.weight"]
    assert all(weight.grad is None for weight in model.parameters())


def stream_of(texts: list[str], read: list[str] | None = None) -> IterableDataset:
    """Texts of which nobody knows how many there are; ``read`` gets those that were read."""

    def rows() -> Iterator[dict[str, str]]:
        for text in texts:
            if read is not None:
                read.append(text)
            yield {"text": text}

    return IterableDataset.from_generator(rows)


def test_a_stream_is_read_as_far_as_it_is_needed() -> None:
    read: list[str] = []
    rows = [f"{number} is one of very many numbers." for number in range(20_000)]
    settings: Any = {"num_tokens": 64, "sequence_length": 32}
    importance = shoal.measure_importance(tiny_model("llama"), tiny_tokenizer(), stream_of(rows, read), **settings)
    assert 16 * 64 <= sum(map(len, read)) < 2 * 16 * 64 + 200
    begin = list(dict.fromkeys(read))
    again = shoal.measure_importance(tiny_model("llama"), tiny_tokenizer(), begin[:-1], **settings)
    assert importance.layers == again.layers


def test_a_cut_may_change_layers_that_stay() -> None:
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    narrow: Any = {"kind": "width", "num_key_value_heads": 1}
    student = shoal.cut_model(model, plan_of(), changes=[narrow], tokenizer=tiny_tokenizer(), data=TEXTS)
    config: Any = student.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.shoal_kept_layers) == (4, 1, [0, 1, 4, 5])
    assert student(torch.arange(9)[None]).logits.isfinite().all()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():  # a caller's, which training does not follow
        shoal.distill(student, model, TEXTS, tokenizer=tiny_tokenizer(), trainer={"max_steps": 1}, sequence_length=64)


def test_models_tokenizers_and_data_may_be_named(teacher: Path, docs: list[str]) -> None:
    settings: Any = {"num_tokens": 256, "sequence_length": 64}
    named = shoal.measure_importance(str(teacher), data="python_docs", **settings)
    model, tokenizer = loaded(teacher)
    assert named.layers == shoal.measure_importance(model, tokenizer, docs, **settings).layers
    assert named.layers == shoal.measure_importance(model, data={"path": "python_docs"}, **settings).layers
    assert named.provenance.inputs["model"] == str(teacher)


def test_without_data_a_training_has_the_text_and_the_hour_of_a_recipe(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shoal.launch.api.training.machine_rate", lambda ranks: 0.0)
    monkeypatch.setattr("shoal.data.default_text.DefaultText.FEWEST", 512)
    monkeypatch.setitem(TRAINING, "bundled", (TrainingSource("python_docs"),))
    model = tiny_model("llama")
    settings: Any = {"tokenizer": tiny_tokenizer(), "sequence_length": 64}
    with caplog.at_level("INFO"):
        training = shoal.distill(shoal.cut_model(model, [1]), model, **settings)
    assert (training.num_tokens, training.provenance.inputs["distill.num_tokens"]) == (512, 512)
    assert list(training.data["sources"]) == ["python_docs"]
    assert "text, bundled: a model of " in caplog.text
    assert shoal.distill(shoal.cut_model(model, [1]), model, num_tokens=256, **settings).num_tokens == 256


def test_a_model_beside_an_idle_accelerator_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("shoal.models.in_memory.device", lambda: torch.device("cuda"))
    as_model(tiny_model("llama"))
    assert "model: is on the CPU and will compute there, so cuda is not used: call .to('cuda')" in caplog.text


def plan_of(*, num_layers: int = 6, drop: tuple[int, ...] = (2, 3)) -> Plan:
    return Plan(Provenance({}), num_layers, drop, "")


def with_config(model: Any, **settings: Any) -> Any:
    vars(model.config).update(settings)
    return model


def measured(model: Any, tokenizer: Any, **settings: Any) -> Importance:
    return shoal.measure_importance(model, tokenizer, TEXTS, **settings)


def healed(model: PreTrainedModel, tokenizer: Any, data: Any = TEXTS, **settings: Any) -> Training:
    return shoal.distill(shoal.cut_model(model, [1]), model, data, tokenizer=tokenizer, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, t: shoal.choose_layers(Importance(Provenance({}), 6, 1, {}, {}), num_drop=1, ratio=0.5),
            r"shoal.choose_layers: prune: num_drop and ratio exclude each other; give one of them",
        ),
        (
            lambda m, t: shoal.cut_model(m, plan_of(num_layers=8)),
            r"drop: the plan is for 8 layers, but the model has 6",
        ),
        (
            lambda m, t: shoal.cut_model(m, replace(plan_of(), gaps=(ClosedGap(2, 3, 1.5, False, 1, 1, 1, 1),))),
            r"drop: the plan changes layers that stay \(a factor of 1.500 for layers 2 to 3\); load the student",
        ),
        (
            lambda m, t: shoal.push_to_hub(m, t, "me/x", plan=plan_of()),
            r"shoal.push_to_hub: plan: keeps 4 layers, and the model has 6; pass its own",
        ),
        (
            lambda m, t: shoal.push_to_hub(m, WORD, "me/x", plan=plan_of(drop=())),
            r"tokenizer: is str; give a tokenizer",
        ),
        (
            lambda m, t: shoal.push_to_hub(m, t, "me/x", plan=plan_of(drop=()), scores=NUMBER),
            r"scores: is int; give Scores",
        ),
        (lambda m, t: shoal.push_to_hub(m, t, NUMBER, plan=plan_of(drop=())), r"hub_repo: must be a string"),
        (lambda m, t: measured(with_config(m, num_hidden_layers=5), t), r"model: numbers a layer beyond its 5; drop"),
        (lambda m, t: measured(with_config(m, return_dict=False), t), r"model: its config.return_dict is false; set"),
        (lambda m, t: shoal.cut_model(m.model, [1]), r"model: LlamaModel is not a causal language model"),
        (lambda m, t: shoal.cut_model(m, [1], data=["x"]), r"cut_model: data: only changes are decided on text"),
        (lambda m, t: shoal.cut_model(m, [1], tokenizer=WORD), r"tokenizer: is str; give a tokenizer"),
        (
            lambda m, t: healed(m, t, trainer={"save_steps": 5}),
            r"trainer.save_steps: shoal.distill saves nothing; remove it, or use shoal.DistillationTrainer",
        ),
        (
            lambda m, t: healed(m, t, teacher_text=1),
            r"shoal.distill: distill.teacher_text: unknown key; did you mean 'teacher'",
        ),
        (
            lambda m, t: measured(m, t, sweep={"tasks": ["brackets"], "operators": ["mlp"]}),
            r"sweep: a model in memory supports only single layers; remove operators",
        ),
        (
            lambda m, t: measured(m, t, metrics=["task_greedy"]),
            r"measure_importance: task_greedy needs a run directory; pass a recipe to shoal.run",
        ),
        (
            lambda m, t: shoal.distill(m, shoal.cut_model(m, [1]), TEXTS, tokenizer=t),
            r"the teacher is pruned by shoal, and the student is not; pass the pruned model first",
        ),
        (
            lambda m, t: healed(m, t, TEXTS, num_tokens=3000, sequence_length=64, trainer={"warmup_steps": 500}),
            r"warmup_steps: 500 of 12 steps, so the learning rate is never reached; lower it",
        ),
        (lambda m, t: healed(m, t, stream_of(TEXTS)), r"data 'data': is a stream without an end; set num_tokens"),
        (
            lambda m, t: healed(m, t, "python_docs", loss_on="all"),
            r"data 'data': a source sets loss_on itself; remove loss_on",
        ),
    ],
)
def test_what_cannot_work_is_refused(call: Any, message: str) -> None:
    with pytest.raises(shoal.UserError, match=message):
        call(tiny_model("llama"), tiny_tokenizer())


def test_a_plan_is_for_the_weights_that_it_was_made_of_wherever_they_lie(tmp_path: Path) -> None:
    teacher = tiny_model("llama")
    teacher.save_pretrained(tmp_path / "copy")
    copies: list[Any] = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    other: Any = tiny_model("llama")
    other.get_input_embeddings().weight.data.mul_(1.001)  # a few steps of training
    other.config.name_or_path = str(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    inputs = {"model": model_fingerprint(tmp_path / "copy")}
    of_a_run = Plan(Provenance(inputs, model="a/teacher"), 6, (2,), "")
    for plan, name in ((shoal.choose_layers(measured(teacher, tiny_tokenizer()), 1), "llama"), (of_a_run, "a/teacher")):
        assert [shoal.cut_model(copy, plan).config.num_hidden_layers for copy in copies] == [5, 5]
        with pytest.raises(
            shoal.UserError, match=f"drop: the plan is for {name}, and this model has other weights; make"
        ):
            shoal.cut_model(other, plan)
        assert shoal.cut_model(other, plan.drop).config.num_hidden_layers == 5


def test_text_with_a_token_beyond_the_embeddings_is_refused() -> None:
    """Published tokenizers have such tokens, which no text holds; the caller's tokenizer stays as it is."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.add_tokens([f"<z{number}>" for number in range(20)])
    own = {"data": ["<z9> one <z19> two"] * 9, "num_tokens": 64, "sequence_length": 32}
    assert measured(model, tokenizer, num_tokens=64, sequence_length=32).num_layers == 6
    calls = (
        lambda: shoal.measure_importance(model, tokenizer, **own),
        lambda: shoal.distill(shoal.cut_model(model, [1]), model, tokenizer=tokenizer, **own),
        lambda: shoal.cut_model(model, [1], changes=["compensate"], tokenizer=tokenizer, data=own["data"]),
    )
    for call in calls:
        with pytest.raises(
            shoal.UserError, match=r"a text holds '<z19>' \(token id 278\), but the model has only 272 emb"
        ):
            call()
    assert max(tokenizer("<z19>")["input_ids"]) == 278


def test_what_only_a_run_directory_has_a_use_for_is_refused_in_a_sentence() -> None:
    """Every key of the section is taken, or refused: none is read and forgotten."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    named = {"losses", "trainable", "teacher", "data"}
    useless = {field.name for field in fields(Distill)} - {*DistillArguments.__annotations__, *named}
    assert {"deepspeed", "watch"} < useless
    heal: Any = shoal.distill
    for key in useless:
        with pytest.raises(shoal.UserError) as refused:
            heal(model, model, TEXTS, tokenizer=tokenizer, **{key: None})
        assert str(refused.value) == (
            f"shoal.distill: {key}: only works with a run directory; remove it, or call shoal.run with a full recipe"
        )


@pytest.mark.parametrize(
    ("ended", "kind", "message"),
    [
        (LaunchEnded(128 + signal.SIGINT, "stopped; x"), KeyboardInterrupt, "stopped; x"),
        (LaunchEnded(137, ""), RuntimeError, "shoal.run: ended with exit code 137; its message is on stderr, above"),
    ],
)
def test_launched_ranks_that_end_early_are_an_exception(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, ended: LaunchEnded, kind: Any, message: str
) -> None:
    def end(run: Any, launch: Any) -> None:
        raise ended

    monkeypatch.setattr(running, "run_all", end)
    with pytest.raises(kind, match=message):
        # a mapping is the user's own word, of which a file would be asked
        shoal.run({"model": str(teacher), "run_dir": str(tmp_path / "run"), "trust_remote_code": True})


def test_results_are_tables() -> None:
    importance = Importance(
        Provenance({}), 2, 10, {"a": (1.0, 0.25), "b": (3.0, 4.0)}, {"run": ((0.5, 0.75), (1.0,))}, {"b": (0.1, None)}
    )
    frame = importance.to_pandas()
    assert list(frame.columns) == ["layer", "a", "b", "b_error", "run"]
    assert frame["run"].tolist() == [0.5, 0.75]
    assert frame["a"].tolist() == [1.0, 0.25]
    shown = importance._repr_html_()
    assert "<td>0.25</td>" in shown
    assert "<td></td>" in shown
    assert [line.split() for line in repr(importance).splitlines()] == [
        ["importance", "of", "2", "layers", "on", "10", "tokens;", "higher", "=", "keep"],
        ["layer", "a", "b", "b_error", "run"],
        ["0", "1", "3", "0.1", "0.5"],
        ["1", "0.25", "4", "0.75"],
    ]
    odd = replace(importance, layers={"<script>": (1.0, 2.0)})
    assert "<th>&lt;script&gt;</th>" in odd._repr_html_()
    assert "a &lt; b" in replace(plan_of(), reason="a < b")._repr_html_()


def test_large_results_stay_tables_of_a_few_lines() -> None:
    many = {f"metric{number}": tuple(map(float, range(80))) for number in range(30)}
    importance = Importance(Provenance({}), 80, 10, many, {})
    told = repr(importance).splitlines()
    assert len(told) <= 15
    assert told[-1] == "[80 x 31: to_pandas()]"
    assert max(map(len, told)) < 120


def test_a_plan_is_a_table_of_its_layers() -> None:
    importance = Importance(Provenance({}), 6, 10, {"a": (3.0, 1.0, 0.5, 2.0, 9.0, 0.1)}, {})
    plan = shoal.choose_layers(importance, num_drop=2, metric="a")
    assert [tuple(row.values()) for row in plan.rows()] == [
        (0, 3.0, False, "protected"),
        (1, 1.0, True, "least important"),
        (2, 0.5, True, "least important"),
        (3, 2.0, False, ""),
        (4, 9.0, False, ""),
        (5, 0.1, False, "protected"),
    ]
    runs = Importance(Provenance({}), 4, 10, {}, {"angular": ((1.0, 2.0, 3.0, 4.0), (5.0, 2.5, 7.0))})
    plan = shoal.choose_layers(runs, num_drop=2, contiguous=True)
    assert plan.scores == (5.0, 2.5, 7.0, None)
    assert [row["reason"] for row in plan_of().rows()] == ["", "", "named", "named", "", ""]


def test_results_are_kept_in_a_file_or_a_run_directory(tmp_path: Path) -> None:
    plan, other = plan_of(), plan_of(num_layers=8)
    plan.save(tmp_path)
    other.save(str(tmp_path / "other.json"))
    assert (Plan.load(str(tmp_path)), Plan.load(tmp_path / "other.json")) == (plan, other)
    made = shoal.compare(evaluation("teacher"), evaluation("pruned"))
    made.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json").rows() == made.rows()


def test_a_run_directory_is_read_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(shoal.UserError, match=r"no such run directory"):
        Run.load(tmp_path / "none")
    write_run(tmp_path / "run")
    run = Run.load(str(tmp_path / "run"))
    assert run.plan == Plan.load(tmp_path / "run")
    assert list(run.scores) == ["teacher", "pruned", "distilled"]
    assert {row["role"] for row in run.rows()} == {*run.scores}
    run.save(tmp_path / "copy")
    again = Run.load(tmp_path / "copy")
    assert replace(again, folder=run.folder) == run
    assert read_run(again.folder).model == read_run(run.folder).model, "the recipe is kept beside them"
    with pytest.raises(shoal.UserError, match=r"has no model 'distilled'; existing are none"):
        run.model()


def test_a_rate_far_too_high_ends_at_the_first_steps(teacher: Path) -> None:
    model, tokenizer = loaded(teacher)
    with pytest.raises(
        shoal.UserError, match=r"step [2-6]: the loss is .*, more than distill\.stop_on_spike \(10\) times"
    ):
        shoal.distill(
            shoal.cut_model(model, [1]), model, TEXTS, tokenizer=tokenizer, sequence_length=64,
            trainer={"max_steps": 12, "learning_rate": 50},
        )  # fmt: skip


def test_a_student_made_in_inference_mode_is_refused_by_name(teacher: Path) -> None:
    model, tokenizer = loaded(teacher)
    with torch.inference_mode():
        student = shoal.cut_model(model, [1])
    with pytest.raises(shoal.UserError, match=r"model: torch\.inference_mode takes no gradients"):
        shoal.distill(student, model, TEXTS, tokenizer=tokenizer, sequence_length=64, trainer={"max_steps": 1})
