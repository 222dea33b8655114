"""What `auto` means: by device, kept by a run directory, and told."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases

from shoal import machine
from shoal.errors import UserError
from shoal.launch.verbs import pace
from shoal.launch.verbs import run as runs
from shoal.launch.verbs.launch import STARTED
from shoal.launch.verbs.run import Run, locked, open_run
from shoal.machine import Choice, bfloat16_instructions, fast_dtype
from shoal.recipe.distill import Live
from shoal.recipe.recipe import parse_recipe
from shoal.train.preflight.memory import NotEstimated

CASES = cases(__file__)
CPU = torch.device("cpu")
DEVICE = torch.device("cuda")


@pytest.mark.parametrize(("told", "expected"), CASES["cpuinfo"])
def test_a_processor_multiplies_fast_in_bfloat16_by_its_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, expected: str
) -> None:
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert bfloat16_instructions(CPU) == expected


def test_a_limit_of_a_group_around_that_of_this_process_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/job_7/step_0\n")
    (tmp_path / "job_7" / "step_0").mkdir(parents=True)
    for name, told in {"max": "3000", "current": "2000", "stat": "active_file 30\nanon 9"}.items():
        (tmp_path / "job_7" / f"memory.{name}").write_text(told)
    (tmp_path / "job_7" / "step_0" / "memory.max").write_text("max")
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUP", tmp_path / "own")
    assert machine.available_memory() == 1030


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), "bfloat16"), ((7, 5), "float16"), ((6, 1), "float32")])
def test_a_gpu_computes_in_what_it_has_instructions_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(machine, "card", lambda index: machine.Card("a card", capability))
    monkeypatch.setattr(machine, "bfloat16_instructions", bfloat16_instructions)
    assert fast_dtype(DEVICE).dtype == expected


# --- what a run computes in ---------------------------------------------------------------------------------------


def recipe(tmp_path: Path, **settings: Any) -> Any:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    return parse_recipe({"model": str(tmp_path), "run_dir": str(tmp_path / "run"), **settings})


@pytest.fixture
def fast_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "bfloat16_instructions", lambda device: "amx_bf16")


@pytest.mark.parametrize(("stage", "expected"), [(0, "fp16-mixed"), (2, "float32")])
def test_auto_is_no_float16_where_sharding_would_clip_scaled_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, expected: str
) -> None:
    monkeypatch.setattr(runs, "fast_dtype", lambda _: Choice("float16", "Volta multiplies fast in it"))
    run = open_run(recipe(tmp_path, distill={"deepspeed": f"zero{stage}"}))
    assert (run.recipe.dtype, run.recipe.distill.precision) == ("float16", expected)
    assert run.numerics is not None
    assert ("float16 works only under ZeRO 0" in run.numerics.reason) == (stage == 2)


@pytest.mark.usefixtures("fast_half")
def test_every_auto_is_settled_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = open_run(recipe(tmp_path, distill={"teacher": {"kind": "live", "dtype": "fast"}}))
    distill = run.recipe.distill
    assert distill.teacher == Live(dtype="bfloat16")
    assert (run.recipe.dtype, distill.precision) == ("bfloat16", "bf16-mixed")
    assert run.numerics is not None
    assert "multiplies fast in bfloat16" in run.numerics.reason
    assert f"precision: bfloat16, training in bf16-mixed ({run.numerics.reason})" in caplog.text


@pytest.mark.usefixtures("fast_half")
@pytest.mark.parametrize(
    ("made_with", "said", "chosen"),
    [
        (None, {}, ("sdpa", "flash needs a CUDA GPU, and this device is cpu")),
        ("eager", {}, ("eager", "importance.json of this run directory was made with eager")),
        ("eager", {"attn_implementation": "sdpa"}, ("sdpa", "set by the recipe")),
    ],
)
def test_attention_is_what_the_run_was_begun_with_or_what_the_device_can(
    made_with: str | None,
    said: dict[str, Any],
    chosen: tuple[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    if made_with is not None:
        made(tmp_path, "importance.json", {"attention": made_with})
    run = open_run(recipe(tmp_path, **said))
    assert run.numerics is not None
    assert (run.recipe.attn_implementation, run.numerics.attention_reason) == chosen
    assert run.load_args()["attention"] == chosen[0]
    assert (f"attention: {chosen[0]} ({chosen[1]})" in caplog.text) == (not said)


@pytest.mark.usefixtures("fast_half")
@pytest.mark.parametrize(("kind", "begun", "warned"), [("cuda", "", 1), ("cuda", "by a command", 0), ("cpu", "", 0)])
def test_masks_on_a_gpu_are_warned_of_by_who_starts_the_ranks(
    kind: str,
    begun: str,
    warned: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "device", lambda: torch.device(kind))
    monkeypatch.setattr(runs, "device_name", lambda _: "a card")
    monkeypatch.setattr(machine, "device_name", lambda _: "a card")
    if begun:
        monkeypatch.setenv(STARTED, begun)
    open_run(recipe(tmp_path, attn_implementation="sdpa"))
    open_run(recipe(tmp_path), computes=False)
    told = "attention: sdpa uses masks for packed rows; a training step takes about 1.8 times that with flash"
    assert caplog.text.count(told) == warned


def made(tmp_path: Path, name: str, inputs: dict[str, Any], *, bare: bool = False) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"inputs": inputs} if bare else {"internal": {"inputs": inputs}}))


@pytest.mark.usefixtures("fast_half")
@pytest.mark.parametrize("name", ["importance.json", "distill.json", "eval/teacher.json"])
def test_a_run_directory_goes_on_in_what_it_was_begun_in(tmp_path: Path, name: str) -> None:
    made(tmp_path, name, {"dtype": "float32"})
    run = open_run(recipe(tmp_path))
    assert run.recipe.dtype == "float32"
    assert run.recipe.distill.precision == "bf16-mixed", "of training that file says nothing"
    assert run.numerics is not None
    assert f"{name} of this run directory was made in float32" in run.numerics.reason
    inputs = {"dtype": "float32", "distill.precision": "float32"}
    made(tmp_path, "checkpoints/checkpoint-3/manifest.json", inputs, bare=True)
    assert open_run(recipe(tmp_path)).recipe.distill.precision == "float32", "that of its checkpoint"


# --- sizes that follow the machine's speed -------------------------------------------------------------------------

SIZES = {
    "max_minutes": 10,
    "measure": {"num_tokens": 8192},
    "distill": {"num_tokens": 81_920, "watch": {"perplexity_tokens": 4096}},
    "eval": {"limit": {"default": 100, "reasoning_continuation": 7}, "perplexity_tokens": 8192},
}


@pytest.mark.parametrize(("name", "tflops", "terabytes"), CASES["gpus"])
def test_a_gpu_is_known_by_its_name_and_then_not_measured(
    name: str, tflops: float | None, terabytes: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "device_name", lambda _: name)
    monkeypatch.setattr(machine, "_asked", lambda question, about: 1.0)
    sheet = machine.data_sheet(torch.device("cuda", 0))
    assert (sheet and sheet.half) == (tflops and tflops * 1e12)
    assert sheet is None or sheet.memory / 1e12 == terabytes
    rate = machine.flops_per_second(torch.device("cuda", 0), torch.bfloat16)
    assert rate == (1.0 if tflops is None else tflops * 1e12)


def sizes(run: Run) -> list[int | None]:
    distill, scores = run.recipe.distill, run.recipe.eval
    assert distill.watch is not None
    assert isinstance(scores.limit, dict)
    trained = [run.recipe.measure.num_tokens, distill.num_tokens, distill.watch.perplexity_tokens]
    return [*trained, *scores.limit.values(), scores.perplexity_tokens]


def takes(monkeypatch: pytest.MonkeyPatch, minutes: float) -> None:
    """The whole recipe takes so many minutes, half of them for scores."""

    def seconds(run: Run) -> float:
        limits = run.recipe.eval.limit
        assert isinstance(limits, dict)
        return 30 * minutes * (run.recipe.distill.budget / 81_920 + (limits["default"] or 0) / 100)

    monkeypatch.setattr(pace, "run_seconds", lambda *runs: [seconds(run) for run in runs])


@pytest.mark.parametrize(
    ("minutes", "share", "expected"),
    [
        (10.2, 1.0, [8192, 81_920, 4096, 100, 7, 8192]),
        (14, 0.6, [4916, 49_152, 2458, 60, 7, 4916]),
        (20, 0.3, [2458, 24_576, 1229, 60, 7, 2458]),
        (90, 0.2, [1639, 16_384, 820, 60, 7, 1639]),
    ],
)
def test_sizes_follow_the_time_that_the_run_would_take(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, share: float, expected: list[int]
) -> None:
    takes(monkeypatch, minutes)
    run = open_run(recipe(tmp_path, model=str(teacher), **SIZES))
    assert sizes(run) == expected
    assert run.recipe.max_minutes is None, "settled sizes are not settled again"
    assert run.numerics is not None
    assert run.numerics.size == share
    told = re.search(r"about ([\d.]+) min if .* would take ([\d.]+) min on", run.numerics.size_reason)
    assert bool(told) == (share < 1)
    if told:
        settled = 30 * minutes * (share + max(share, 0.6)) / 60
        assert settled - 0.5 <= float(told[1]) <= max(10, settled) + 0.5, "above what it takes, and within what it may"


@pytest.mark.sample(2)
@pytest.mark.parametrize(("first", "then"), [(100, 1), (1, 100)])
def test_a_run_directory_keeps_its_sizes_on_another_machine(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, first: float, then: float
) -> None:
    takes(monkeypatch, first)
    begun = open_run(recipe(tmp_path, model=str(teacher), **SIZES))
    with pytest.raises(UserError), locked(begun):
        raise UserError("refused, so that nothing is kept")
    assert not begun.dir.exists()
    reading = open_run(recipe(tmp_path, model=str(teacher), **SIZES), computes=False)
    assert reading.numerics is not None
    assert reading.numerics.max_minutes is None, "a report works out no sizes, and there are none to keep"
    with pytest.raises(KeyboardInterrupt), locked(begun):
        raise KeyboardInterrupt  # whatever the stage, and however far it came
    takes(monkeypatch, then)
    assert open_run(recipe(tmp_path, model=str(teacher), **SIZES)).recipe == begun.recipe
    other = {**SIZES, "max_minutes": 11}
    assert sizes(open_run(recipe(tmp_path, model=str(teacher), **other))) != sizes(begun), "is another recipe"


def test_a_family_whose_time_is_not_known_keeps_its_sizes_and_says_so(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*runs: Run) -> list[float]:
        raise NotEstimated("cannot be run without data")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pace, "run_seconds", refuse)
    assert sizes(open_run(recipe(tmp_path, model=str(teacher), **SIZES)))[0] == 8192
    assert "sizes: max_minutes has no effect: cannot be run without data" in caplog.text
