"""Multi-token prediction in a cut model: kept behind the new last layer, byte for byte, or gone."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.compress.apply import apply_plan
from shoal.compress.dry_run import estimate
from shoal.compress.layer_sizes import layer_sizes
from shoal.errors import UserError
from shoal.launch.verbs import prune as pruning
from shoal.launch.verbs.plan import plan_inputs, read_goals
from shoal.launch.verbs.run import open_run
from shoal.models.checkpoint_files import checkpoint_bytes, mtp_names, read_shards
from shoal.models.load import Checkpoint, LoadSettings, load_model
from shoal.recipe.recipe import parse_recipe
from shoal.train.student.frozen import write_student

DROP = (1, 3)
BEHIND, NAMED = "model.layers.6", "mtp.layers.0"


def plan(*, mtp: bool = True) -> PruningPlan:
    return PruningPlan(Provenance({}), 6, DROP, "named by the test", mtp=mtp)


def with_mtp(path: Path, row: str, module: str, **settings: Any) -> Path:
    """A checkpoint of architectures.py's row with a module that predicts one token further, stored as ``module``: what
    it has besides a layer, and a layer like the last one, with numbers of its own."""
    folder = path / row
    model: Any = architectures.tiny_model(row, **settings)
    model.save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    last = max(int(name.split(".")[2]) for name in tensors(folder) if name.startswith("model.layers."))
    layer = {
        f"{module}{name.removeprefix(f'model.layers.{last}')}": tensor
        for name, tensor in tensors(folder).items()
        if name.startswith(f"model.layers.{last}.")
    }
    outside = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight", "eh_proj.weight")
    layer |= {f"{module}.{name}": torch.ones(32, 64) if "eh" in name else torch.ones(32) for name in outside}
    torch.manual_seed(7)
    made = {name: torch.randn_like(tensor) for name, tensor in sorted(layer.items())}
    save_file(made, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(made, "model-mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in read_shards(folder) for name, tensor in load_file(shard.file).items()}


def hashes(folder: Path) -> dict[str, str]:
    """Name -> hash of dtype, shape and bytes."""
    return {
        name: hashlib.sha256(
            f"{tensor.dtype} {tensor.shape}".encode() + tensor.contiguous().numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors(folder).items()
    }


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype="float32")(torch.arange(20)[None]).logits


FAMILIES = [
    ("glm4_moe", BEHIND, "model.layers.4", {"num_nextn_predict_layers": 1}),
    ("deepseek_v3", BEHIND, "model.layers.4", {"num_nextn_predict_layers": 1}),
    ("qwen3_next", NAMED, NAMED, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "module", "moved", "settings"), FAMILIES)
def test_kept_modules_are_the_teachers_bytes_behind_the_new_last_layer(
    row: str, module: str, moved: str, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_mtp(tmp_path, row, module, **settings)
    with caplog.at_level(logging.INFO):
        apply_plan(folder, plan(), tmp_path / "kept")
    assert "are kept, untrained: acceptance has to be measured in vLLM" in caplog.text
    apply_plan(folder, plan(mtp=False), tmp_path / "dropped")
    whole, kept, dropped = (hashes(own) for own in (folder, tmp_path / "kept", tmp_path / "dropped"))
    behind = {name: value for name, value in whole.items() if name.startswith(f"{module}.")}
    assert len(behind) > 10
    assert kept == dropped | {f"{moved}{name.removeprefix(module)}": value for name, value in behind.items()}
    assert not any(name.startswith(f"{moved}.") for name in dropped)
    # the module is ignored, and the model is the one without it
    assert torch.equal(logits(tmp_path / "kept"), logits(tmp_path / "dropped"))
    configs = [json.loads((tmp_path / own / "config.json").read_text()) for own in ("kept", "dropped")]
    counts = [config.get("num_nextn_predict_layers") for config in configs]
    assert counts == ([1, 0] if settings else [None, None])
    assert [{**config, "num_nextn_predict_layers": 0} for config in configs] == [
        {**configs[0], "num_nextn_predict_layers": 0}
    ] * 2


@pytest.mark.slow
def test_a_trained_student_has_the_module_beside_it(tmp_path: Path) -> None:
    """transformers saves only what it runs, so the module comes from the files that training began with."""
    folder = with_mtp(tmp_path, "glm4_moe", BEHIND, num_nextn_predict_layers=1)
    for name, keeps in (("kept", True), ("dropped", False)):
        apply_plan(folder, plan(mtp=keeps), tmp_path / name, proof="files")
        before = Checkpoint.read(tmp_path / name, LoadSettings(dtype="float32"))
        student = before.model()
        with torch.no_grad():
            head: Any = student.get_output_embeddings()
            head.weight.add_(0.1)
        write_student(student, student.state_dict(), before, tmp_path / f"trained {name}")
    before, after, without = (hashes(tmp_path / own) for own in ("kept", "trained kept", "trained dropped"))
    module = mtp_names(before, 4)
    assert len(module) > 10
    assert {name: after[name] for name in module} == {name: before[name] for name in module}
    assert {name: value for name, value in after.items() if name not in module} == without
    assert before["lm_head.weight"] != after["lm_head.weight"]
    assert torch.equal(logits(tmp_path / "trained kept"), logits(tmp_path / "trained dropped"))
    written = sum(tensor.nbytes for tensor in tensors(tmp_path / "trained kept").values())
    assert 0 < checkpoint_bytes(tmp_path / "trained kept") - written < 20_000  # headers
    # an uncut model's module lies in its own folder
    teacher = Checkpoint.read(folder, LoadSettings(dtype="float32"))
    write_student(teacher.model(), teacher.model().state_dict(), teacher, tmp_path / "control")
    assert not mtp_names(hashes(tmp_path / "control"), 6)


@pytest.mark.slow
def test_the_dry_run_counts_the_bytes_of_the_module(tmp_path: Path) -> None:
    folder = with_mtp(tmp_path, "glm4_moe", BEHIND, num_nextn_predict_layers=1)
    for keeps in (True, False):
        apply_plan(folder, plan(mtp=keeps), tmp_path / str(keeps), proof="files")
        _, expected = estimate(folder, plan(mtp=keeps), tmp_path / "out", proof="files")
        written = sum(tensor.nbytes for tensor in tensors(tmp_path / str(keeps)).values())
        assert expected == written
        # what a target of memory counts with
        raw = {"mtp": "keep" if keeps else "drop", "target": {"memory_gb": {"limit": 1e-4, "length": 1}}}
        goals = read_goals(open_run(parse_recipe({"model": str(folder), "prune": raw})))
        assert goals is not None
        (goal,) = goals.goals
        assert goal.amount(DROP) - layer_sizes(tmp_path / str(keeps)).cache(1, 1) == written


@pytest.mark.slow
def test_a_plan_says_it_and_only_where_it_is_kept(tmp_path: Path) -> None:
    folder = with_mtp(tmp_path, "glm4_moe", BEHIND, num_nextn_predict_layers=1)
    raw: dict[str, Any] = {"model": str(folder), "run_dir": str(tmp_path / "run"), "prune": {"drop": list(DROP)}}
    run = open_run(parse_recipe(raw))
    assert "prune.mtp" not in plan_inputs(run)
    pruning.prune(run)
    assert PruningPlan.read(run.dir / "plan.json").mtp is False
    keeping = open_run(parse_recipe(raw | {"prune": {"drop": list(DROP), "mtp": "keep"}}))
    pruning.prune(keeping)
    made = PruningPlan.read(run.dir / "plan.json")
    assert made.mtp
    assert made.provenance.inputs["prune.mtp"] == "keep"
    assert made.in_words().endswith("; keeping multi-token prediction, untrained")
    assert mtp_names(tensors(run.dir / "student"), 4)
    with pytest.raises(UserError, match=r"prune.mtp is 'absent' in this recipe but 'keep' there"):
        pruning.read_plan(run)


def test_names_tell_what_is_of_multi_token_prediction() -> None:
    names = [
        "model.layers.5.x.weight",
        "model.layers.6.eh_proj.weight",
        "mtp.fc.weight",
        "model.mtp_block.0.w",
        "lm_head",
    ]
    assert mtp_names(names, 6) == names[1:4]
    assert mtp_names(["model.layers.2.mlp.experts.9.w", "model.layers.2.layers.9.w"], 6) == []
