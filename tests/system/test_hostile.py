"""Wrong and hostile input of every kind: exit code 2, one message that begins as it should, and nothing left behind."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import set_json

from shoal.launch import cli
from shoal.launch.cli import main

DEEP = "[" * 20_000 + "]" * 20_000
LONG = "a" * 300
Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher around the command, none that it could start, and a folder of its own."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(cli, "launch_ranks", refuse)
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [])  # one of them writes to an earlier test's stream
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path
) -> Callable[[str, str | bytes, list[str]], str]:
    """The one message with which `shoal VERB` ends on a recipe and overrides; MODEL and RUN stand for folders."""

    def command(verb: str, recipe: str | bytes, overrides: list[str]) -> str:
        run_dir = tmp_path / "run"
        before = sorted(run_dir.rglob("*"))
        names = {"MODEL": str(teacher), "RUN": str(run_dir), "HERE": str(tmp_path)}

        def filled(text: str) -> str:
            for name, value in names.items():
                text = text.replace(name, value)
            return text

        if isinstance(recipe, str):
            text = recipe if recipe.startswith("model:") else f"model: MODEL\nrun_dir: RUN\n{recipe}"
            recipe = filled(text).encode()
        (tmp_path / "recipe.yaml").write_bytes(recipe)
        with pytest.raises(SystemExit) as ended:
            main([verb, "--config", "recipe.yaml", *map(filled, overrides)])
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        assert "Traceback" not in said
        assert said.count("shoal: error: ") == 1
        assert sorted(run_dir.rglob("*")) == before
        message = said[said.index("shoal: error: ") + len("shoal: error: ") :]
        for name, value in names.items():
            message = message.replace(value, name)
        return message

    return command


# --- recipes ------------------------------------------------------------------------------------------------------

YAML = "recipe.yaml: is not valid YAML: "
BOMB = "\n".join(
    ["a: &a [x, x]", *(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(20))]
)
RECIPES: list[tuple[str | bytes, str]] = [
    (b"", "recipe.yaml: must be a mapping of settings, got nothing"),
    (b"- a", "recipe.yaml: must be a mapping of settings, got list"),
    (b"\x00\x01\xff", YAML),
    ("model: a\nrun_dir: b".encode("utf-16"), YAML),
    ("a: !!python/object/apply:os.system [touch PWNED]", f"{YAML}could not determine a constructor"),
    (BOMB, "recipe.yaml: a: unknown key"),
    ("a: &a [*a]", f"{YAML}found unconstructable recursive node"),
    ("a: " + DEEP, f"{YAML}maximum recursion depth"),
    ("---\na: 1\n---\nb: 2", f"{YAML}expected a single document"),
    ("seed: 1\nseed: 2", f"{YAML}key 'seed' appears twice"),
    ("prune:\n\tdrop: [1]", f"{YAML}while scanning"),
    ("<<: 3", f"{YAML}while constructing a mapping"),
    ('revision: "a\\0b"', f"{YAML}a text holds the character NUL"),
    (f"seed: {'9' * 5000}", YAML),
    ("mоdel: x", "recipe.yaml: mоdel: unknown key, written m\\u043edel; did you mean 'model'?"),
    *((f"{name}: x", f"recipe.yaml: {name}: must be a mapping") for name in ("measure", "distill")),
    *((f"{name}: []", f"recipe.yaml: {name}: must be a mapping") for name in ("prune", "eval", "track", "export")),
    ("seed: .nan", "recipe.yaml: seed: must be a finite number"),
    ("seed: true", "recipe.yaml: seed: must be a whole number (got True)"),
    ("measure: {num_tokens: true}", "recipe.yaml: measure.num_tokens: must be a whole number (got True)"),
    ("measure: {batch_size: '8'}", "recipe.yaml: measure.batch_size: must be a whole number (got '8')"),
    ("measure: {num_tokens: 1.5}", "recipe.yaml: measure.num_tokens: must be a whole number"),
    (f"measure: {{num_tokens: {10**26}}}", "recipe.yaml: measure.num_tokens: must be less than"),
    (f"measure: {{batch_size: {10**20}}}", "recipe.yaml: measure.batch_size: must be less than"),
    ("measure: {num_tokens: 1000000000000}", "measure.num_tokens: 1,000,000,000,000 tokens take 8 TB of memory"),
    ("eval: {control: 'yes'}", "recipe.yaml: eval.control: must be a boolean"),
    ("eval: {control: 1}", "recipe.yaml: eval.control: must be a boolean"),
    ("prune: {drop: [true]}", "recipe.yaml: prune.drop.0: must be a whole number"),
    ("prune: {drop: ['1']}", "recipe.yaml: prune.drop.0: must be a whole number"),
    ("distill: {stop_on_spike: 1e999}", "recipe.yaml: distill.stop_on_spike: must be a finite number"),
    ("distill: {losses: [{kind: forward_kl, weight: .inf}]}", "recipe.yaml: distill.losses.0.weight: must be a finite"),
    ("eval: {limit: {retrieval_continuation: '3'}}", "recipe.yaml: eval.limit: must be a whole number"),
    ("revision: main", "model 'MODEL': is not on the Hub and has no revision 'main'"),
]


@pytest.mark.sample(6)
@pytest.mark.parametrize(("recipe", "words"), RECIPES)
def test_recipes(refused: Any, recipe: str | bytes, words: str, tmp_path: Path) -> None:
    assert refused("measure", recipe, []).startswith(words)
    assert not (tmp_path / "PWNED").exists()


def test_numbers_that_yaml_writes_in_another_way_are_numbers(refused: Any) -> None:
    """2e5 is a whole number, 1 a weight and a list a tuple: what is refused here is the data."""
    recipe = "measure: {num_tokens: 2e5, data: {path: none.jsonl, weight: 1}, metrics: [angular]}"
    assert refused("measure", recipe, []).startswith("data 'none.jsonl': no such file")


# --- overrides ----------------------------------------------------------------------------------------------------


def trainer(argument: str) -> list[str]:
    return ["distill.sequence_length=64", "prune.drop=[1]", f"distill.trainer.{argument}"]


OVERRIDES: list[tuple[str, list[str], str]] = [
    ("prune", ["nonsense"], "override 'nonsense': must have the form section.key=value"),
    ("prune", ["prune.drop=[1,"], "override 'prune.drop=[1,': the value is not valid YAML"),
    ("prune", ["seed.a=1"], "recipe.yaml"),
    ("prune", ["prune.drop.7=1"], "recipe.yaml"),
    ("prune", [f"model={LONG}"], "aaa"),
    *((verb, [f"run_dir={LONG}"], "aaa") for verb in ("measure", "prune", "eval", "distill", "report", "run")),
    ("prune", ["run_dir=/proc/no/such"], "/proc/no/such: cannot be made"),
    ("measure", [f"measure.data={LONG}"], "aaa"),
    ("distill", [f"distill.deepspeed={LONG}"], "aaa"),
    ("distill", ["prune.drop=[99]"], "prune.drop: 99 is no layer of this model"),
    ("distill", ["prune.drop=[1]", "distill.data=none.jsonl"], "data 'none.jsonl': no such file"),
    ("record", [], "distill.teacher: is live, and nothing is recorded of it; add distill.teacher=recorded"),
    *(
        (
            "distill",
            trainer(f"learning_rate={value}"),
            "distill.trainer.learning_rate: ",
        )
        for value in ("fast", "-1", ".nan", ".inf", "1e300", "true", "'1e-4'", "null", "[1]")
    ),
    *(
        ("distill", trainer(argument), f"distill.trainer.{argument.partition('=')[0]}: ")
        for argument in (
            "weight_decay=.inf",
            "warmup_steps=-3",
            "max_steps=1.5",
            "max_steps=-7",
            "adam_beta1=1",
            "adam_beta2=-0.1",
            "adam_epsilon=.nan",
            "max_grad_norm=x",
            "num_train_epochs=0",
            "logging_steps=0",
            "save_steps=x",
            "save_total_limit=0",
            "gradient_accumulation_steps=0",
            "gradient_checkpointing=maybe",
            "gradient_checkpointing_kwargs=x",
        )
    ),
    ("distill", trainer("lerning_rate=1"), "distill.trainer.lerning_rate: no such training argument"),
    ("eval", ["eval.include_path=nowhere"], "eval.include_path: 'nowhere' is no folder"),
    (
        "run",
        ["eval.limit={knowledge_loglikelihood: 3}"],
        "eval.limit: 'knowledge_loglikelihood' is not among the evaluated tasks",
    ),
    ("prune", ["prune.drop=[1]", 'revision="x"', "model=demo:smollm2-135m"], "model 'demo:smollm2-135m': is not on"),
]


@pytest.mark.sample(6)
@pytest.mark.parametrize(("verb", "overrides", "words"), OVERRIDES)
def test_overrides(refused: Any, verb: str, overrides: list[str], words: str) -> None:
    message = refused(verb, "", overrides)  # what the reader refuses stands behind the override that says it
    assert message.startswith(words) or f"': {words}" in message


def test_dry_run_checks_the_trainer_too(capsys: pytest.CaptureFixture[str], teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {teacher}\nrun_dir: run\nprune: {{drop: [1]}}\n")
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--config", "recipe.yaml", "--dry-run", "distill.trainer.learning_rate=-1"])
    assert ended.value.code == 2
    assert "distill.trainer.learning_rate: must be from 0 to below 100" in capsys.readouterr().err


# --- models -------------------------------------------------------------------------------------------------------


def put(name: str, content: bytes | str) -> Damage:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def indexed(text: str) -> Damage:
    """Damage of an index, which counts where there is no single file."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        put(INDEX, text)(folder)

    return damage


def said_of(**settings: Any) -> Damage:
    return lambda model: set_json(model / "config.json", **settings)


def cut(name: str, size: int) -> Damage:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:size])


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def with_code(model: Path) -> None:
    set_json(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    (model / "evil.py").write_text("from pathlib import Path\nPath('PWNED').touch()\nclass C: ...")


CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
MODELS: dict[str, tuple[Damage, str]] = {
    "none": (lambda model: (model / CONFIG).unlink(), "model: has no config.json"),
    "a folder": (lambda model: ((model / CONFIG).unlink(), (model / CONFIG).mkdir()), "model: has no config.json"),
    "cut": (cut(CONFIG, 50), "model/config.json: is not valid JSON"),
    "empty": (put(CONFIG, ""), "model/config.json: is not valid JSON"),
    "list": (put(CONFIG, "[1]"), "model/config.json: must be a mapping of settings, got list"),
    "null": (put(CONFIG, "null"), "model/config.json: must be a mapping of settings, got NoneType"),
    "binary": (put(CONFIG, b"\xff\xfe\x00"), "model/config.json: is not valid JSON"),
    "deep": (put(CONFIG, DEEP), "model/config.json: is not valid JSON"),
    "-4 layers": (said_of(num_hidden_layers=-4), "model: config.json says num_hidden_layers: -4"),
    "no layers": (said_of(num_hidden_layers=0), "model: config.json says num_hidden_layers: 0"),
    "many layers": (said_of(num_hidden_layers=10**12), "model: config.json says num_hidden_layers: 1000000000000"),
    "text layers": (said_of(num_hidden_layers="six"), "model: config.json cannot be used"),
    "more layers": (said_of(num_hidden_layers=8), "model: the weights of model.layers.6."),
    "hidden": (said_of(hidden_size=64), "model: the weights do not have the shapes"),
    "hidden < 0": (said_of(hidden_size=-32), "llama: config.json gives a negative size"),
    "no heads": (said_of(num_attention_heads=0), "model: config.json cannot be used"),
    "no vocabulary": (said_of(vocab_size=10), "llama: cannot be built as config.json says (AssertionError"),
    "activation": (said_of(hidden_act="nope"), "llama: cannot be built as config.json says (KeyError"),
    "type": (said_of(model_type="nope"), "model: this transformers does not know the architecture"),
    "T5": (
        put(CONFIG, json.dumps({"model_type": "t5", "num_layers": 2, "architectures": ["T5ForConditionalGeneration"]})),
        "t5: is no causal language model",
    ),
    "BERT": (
        put(CONFIG, json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]})),
        "model: BertForMaskedLM is no causal language model",
    ),
    "code": (with_code, "model: needs code that comes with the checkpoint"),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), "model: has neither model.safetensors nor"),
    "pickled": (pickled, "model: has neither model.safetensors nor model.safetensors.index.json"),
    "torn": (cut(WEIGHTS, -1), "model/model.safetensors: is damaged"),
    "huge header": (put(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), "model/model.safetensors: is damaged"),
    "list header": (put(WEIGHTS, struct.pack("<Q", 2) + b"[]"), "model/model.safetensors: is damaged"),
    "deep header": (put(WEIGHTS, struct.pack("<Q", 40_000) + DEEP.encode()), "model/model.safetensors: is damaged"),
    "index cut": (indexed('{"weight_map": {'), "model/model.safetensors.index.json: is damaged"),
    "index deep": (indexed(DEEP), "model/model.safetensors.index.json: is damaged"),
    "index numbers": (indexed('{"weight_map": {"a": 1}}'), "model/model.safetensors.index.json: is damaged"),
    "index outside": (indexed('{"weight_map": {"a": "../x"}}'), "model/model.safetensors.index.json: is damaged"),
    "index missing": (indexed('{"weight_map": {"a": "x"}}'), "model/x: is named by the checkpoint's index"),
    "adapter": (put("adapter_config.json", DEEP), "model/adapter_config.json: is not valid JSON"),
    "tokenizer list": (put("tokenizer_config.json", "[]"), "model/tokenizer_config.json: must be a mapping"),
    "tokenizer deep": (put("tokenizer_config.json", DEEP), "model/tokenizer_config.json: is not valid JSON"),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", MODELS)
def test_models(refused: Any, teacher: Path, tmp_path: Path, name: str) -> None:
    damage, words = MODELS[name]
    damage(Path(shutil.copytree(teacher, tmp_path / "model")))
    said = refused("prune", "prune: {drop: [1]}", ["model=HERE/model"])
    assert said.removeprefix("HERE/").startswith(words)
    assert not (tmp_path / "PWNED").exists()


# --- data ---------------------------------------------------------------------------------------------------------

DATA: list[tuple[str, bytes, str, str]] = [
    ("a.jsonl", b"", "", "the file is empty"),
    ("a.jsonl", b'{"text": "a"}\n{"tex', "", "cannot be read"),
    ("a.jsonl", b'{"text": ', "", "cannot be read"),
    ("a.jsonl", b'{"other": "a"}\n', "", "begins with dict of the columns other"),
    ("a.jsonl", b'{"text": 3}\n', "", "column 'text' holds int, not text"),
    ("a.jsonl", b'{"text": " "}\n', "", "holds no text in column 'text'"),
    ("a.parquet", b"PAR1 no", "", "cannot be read"),
    ("a.txt", b"\xff\xfe\x00", "", "cannot be read"),
    ("a.exe", b"text", "", "cannot read '.exe' files"),
    ("a.jsonl", b'{"messages": 3}\n', "", "holds conversations"),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("name", "content", "more", "words"), DATA)
def test_data(refused: Any, tmp_path: Path, name: str, content: bytes, more: str, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    said = refused("measure", f"measure: {{data: {{path: {name}{', ' * bool(more)}{more}}}}}", [])
    assert said.startswith("data ")
    assert words in said
    assert "bundled sources are" not in said, "the file is there"


# --- run directories ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("plan.json", DEEP, "RUN/plan.json: is not valid JSON"),
        ("plan.json", "{", "RUN/plan.json: is not valid JSON"),
        ("plan.json", "[]", "RUN/plan.json: is no shoal/plan/1, its schema is None"),
        ("plan.json", None, "RUN/plan.json: a folder is in the way"),
        ("importance.json", None, "RUN/importance.json: a folder is in the way"),
    ],
)
def test_run_directories(refused: Any, tmp_path: Path, name: str, content: str | None, words: str) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}")
    file = tmp_path / "run" / name
    (tmp_path / "run" / ".lock").touch()
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    verb = "prune" if name == "plan.json" else "measure"
    assert refused(verb, "prune: {drop: [1]}", []).startswith(words)


def test_a_file_in_the_way_of_the_run_directory(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        assert refused("prune", "prune: {drop: [1]}", [f"run_dir=HERE/{place}"]).startswith("HERE/file")


@pytest.mark.slow
def test_training_without_the_student_that_was_deleted(refused: Any, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"model: {teacher}\nrun_dir: run\nprune: {{drop: [1]}}\ntrack: {{wandb: off}}\n"
    )
    assert cli.run_verb("prune", "recipe.yaml", []) == 0
    shutil.rmtree(tmp_path / "run" / "student")
    said = refused("distill", "prune: {drop: [1]}\ntrack: {wandb: off}", [])
    assert said.startswith("RUN/student: is gone; run `shoal prune`")


# --- command lines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["prun", "--config", "r"], "prun: no such verb; did you mean 'prune'?"),
        (["prune"], "name a recipe, a run directory or a model, such as `shoal prune runs/mine`"),
        (["eval", "--config", "r", "--force"], "--force: `shoal eval` has no such option"),
        (["prune", "--config", "nothing.yaml"], "nothing.yaml: no such recipe file"),
        (["prune", "--config", "."], ".: is no run directory but a folder without recipe.yaml"),
        (["report", "runs/x", "runs/y"], "override 'runs/y': must have the form section.key=value"),
        (["prune", "--config", f"{LONG}.yaml"], "cannot be a path (File name too long)"),
        (["compare", "/nowhere", "/nothing"], "/nowhere"),
    ],
)
def test_command_lines(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert "Traceback" not in said


def test_a_reader_that_leaves_early_ends_nothing() -> None:
    """`| head -1` closes the pipe; the command goes on with what it writes to files."""
    script = "from shoal.launch.cli import _print\nfor _ in range(3): _print('x' * 100_000)\nopen('done', 'w').close()"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{script}" | head -c 1 > /dev/null; echo "${{PIPESTATUS[0]}}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0\n"
    assert done.stderr == ""
    assert Path("done").is_file()
