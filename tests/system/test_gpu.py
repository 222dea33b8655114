"""`make gpu`, tried with tiny models on a CPU; and what can be seen on a GPU alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint

from shoal.errors import UserError
from shoal.launch.verbs.run import open_run
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.recipe import parse_recipe
from shoal.train.objective.objective import final_hidden

ROOT = Path(__file__).parents[2]
NO_GPU = not torch.cuda.is_available()


def command(*words: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "benchmarks.gpu", *map(str, words)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True)


def measured(out: Path, *words: object) -> dict[str, dict[str, Any]]:
    """What the command found, by the names of cases."""
    done = command(out, *words)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return {row["name"]: row for row in json.loads((out / "gpu.json").read_text())["results"]}


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("gpu")
    groups = ("speed", "losses", "cpu", "attention auto", "attention flash", "fused", "ZeRO 3")
    return out, measured(out, "--device", "cpu", "--tiny", "--only", *groups)


@pytest.mark.prove
def test_the_command_measures_every_kind_of_case(tried: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    _, rows = tried
    assert {row["kind"] for row in rows.values()} == {"card", "shoal", "trl"}
    steps = [row for row in rows.values() if "tokens_per_s" in row]
    assert {row["kind"] for row in steps} == {"shoal", "trl"}
    for row in steps:
        assert len(row["losses"]) >= 3
        assert all(loss > 0 for loss in row["losses"])
        assert row["peak"] > 0
    assert rows["ZeRO 3"]["estimate"] > 0
    reasons = [row["without"] for row in rows.values() if "without" in row]
    assert all(why.startswith("not here: ") for why in reasons), "nothing failed, was too large or took too long"


@pytest.mark.prove
def test_all_trainers_see_the_same_models_and_rows(tried: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """Else a comparison of their speed would say little: the first losses are the same."""
    _, rows = tried
    own = rows["one document a row"]["losses"][0]
    assert rows["TRL"]["losses"][0] == pytest.approx(own, rel=0.03)
    on_cpu = rows["on a CPU, one document a row"]["losses"][0]
    assert rows["on a CPU, TRL"]["losses"][0] == pytest.approx(on_cpu, rel=0.03)
    assert rows["losses, float32"]["losses"] == rows["losses, CPU, float32"]["losses"]
    assert rows["losses, bf16 autocast"]["losses"] != rows["losses, CPU, float32"]["losses"]
    assert rows["as shipped"]["losses"][0] != own, "its rows hold several documents"


@pytest.mark.prove
@pytest.mark.skipif(not NO_GPU, reason="there is a GPU, on which it would measure")
def test_without_a_gpu_the_command_says_what_it_would_do(tmp_path: Path) -> None:
    done = command(tmp_path / "none", "--tiny", "--only", "ZeRO 2", "attention flash")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "No GPU is seen here: nothing is measured" in done.stdout
    assert "0.6B   ZeRO 2" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.prove
def test_a_word_that_no_case_has_is_refused(tmp_path: Path) -> None:
    done = command(tmp_path, "--tiny", "--only", "nothing")
    assert done.returncode == 2
    assert "--only: no case has 'nothing' in its group, size or name" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager"])
def test_documents_of_a_row_stay_apart_on_a_gpu(attention: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
    folder = tiny_checkpoint(tmp_path / "model", "qwen3", **sizes)
    settings = {
        "model": str(folder),
        "run_dir": str(tmp_path / "run"),
        "dtype": "bfloat16",
        "attn_implementation": attention,
    }
    try:
        run = open_run(parse_recipe({**settings, "distill": {"precision": "bf16-mixed"}}))
    except UserError as error:
        pytest.skip(str(error))
    model = Checkpoint.read(folder, LoadSettings(**run.load_args())).model(device="cuda")
    lengths = (75, 53, 128)
    positions_1S = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    ids_1S = torch.randint(0, 256, positions_1S.shape, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        together_1SD = final_hidden(model, ids_1S, positions_1S).float()
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone_1SD = final_hidden(model, ids_1S[:, part], positions_1S[:, part]).float()
            off = (together_1SD[:, part] - alone_1SD).norm() / alone_1SD.norm()
            assert off < 0.02, f"document of {length} tokens"
            start += length


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
def test_memory_on_a_gpu_is_what_the_preflight_tells(tmp_path: Path) -> None:
    rows = measured(tmp_path, "--only", "ZeRO 2", "ZeRO 0, LoRA", "ZeRO 0, checkpointing")
    found = {name: row["estimate"] / row["peak"] for name, row in rows.items() if "estimate" in row}
    assert len(found) >= 3
    assert found == {name: pytest.approx(1, abs=0.15) for name in found}
