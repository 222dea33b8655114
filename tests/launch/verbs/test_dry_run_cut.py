"""`shoal prune --dry-run`: what it says is what pruning then does, and it does nothing itself.

Covers: shoal.compress.estimate.
"""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_config

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.compress.estimate import cut_estimate
from shoal.compress.plan import choose_changes
from shoal.launch.cli import run_verb
from shoal.models.checkpoint_files import read_shards
from shoal.models.load import load_model, without_data
from shoal.recipe.recipe import parse_recipe


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family, in bfloat16."""
    folder = tmp_path_factory.mktemp("teachers")
    return {kind: tiny_checkpoint(folder, kind, dtype=torch.bfloat16) for kind in ("llama", "llama_tied", "gemma3")}


def plan(**prune: Any) -> Plan:
    settings = parse_recipe({"model": "m", "run_dir": "r", "prune": prune}).prune
    choice = choose_changes(settings, num_layers=NUM_LAYERS, importance=None)
    return Plan(Provenance({}), NUM_LAYERS, choice.drop, choice.reason)


def row(report: str, title: str) -> list[str]:
    """Before, after and ratio of the line that starts with ``title``."""
    (line,) = [line for line in report.splitlines() if line.startswith(f"{title}  ")]
    return re.split(r" {2,}", line.removeprefix(title).strip())


def listing(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def stored_bytes(folder: Path) -> int:
    return sum(tensor.end - tensor.start for shard in read_shards(folder) for tensor in shard.tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gemma3"])
def test_what_it_says_is_what_pruning_writes(
    teachers: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {teachers[kind]}\nrun_dir: {tmp_path}/run\nprune: {{drop: [1, 3]}}\n")
    before = listing(tmp_path), listing(teachers[kind])
    assert run_verb("prune", str(file), [], dry_run=True) == 0
    report = capsys.readouterr().out
    assert (listing(tmp_path), listing(teachers[kind])) == before
    assert run_verb("prune", str(file), []) == 0
    folders = teachers[kind], tmp_path / "run" / "student"
    sizes = [sum(parameter.numel() for parameter in load_model(folder).parameters()) for folder in folders]
    assert row(report, "layers") == ["6", "4", "0.667"]
    assert row(report, "parameters") == [f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[1] / sizes[0]:.3f}"]
    assert row(report, "weights on disk")[:2] == [f"{stored_bytes(folder) / 1000:.3g} kB" for folder in folders]
    assert "drops:   1, 3\nkeeps:   0, 2, 4, 5" in report
    assert re.search(r"^disk: [\d.]+ kB needed under .*student, .* free there$", report, re.M)
    assert "check:   files, kind and settings of layers, output" in report


@pytest.mark.slow
def test_cache_by_kind_of_layer(teachers: dict[str, Path], tmp_path: Path) -> None:
    report, _ = cut_estimate(teachers["gemma3"], plan(drop=[0, 2]), tmp_path / "student")
    token = 2 * 2 * 8 * 2  # keys and values, two heads of 8, bfloat16
    # layers 2 and 5 see everything, the others 8 tokens, of which 7 are kept
    whole = [count * token * 1024 + sliding * token * 7 for count, sliding in ((2, 4), (1, 3))]
    assert row(report, "cache of 1,024 tokens")[:2] == [f"{size / 1000:.3g} kB" for size in whole]


@pytest.mark.slow
def test_scores_that_are_there_are_used(
    teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {teachers['llama']}\nrun_dir: {tmp_path}/run\n"
        "measure: {num_tokens: 256, sequence_length: 32}\nprune: {num_drop: 2}\n"
    )
    assert run_verb("measure", str(file), []) == 0
    before = listing(tmp_path)
    assert run_verb("prune", str(file), [], dry_run=True) == 0
    assert "the 2 of 6 layers with the lowest block_influence" in capsys.readouterr().out
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_a_model_of_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    """The file is a header and a hole: its bytes take no disk, and reading them would take their size in memory."""
    config: Any = tiny_config("llama", hidden_size=4096, intermediate_size=11008, head_dim=128, num_attention_heads=32)
    model = without_data(config, dtype=torch.bfloat16)
    config.save_pretrained(tmp_path)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 1_500_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report, _ = cut_estimate(tmp_path, plan(drop=[2]), tmp_path / "student")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    assert row(report, "weights on disk")[0] == f"{end / 1e9:.3g} GB"
