"""Differences of two checkpoints, read from their files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import NUM_LAYERS, tiny_checkpoint
from transformers import AutoModelForCausalLM

from shoal.artifacts.artifact import Provenance
from shoal.lab import delta as delta_module
from shoal.lab.delta import DeltaNorms, Settings, TensorDelta, delta_norms, work
from shoal.launch.verbs.run import open_run
from shoal.recipe.recipe import parse_recipe


def pair(path: Path, kind: str = "llama", **donor_settings: Any) -> tuple[Path, Path]:
    return tiny_checkpoint(path / "base", kind), tiny_checkpoint(path / "donor", kind, **{"seed": 1, **donor_settings})


def frobenius(tensor: torch.Tensor) -> float:
    return math.sqrt(sum(value * value for value in tensor.double().flatten().tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_those_of_the_definition(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_module, "CHUNK", 100)  # tensors of several pieces, the last one shorter
    base, donor = pair(tmp_path, "qwen3", dtype=dtype)
    found = delta_norms(base, donor, Provenance({}))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (base, donor))
    assert {delta.name for delta in found.tensors} == ours.keys()
    for delta in found.tensors:
        difference = frobenius(theirs[delta.name].double() - ours[delta.name].double())
        assert delta.difference == pytest.approx(difference, rel=1e-12)
        assert delta.relative == pytest.approx(difference / frobenius(ours[delta.name]), rel=1e-12)

    flat = [
        torch.cat([weights[name].double().flatten() for name in sorted(ours) if f"layers.{NUM_LAYERS - 1}." in name])
        for weights in (ours, theirs)
    ]
    assert found.layers[-1] == pytest.approx(frobenius(flat[1] - flat[0]) / frobenius(flat[0]), rel=1e-12)
    assert len(found.layers) == NUM_LAYERS
    layers = [delta.layer for delta in found.tensors]
    assert layers == sorted(layers, key=lambda layer: (layer is None, layer or 0))
    assert {delta.name for delta in found.tensors if delta.layer is None} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize("sharded", ["base", "donor", "both"])
def test_how_the_files_are_split_does_not_matter(tmp_path: Path, sharded: str) -> None:
    base, donor = pair(tmp_path)
    expected = delta_norms(base, donor, Provenance({}))
    for name, folder in (("base", base), ("donor", donor)):
        if sharded in (name, "both"):
            model = AutoModelForCausalLM.from_pretrained(folder)
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="30KB")
            assert len(list(folder.glob("*.safetensors"))) > 2
    found = delta_norms(base, donor, Provenance({}))
    assert {delta.name: delta for delta in found.tensors} == {delta.name: delta for delta in expected.tensors}
    assert found.layers == pytest.approx(expected.layers, rel=1e-12)


def test_a_layers_norm_is_that_of_all_its_tensors() -> None:
    tensors = (
        TensorDelta("layers.0.a", 0, 3.0, 6.0),
        TensorDelta("layers.0.b", 0, 4.0, 8.0),
        TensorDelta("layers.1.a", 1, 1.0, 0.0),
        TensorDelta("embed", None, 0.0, 1.0),
    )
    found = DeltaNorms(Provenance({}), 2, tensors)
    assert found.layers == (0.5, None)
    lines = [line.split() for line in found.in_words().splitlines()]
    assert lines[1] == ["layer", "0", "0.5000", "layers.0.a", "0.5000"]
    assert lines[2] == ["layer", "1", "-", "layers.1.a", "-"]
    assert lines[3] == ["outside", "0.0000", "embed", "0.0000"]


def test_the_part_prints_the_table_and_writes_the_norms(tmp_path: Path) -> None:
    base, donor = pair(tmp_path)
    run = open_run(parse_recipe({"model": str(base), "run_dir": str(tmp_path / "run")}))
    found = delta_norms(base, donor, Provenance({}))
    assert work(run, Settings(str(donor))).startswith(found.in_words())
    assert DeltaNorms.load(run.dir / "lab/delta.json").tensors == found.tensors
