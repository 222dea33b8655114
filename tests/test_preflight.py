"""What training will take: estimates against real tensors and files, and what is refused before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_LAYERS, VOCAB_SIZE, tiny_checkpoint, tiny_config, tiny_model
from torch.autograd.graph import saved_tensors_hooks

from shoal.errors import UserError
from shoal.train import dry_run as report
from shoal.train import preflight
from shoal.train.memory import LIBRARY_BYTES, memory, student_size
from shoal.train.pace import flops_per_token
from shoal.train.preflight import (
    Job,
    cheapest,
    disk_bytes,
    job,
    overrides,
    refuse_what_will_not_fit,
    shortages,
)
from shoal.train.student import final_hidden
from shoal.train.trainable import set_trainable
from shoal.training import Distill

CPU = torch.device("cpu")
ROWS, LENGTH = 3, 64


def freezing(trainable: str = "all", first_change: int = 2) -> Callable[[Any], None]:
    return lambda student: set_trainable(student, trainable, first_change=first_change)


def really_saved(kind: str, *, autocast: bool, trainable: str) -> int:
    """Bytes of tensors that autograd keeps when a real model with real numbers runs."""
    model = tiny_model(kind).train()
    freezing(trainable)(model)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % VOCAB_SIZE
    positions = (torch.arange(LENGTH) % (LENGTH // 2)).repeat(ROWS, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_tensors_hooks(pack, lambda tensor: tensor):
        final_hidden(model, ids, positions)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("trainable", ["all", "from_first_cut"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_what_autograd_keeps_is_counted_to_the_byte(kind: str, autocast: bool, trainable: str) -> None:
    found = student_size(tiny_config(kind), sequence_length=LENGTH, prepare=freezing(trainable), autocast=autocast)
    counted = sum(layer.kept.of(ROWS) for layer in found.layers) + found.outside.of(ROWS)
    assert counted == really_saved(kind, autocast=autocast, trainable=trainable)


def test_a_llama_layer_keeps_what_the_formula_of_the_document_says() -> None:
    found = student_size(tiny_config("llama"), sequence_length=LENGTH, prepare=freezing(), autocast=True)
    width, inner, heads, attended = 32, 48, 4, 32  # keys and values are repeated to one per query head and kept so
    low = 5 * width + 4 * attended + 4 * inner + LENGTH  # the last is the mask's row
    assert found.layers[2].kept.per_row == LENGTH * (2 * low + 4 * (4 * width + 2 + heads))
    assert found.layers[2].kept.fixed == 2 * found.layers[2].matrices


def test_frozen_layers_below_the_cut_keep_nothing() -> None:
    config = tiny_config("llama")
    found = student_size(config, sequence_length=LENGTH, prepare=freezing("from_first_cut", 2))
    assert [layer.kept.per_row > 0 for layer in found.layers] == [False] * 2 + [True] * (NUM_LAYERS - 2)
    assert [layer.trained > 0 for layer in found.layers] == [False] * 2 + [True] * (NUM_LAYERS - 2)
    model = tiny_model("llama")
    freezing("from_first_cut", 2)(model)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.parameters == sum(p.numel() for p in model.parameters())


TRAIN = """
import resource, psutil, torch
from transformers import LlamaConfig
from shoal.train import pace
from shoal.train.memory import Setting, memory, student_size, teacher_size
from shoal.training import Distill

shape = dict(vocab_size=8192, hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2)
teacher, student = (LlamaConfig(num_hidden_layers=n, tie_word_embeddings=True, **shape) for n in (6, 5))
setting = Setting(rows=8, sequence_length=256, head_chunk=256, device="cpu")
sizes = student_size(student, sequence_length=256, prepare=lambda model: None), teacher_size(teacher)
pace.PROBE_BATCHES = 2
before = psutil.Process().memory_info().rss
pace.probe(teacher, student, Distill(sequence_length=256), setting, teacher_dtype=torch.bfloat16, first_change=1,
           attention="sdpa", device=torch.device("cpu"))
found = memory(*sizes, setting)
print(found.peak - found.fixed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""

MAPPED = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Freed memory goes back at once: small tensors that linger would be a large part of so small a run."""


def test_the_estimate_is_within_a_tenth_of_a_measured_peak() -> None:
    """Of a process of its own: two micro-batches of the objective, and AdamW. It was 1 % off."""
    done = subprocess.run([sys.executable, "-c", TRAIN], env=MAPPED, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected, measured = map(int, done.stdout.split())
    assert expected == pytest.approx(measured, rel=0.1)


# --- ZeRO stages, offload, teacher


@pytest.fixture(scope="module")
def tiny_job() -> Job:
    """On a GPU of which only the name is needed; four ranks."""
    return job(
        tiny_config("llama"),
        tiny_config("llama", num_hidden_layers=4),
        Distill(sequence_length=LENGTH, deepspeed="deepspeed/zero0.json", num_tokens=100_000),
        first_change=2,
        dtype="bfloat16",
        attention="sdpa",
        ranks=4,
        ranks_per_node=2,
        device=torch.device("cuda"),
    )


def test_states_are_sharded_as_the_stage_says(tiny_job: Job) -> None:
    size, weights = tiny_job.student, tiny_job.student.parameters
    parts = {
        stage: memory(size, tiny_job.teacher, replace(tiny_job.setting, stage=stage, bucket=1000)) for stage in range(4)
    }
    found = [(part.weights, part.gradients, part.optimizer) for part in parts.values()]
    assert found == [
        (4 * weights, 4 * weights, 8 * weights),
        (4 * weights, 4 * weights, 8 * weights // 4 + 4 * weights // 4),
        (4 * weights, 4 * weights // 4, 8 * weights // 4 + 4 * weights // 4),
        (4 * weights // 4, 4 * weights // 4, 8 * weights // 4),
    ]


def test_offload_moves_states_to_the_host_of_a_node(tiny_job: Job) -> None:
    setting = replace(tiny_job.setting, stage=3)
    here = memory(tiny_job.student, tiny_job.teacher, setting)
    there = memory(
        tiny_job.student, tiny_job.teacher, replace(setting, offload_optimizer=True, offload_parameters=True)
    )
    assert (there.weights, there.gradients, there.optimizer) == (0, 0, 0)
    assert there.host == 2 * (here.weights + here.gradients + here.optimizer)  # of two ranks on a node
    assert there.peak < here.peak


def test_a_teacher_is_whole_sharded_on_the_host_or_not_there(tiny_job: Job) -> None:
    def found(**changes: Any) -> tuple[int, int]:
        result = memory(tiny_job.student, tiny_job.teacher, replace(tiny_job.setting, **changes))
        return result.teacher, result.host

    whole = 2 * tiny_job.teacher.parameters
    assert found() == (whole, 0)
    assert found(stage=3)[0] < whole
    assert found(teacher="offloaded")[1] == 2 * whole  # a node's two ranks have one each
    assert found(teacher="recorded") == found(teacher="none") == (0, 0)


def test_checkpointing_keeps_one_state_per_layer_and_one_layer_whole(tiny_job: Job) -> None:
    def activations(checkpointing: bool) -> int:
        return memory(
            tiny_job.student, tiny_job.teacher, replace(tiny_job.setting, checkpointing=checkpointing)
        ).activations

    setting, layers = tiny_job.setting, tiny_job.student.layers
    state = setting.rows * LENGTH * 32 * 4
    saved = sum(layer.kept.per_row for layer in layers) * setting.rows
    assert activations(False) - activations(True) == saved - len(layers) * state


def test_operations_per_token_follow_from_weights_and_length(tiny_job: Job) -> None:
    matrix = 4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48
    layer, head = 2 * matrix + 4 * 32 * LENGTH, 2 * 32 * VOCAB_SIZE
    expected = (3 * 4 + NUM_LAYERS) * layer + 4 * head
    for checkpointing, extra in ((False, 0), (True, 4 * layer)):
        setting = replace(tiny_job.setting, checkpointing=checkpointing)
        assert flops_per_token(tiny_job.student, tiny_job.teacher, setting, shared=False) == expected + extra
    recorded = replace(tiny_job.setting, teacher="recorded")
    found = flops_per_token(tiny_job.student, tiny_job.teacher, recorded, shared=False)
    assert found == 3 * (4 * layer + head)


# --- what fits


def test_what_fits_is_chosen_by_cost_and_keeps_the_batch(tiny_job: Job) -> None:
    plenty = next(cheapest(tiny_job, device_free=10**13, host_free=10**13))
    assert (plenty.stage, plenty.checkpointing, plenty.teacher) == (0, False, "live")
    batch = tiny_job.setting.rows * tiny_job.setting.accumulation
    peaks = []
    for setting in cheapest(tiny_job, device_free=10**13, host_free=10**13):
        assert setting.rows * setting.accumulation == batch
        peaks.append(memory(tiny_job.student, tiny_job.teacher, setting).peak)
    scarce = sorted(peaks)[len(peaks) // 4]
    for setting in cheapest(tiny_job, device_free=scarce, host_free=10**13):
        assert preflight.MARGIN * memory(tiny_job.student, tiny_job.teacher, setting).peak <= scarce
    assert next(cheapest(tiny_job, device_free=1000, host_free=10**13), None) is None


def test_a_proposal_is_said_in_recipe_keys(tiny_job: Job) -> None:
    assert overrides(tiny_job, tiny_job.setting) == []
    other = replace(
        tiny_job.setting,
        rows=1,
        accumulation=4,
        checkpointing=True,
        stage=2,
        offload_optimizer=True,
        teacher="offloaded",
    )
    assert overrides(tiny_job, other) == [
        "distill.deepspeed={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}",
        "distill.trainer.per_device_train_batch_size=1",
        "distill.trainer.gradient_accumulation_steps=4",
        "distill.trainer.gradient_checkpointing=true",
        "distill.teacher.offload=true",
    ]
    assert overrides(tiny_job, replace(tiny_job.setting, stage=3)) == ["distill.deepspeed=deepspeed/zero3.json"]


def test_only_what_cannot_fit_even_with_the_margin_is_a_shortage(tiny_job: Job) -> None:
    peak = tiny_job.memory.peak
    assert not shortages(tiny_job, device_free=int(peak / 1.05), host_free=10**13)
    (problem,) = shortages(tiny_job, device_free=peak // 2, host_free=10**13)
    assert problem.startswith("a rank need")
    (problem,) = shortages(tiny_job, device_free=10**13, host_free=1000)
    assert "host memory" in problem


def test_disk_counts_one_checkpoint_more_than_is_kept(tiny_job: Job) -> None:
    weights, tokens = tiny_job.student.parameters, tiny_job.num_steps * tiny_job.tokens_per_step
    assert tokens == 100_352  # rounded up to whole steps of 4 ranks, 4 rows, 64 tokens
    assert disk_bytes(tiny_job, record=True) == {
        "checkpoints": 3 * 12 * weights,
        "distilled": 4 * weights,
        "text": 9 * tokens,
        "signals": 150 * tokens,
    }


# --- refusal and report


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return tiny_checkpoint(folder / "teacher", "llama"), tiny_checkpoint(
        folder / "student", "llama", num_hidden_layers=4
    )


def refuse(folders: tuple[Path, Path], run_dir: Path, **changes: Any) -> None:
    settings = Distill(sequence_length=LENGTH, **changes)
    refuse_what_will_not_fit(
        *folders,
        settings=settings,
        run_dir=run_dir,
        first_change=2,
        dtype="auto",
        attention="sdpa",
        ranks=1,
        ranks_per_node=1,
        device=CPU,
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes that a test decides on."""
    free = {"memory": 10**12, "disk": 10**12}
    monkeypatch.setattr(preflight, "available_memory", lambda: free["memory"])
    monkeypatch.setattr(preflight, "device_memory", lambda device: free["memory"])
    monkeypatch.setattr(preflight, "free_disk", lambda path: free["disk"])
    return free


def test_a_run_that_fits_starts(folders: tuple[Path, Path], tmp_path: Path, machine: dict[str, int]) -> None:
    refuse(folders, tmp_path)


def test_a_run_without_the_memory_is_refused_with_what_fits(
    folders: tuple[Path, Path], tmp_path: Path, machine: dict[str, int]
) -> None:
    machine["memory"] = 900_000_000
    with pytest.raises(UserError, match=r"rank\(s\) on this node need .* MB are free; this fits: distill\.") as caught:
        refuse(folders, tmp_path, trainer={"per_device_train_batch_size": 4096})
    assert "distill.check_memory: false" in str(caught.value)


def test_a_run_without_the_disk_is_refused(folders: tuple[Path, Path], tmp_path: Path, machine: dict[str, int]) -> None:
    machine["disk"] = 1000
    with pytest.raises(UserError, match=r"run_dir .*: training writes .* more at its worst moment and 0\.001 MB are"):
        refuse(folders, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints" / "earlier").open("wb") as file:
        file.truncate(10**8)  # a run that goes on has written its files already
    refuse(folders, tmp_path)


def test_memory_that_is_close_is_a_warning(
    folders: tuple[Path, Path], tmp_path: Path, machine: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    found = job(
        tiny_config("llama"),
        tiny_config("llama", num_hidden_layers=4),
        Distill(sequence_length=LENGTH),
        first_change=2,
        dtype="auto",
        attention="sdpa",
        ranks=1,
        ranks_per_node=1,
        device=CPU,
    )
    machine["memory"] = found.memory.peak - LIBRARY_BYTES
    refuse(folders, tmp_path)
    assert "memory will be close" in caplog.text


def test_the_report_tries_the_objective_and_names_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "matmul_flops_per_second", lambda device, dtype: 1e11)
    told = report.dry_run(
        tiny_config("llama"),
        tiny_config("llama", num_hidden_layers=4),
        settings=Distill(sequence_length=LENGTH, trainable="from_first_cut"),
        run_dir=tmp_path / "run",
        first_change=2,
        dtype="auto",
        attention="sdpa",
        ranks=1,
        ranks_per_node=1,
        device=CPU,
    )
    for words in (
        "student: 4 layers",
        "teacher: 6 layers",
        "ZeRO 3 ",
        "this recipe",
        "measured here on micro-batches of the real objective",
        "recorded signals of these tokens would take",
        "cheapest setting that fits",
    ):
        assert words in told, words
    assert not (tmp_path / "run").exists()
