"""The distill stage as a user starts it: subprocesses, one and two ranks, every ZeRO stage, killed and resumed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
import pytest
import torch
from ranks import environment, run_ranks, start_ranks, wait_for
from safetensors.torch import load_file
from training_runs import KEEPING, LENGTH, MANY_STEPS, STEPS, write_recipe
from transformers import AutoModelForCausalLM

from shoal.artifacts.evaluation import Scores, Speed
from shoal.artifacts.importance import Importance
from shoal.artifacts.training import Training
from shoal.ranks import free_port
from shoal.stopping import _alive
from shoal.train.engine.stop import FOLDER

ROOT = Path(__file__).parents[2]
SELDOM = {"save_strategy": "steps", "save_steps": 10}
pytestmark = pytest.mark.slow


def one_rank(**more: str) -> dict[str, str]:
    """What a launcher sets for a world of one: the rank is started directly, which saves the launcher's own start."""
    return environment(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", **{"MASTER_PORT": str(free_port()), **more}
    )


def launch(script: str, path: Path, *overrides: str, ranks: int, env: dict[str, str] | None = None):
    """A script of launch/ under the `deepspeed` program, as a user does it."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), str(ROOT / "launch" / script), "--config", str(path), *overrides]
    return subprocess.run(
        command, env=env or environment(), capture_output=True, text=True, timeout=300, cwd=path.parent, check=False
    )


def distill(path: Path, *overrides: str, ranks: int = 1, env: dict[str, str] | None = None):
    """The distill verb on every rank to its end, without a launcher."""
    arguments = ["distill", "--config", str(path), *overrides]
    return run_ranks(arguments, ranks=ranks, env=env or environment(), cwd=path.parent)


def finished(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def curve(path: Path, steps: int = STEPS) -> list[float]:
    history = [row for row in Training.load(path.parent / "run" / Training.FILE).history if "loss" in row]
    assert [row["step"] for row in history] == list(range(1, steps + 1))
    assert all(abs(row["loss"] - row["forward_kl"]) < 1e-5 for row in history), "the only term is the loss"
    return [row["loss"] for row in history]


@pytest.fixture(scope="session")
def reference(once: Any, tied_teacher: Path) -> Path:
    """One rank, ZeRO 0, fp32, never interrupted."""

    def make(folder: Path) -> None:
        finished(distill(write_recipe(folder, tied_teacher, **KEEPING)))

    return once("reference", make) / "recipe.yaml"


@pytest.fixture(scope="session")
def long_reference(once: Any, pruned: Any) -> Path:
    def make(folder: Path) -> None:
        finished(distill(pruned(folder, steps=MANY_STEPS), "distill.trainer.save_steps=0.5"))

    return once("long_reference", make) / "recipe.yaml"


def test_training_lowers_the_loss_and_writes_a_plain_checkpoint(reference: Path):
    losses = curve(reference)
    assert losses[-1] < 0.6 * losses[0]
    distilled = reference.parent / "run" / "distilled"
    model = AutoModelForCausalLM.from_pretrained(distilled)
    assert model.config.num_hidden_layers == 4
    assert model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight
    student = AutoModelForCausalLM.from_pretrained(reference.parent / "run" / "student")
    assert not torch.equal(model.model.norm.weight, student.model.norm.weight)
    assert {file.suffix for file in distilled.iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize(
    ("zero", "ranks", "ranks_later"),
    [
        ("zero0", 2, 1),
        ("zero3", 2, 1),
        pytest.param("zero1", 1, None, marks=pytest.mark.prove),
        pytest.param("zero2", 1, 2, marks=pytest.mark.prove),
        pytest.param("zero3_offload", 1, None, marks=pytest.mark.prove),
        pytest.param("zero1", 2, None, marks=pytest.mark.prove),
        pytest.param("zero2_offload", 2, None, marks=pytest.mark.prove),
    ],
)
def test_every_zero_stage_and_rank_count_gives_the_same_curve_and_weights(
    reference, pruned, tmp_path, zero, ranks, ranks_later
):
    """Also where the second half is trained under another number of ranks."""
    path = pruned(tmp_path, deepspeed=zero)
    half = "distill.trainer.save_steps=0.5"
    finished(distill(path, half, ranks=ranks))
    same_as(reference, path)
    if ranks_later is not None:
        run_dir = path.parent / "run"
        unfinish(run_dir, keep=STEPS // 2)
        log = finished(distill(path, half, ranks=ranks_later))
        assert f"resuming from {run_dir}/checkpoints/checkpoint-{STEPS // 2}" in log
        assert ("converted for" in log) == (zero != "zero0")
        same_as(reference, path)


@pytest.mark.prove
@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_eight_ranks_train_the_curve_and_weights_of_one(once, pruned, tmp_path, zero):
    batch = ["distill.batch_size=8", f"distill.num_tokens={LENGTH * 8 * STEPS}"]
    alone = once("batch-of-8", lambda folder: finished(distill(pruned(folder), *batch))) / "recipe.yaml"
    path = pruned(tmp_path, deepspeed=zero)
    finished(distill(path, *batch, ranks=8))
    same_as(alone, path)


@pytest.mark.prove
def test_weights_kept_whole_on_every_node_give_the_same_curve(reference, pruned, tmp_path):
    """zero3_nodes, of two nodes of two ranks."""
    config = json.loads((ROOT / "configs/deepspeed/zero3_nodes.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    path = pruned(tmp_path, deepspeed=config)
    finished(distill(path, ranks=4))
    same_as(reference, path)


def same_as(reference: Path, path: Path) -> None:
    """The curve and the weights of the uninterrupted run under one rank."""
    assert curve(path) == pytest.approx(curve(reference), abs=1e-5)
    expected = load_file(reference.parent / "run" / "distilled" / "model.safetensors")
    found = load_file(path.parent / "run" / "distilled" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-4, msg=name)


def unfinish(run_dir: Path, *, keep: int) -> None:
    """As if the run had been killed after step ``keep``."""
    shutil.rmtree(run_dir / "distilled")
    (run_dir / Training.FILE).unlink()
    for checkpoint in (run_dir / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{keep}":
            shutil.rmtree(checkpoint)


@pytest.mark.prove
def test_weight_decay_stays_where_it_belongs_when_zero_3_changes_ranks(pruned, tmp_path):
    """DeepSpeed gives every group the first one's settings there, and one step counter to all."""
    path = pruned(tmp_path, deepspeed="zero3", trainable="from_first_cut")
    settings = ["distill.trainer.weight_decay=5", "distill.trainer.save_steps=0.5"]
    finished(distill(path, *settings))
    whole = load_file(path.parent / "run" / "distilled" / "model.safetensors")
    losses = curve(path)
    unfinish(path.parent / "run", keep=STEPS // 2)
    finished(distill(path, *settings, ranks=2))
    assert curve(path) == pytest.approx(losses, abs=1e-5)
    for name, weight in load_file(path.parent / "run" / "distilled" / "model.safetensors").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.prove
@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 1), (2, 2), (3, 2)])
def test_bf16_stays_near_the_fp32_curve_under_every_zero_stage(reference, pruned, tmp_path, stage, ranks):
    path = pruned(tmp_path)
    finished(
        distill(
            path,
            f"distill.deepspeed=zero{stage}",
            "distill.trainer.save_strategy=no",
            "distill.precision=bf16-mixed",
            ranks=ranks,
        )
    )
    assert curve(path) == pytest.approx(curve(reference), abs=5e-3)
    assert curve(path) != pytest.approx(curve(reference), abs=1e-6), "bf16 was asked for"


@pytest.mark.prove
def test_a_shared_prefix_under_zero_3_and_checkpointing_gives_the_plain_curve(pruned, tmp_path):
    curves = []
    for name, ranks, overrides in [
        ("plain", 1, ["distill.deepspeed=zero0"]),
        ("sharded", 2, ["distill.deepspeed=zero3", "distill.trainer.gradient_checkpointing=true"]),
    ]:
        path = pruned(tmp_path / name, trainable="from_first_cut")
        finished(distill(path, *overrides, "distill.trainer.save_strategy=no", ranks=ranks))
        curves.append(curve(path))
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def start(path: Path, *overrides: str, ranks: int) -> subprocess.Popen[str]:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    script = [str(ROOT / "launch" / "distill.py"), "--config", str(path), *overrides]
    command = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port()), *script]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children(recursive=True)
    running = [child for child in children if _alive(child)]
    return [child for child in running if any("distill.py" in word for word in child.cmdline()[:4])]


def test_a_killed_run_goes_on_with_the_same_curve(long_reference, pruned, tmp_path):
    """Every other process that may be killed is in tests/train/test_faults.py."""
    path = pruned(tmp_path, steps=MANY_STEPS, trainer=SELDOM)
    launcher = start(path, ranks=2)
    checkpoints = path.parent / "run" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("checkpoint-*/manifest.json")), "a first checkpoint")
    processes = ranks_of(launcher)
    assert len(processes) == 2
    processes[-1].kill()
    launcher.wait(timeout=120)
    assert launcher.returncode != 0
    wait_for(lambda: not any(map(_alive, processes)), "the ranks to end")
    assert not (path.parent / "run" / "distilled").exists()

    log = finished(distill(path, ranks=2))
    assert "resuming from" in log
    assert curve(path, MANY_STEPS) == pytest.approx(curve(long_reference, MANY_STEPS), abs=1e-4)


@pytest.mark.prove
def test_a_stopped_rank_is_named_and_the_run_goes_on_under_the_ranks_that_are_left(long_reference, pruned, tmp_path):
    path = pruned(tmp_path, steps=MANY_STEPS)
    arguments = ["distill", "--config", str(path), "distill.trainer.ddp_timeout=8"]
    with TemporaryFile("w+") as said:
        waiting, late = start_ranks(arguments, ranks=2, env=environment(), cwd=tmp_path, log=said)
        checkpoints = path.parent / "run" / "checkpoints"
        wait_for(lambda: list(checkpoints.glob("checkpoint-*/manifest.json")), "a first checkpoint")
        psutil.Process(late.pid).suspend()
        waiting.join(60)
        late.kill()
        said.seek(0)
        log = said.read()
    assert waiting.exitcode
    assert f"rank 1 (host {socket.gethostname()}, process {late.pid}) does not respond" in log
    assert "the same command resumes from what is saved" in log
    assert "resuming from" in finished(distill(path))
    assert curve(path, MANY_STEPS) == pytest.approx(curve(long_reference, MANY_STEPS), abs=1e-4)


def test_a_stopped_rank_is_named_where_nothing_is_trained_too(pruned, tmp_path):
    path = pruned(tmp_path)
    arguments = ["measure", "--config", str(path), "distill.trainer.ddp_timeout=8"]
    with TemporaryFile("w+") as said:
        waiting, late = start_ranks(arguments, ranks=2, env=environment(), cwd=tmp_path, log=said)
        wait_for((path.parent / "run" / FOLDER / "1.json").is_file, "the second rank's first beat")
        psutil.Process(late.pid).suspend()
        waiting.join(60)
        late.kill()
        said.seek(0)
        assert f"process {late.pid}) does not respond" in said.read()
    assert waiting.exitcode


def test_sigterm_saves_and_the_same_command_goes_on_with_equal_bits(long_reference, pruned, tmp_path):
    path = pruned(tmp_path, steps=MANY_STEPS, trainer=SELDOM)
    with TemporaryFile("w+") as said:
        (rank,) = start_ranks(["distill", "--config", str(path)], ranks=1, env=environment(), cwd=tmp_path, log=said)
        checkpoints = path.parent / "run" / "checkpoints"
        wait_for(lambda: list(checkpoints.glob("checkpoint-*/manifest.json")), "a first checkpoint")
        rank.terminate()
        rank.join(120)
        said.seek(0)
        log = said.read()
    assert rank.exitcode == 143, log[-2000:]
    assert re.search(r"stopped at step \d+ of 60 \(SIGTERM\), saved; the same command resumes", log)
    assert "resuming from" in finished(distill(path))
    assert curve(path, MANY_STEPS) == curve(long_reference, MANY_STEPS)
    ours, theirs = (load_file(p.parent / "run" / "distilled" / "model.safetensors") for p in (path, long_reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stage(verb: str, path: Path, *overrides: str, ranks: int) -> None:
    finished(run_ranks([verb, "--config", str(path), *overrides], ranks=ranks, env=environment(), cwd=path.parent))


@pytest.mark.prove
@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_measure_the_numbers_of_one_and_go_on_where_one_was_killed(teacher, tmp_path, ranks):
    few = ["measure.num_tokens=700", "measure.sequence_length=100"]
    tasks = "tasks: [knowledge_continuation, knowledge_generation], limit: 25"
    few += [f"measure.sweep={{{tasks}}}", "eval.batch_size=1"]
    paths = [write_recipe(tmp_path / name, teacher) for name in ("one", "all")]
    stage("measure", paths[0], *few, ranks=1)
    interrupted = kill_in_the_middle_of_a_sweep(paths[1], *few)
    stage("measure", paths[1], *few, ranks=ranks)
    one, two = (Importance.load(path.parent / "run" / Importance.FILE) for path in paths)
    assert one.num_tokens == two.num_tokens
    for name, scores in one.layers.items():
        assert two.layers[name] == pytest.approx(scores, abs=1e-9)
    for name, rows in one.runs.items():
        for row, other in zip(rows, two.runs[name], strict=True):
            assert other == pytest.approx(row, abs=1e-9)
    for file in ("knowledge_generation", "knowledge_continuation"):
        scores, others = (
            json.loads((tmp_path / rank / f"run/sweep/layer/{file}.json").read_text()) for rank in ("one", "all")
        )
        assert others["ids"] == scores["ids"]
        assert others["baseline"] == pytest.approx(scores["baseline"], abs=1e-5)
        for unit, items in scores["without"].items():
            assert others["without"][unit] == pytest.approx(items, abs=1e-5)
    answers = [(tmp_path / f"all/run/sweep/layer/answers-{rank}.jsonl").read_text() for rank in range(ranks)]
    assert answers[0].startswith(interrupted)  # nothing was begun anew
    assert all(len(text.splitlines()) > 4 / ranks for text in answers)


def kill_in_the_middle_of_a_sweep(path: Path, *overrides: str) -> str:
    """What one rank had answered until it was killed; its last, half written line aside."""
    answers = path.parent / "run/sweep/layer/answers-0.jsonl"
    script = [sys.executable, str(ROOT / "launch/measure.py"), "--config", str(path), *overrides]
    process = subprocess.Popen(script, env=one_rank(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not answers.exists() or "\n" not in answers.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (path.parent / "run" / Importance.FILE).exists()
    written = answers.read_text()
    return written[: written.rindex("\n") + 1]


@pytest.mark.prove
@pytest.mark.parametrize("many", [2, 8])
def test_ranks_evaluate_to_the_numbers_of_one(teacher, tmp_path, many):
    found = []
    small = ["eval.limit=9", "eval.perplexity_tokens=700", "eval.batch_size=4"]
    tasks = "eval.tasks=[knowledge_continuation, retrieval_generation]"
    for ranks in (1, many):
        path = write_recipe(tmp_path / str(ranks), teacher)
        if ranks == 2:
            finished(launch("eval.py", path, *small, tasks, "eval.speed=false", ranks=2))
        else:
            stage("eval", path, *small, tasks, "eval.speed=false", ranks=ranks)
        found.append(Scores.load(path.parent / "run" / "eval" / "teacher.json"))
    for one, two in zip(found[0].tasks, found[1].tasks, strict=True):
        assert (one.task, one.n) == (two.task, two.n)
        assert two.score == pytest.approx(one.score, abs=1e-5)
        assert [(item.id, item.prediction) for item in one.items] == [(item.id, item.prediction) for item in two.items]


@pytest.mark.prove
def test_the_control_is_trained_after_the_student_and_scored_beside_it(pruned, tmp_path):
    path = pruned(tmp_path, trainable="from_first_cut", losses=[{"kind": "cross_entropy"}])
    tasks = ["eval.tasks=[knowledge_continuation]", "eval.limit=4", "eval.perplexity_tokens=200"]
    control = [*tasks, "eval.control=true"]
    log = finished(launch("distill.py", path, *control, ranks=1))
    assert "after the student the teacher is trained on the same rows" in log
    stage("eval", path, *control, ranks=1)
    found = path.parent / "run" / "eval"
    roles = {role: Scores.load(found / f"{role}.json") for role in ("teacher", "pruned", "control", "distilled")}
    assert {evaluation.role: evaluation.num_layers for evaluation in roles.values()} == {
        "teacher": 6,
        "pruned": 4,
        "control": 6,
        "distilled": 4,
    }
    assert roles["control"].tasks[-1].score < roles["teacher"].tasks[-1].score, "it has read text of the same kind"
    assert Speed.load(found / "speed.json").roles.keys() == {"teacher", "pruned", "distilled"}


@pytest.mark.prove
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_gpu_gives_the_curve_of_the_cpu(reference, pruned, tmp_path, zero):
    path = pruned(tmp_path)
    env = environment()
    del env["DS_ACCELERATOR"]
    finished(launch("distill.py", path, f"distill.deepspeed=zero{zero}", ranks=1, env=env))
    assert curve(path) == pytest.approx(curve(reference), abs=1e-3)
