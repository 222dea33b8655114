"""Edits of a plan: the saved student is the teacher with the same edits in force, whatever is combined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model as tiny_architecture
from model_outputs import logits
from safetensors.torch import load_file
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.compress import apply
from shoal.compress.apply import apply_plan
from shoal.compress.dry_run import dry_run
from shoal.compress.edits import apply as edit_module
from shoal.errors import UserError
from shoal.launch.verbs import prune as pruning
from shoal.launch.verbs.run import Run, open_run
from shoal.models.checkpoint_files import KEPT_LAYERS, ZEROED_WEIGHTS
from shoal.recipe.edits import removed_layers
from shoal.recipe.recipe import parse_recipe

TEXT = {"data": "python_docs", "num_tokens": 512, "sequence_length": 64, "batch_size": 2}


def plan(edits: list[dict[str, Any]], drop: tuple[int, ...] = ()) -> PruningPlan:
    recipe = parse_recipe({"model": "m", "run_dir": "r", "prune": {"drop": list(drop), "edits": edits}})
    gone = tuple(sorted({*drop, *removed_layers(recipe.prune.edits)}))
    return PruningPlan(Provenance({}), NUM_LAYERS, gone, "named by the test", recipe.prune.edits)


def student_of(folder: Path, edits: list[dict[str, Any]], out: Path, drop: tuple[int, ...] = (), **given: Any) -> Any:
    apply_plan(folder, plan(edits, drop), out, **given)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "llama")


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("donor"), "llama", seed=1)


def test_every_kind_of_edit_at_once_beside_a_drop(folder: Path, donor: Path, tmp_path: Path) -> None:
    edits = [
        {"kind": "head_mask", "layer": 0, "heads": [3]},
        {"kind": "skip_mlp", "layers": [0]},
        {"kind": "merge", "layers": [4, 5]},
        {"kind": "skip_attention", "layers": [2]},
        {"kind": "swap", "layers": [2, 3], "donor": "d", "weight": 0.5},
    ]
    student = student_of(folder, edits, tmp_path / "student", drop=(1,), donors={4: donor})
    base, other = load_file(folder / "model.safetensors"), load_file(donor / "model.safetensors")
    saved = load_file(tmp_path / "student" / "model.safetensors")
    assert student.config.num_hidden_layers == 4
    assert json.loads((tmp_path / "student/config.json").read_text())[KEPT_LAYERS] == [0, 2, 3, 4]
    for new, old in ((1, 2), (2, 3)):
        name = "model.layers.{}.self_attn.q_proj.weight"
        mean = (base[name.format(old)].double() + other[name.format(old)].double()) / 2
        torch.testing.assert_close(saved[name.format(new)].double(), mean, rtol=1e-6, atol=1e-8)
    assert torch.equal(saved["model.layers.3.mlp.up_proj.weight"], base["model.layers.5.mlp.up_proj.weight"])
    head = saved["model.layers.0.self_attn.o_proj.weight"]
    assert not head[:, 24:].any()
    assert torch.equal(head[:, :24], base["model.layers.0.self_attn.o_proj.weight"][:, :24])
    assert not saved["model.layers.0.mlp.down_proj.weight"].any()
    assert not saved["model.layers.1.self_attn.o_proj.weight"].any()
    assert getattr(student.config, ZEROED_WEIGHTS) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "llama_tied"])
def test_edits_of_other_families_are_proven(kind: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, kind, dtype=torch.bfloat16)
    edits = [
        {"kind": "skip_attention", "layers": [1]},
        {"kind": "skip_mlp", "layers": [2]},
        {"kind": "kv_group_mask", "layer": 3, "groups": [0]},
    ]
    student = student_of(folder, edits, tmp_path / "student", drop=(4,), proof="run")
    intact = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert student.dtype == torch.bfloat16
    assert student.config.num_hidden_layers == NUM_LAYERS - 1
    assert not torch.equal(logits(intact), logits(student))


@pytest.mark.slow
def test_swapping_everything_is_the_donor(folder: Path, donor: Path, tmp_path: Path) -> None:
    everything = {
        "kind": "swap",
        "layers": list(range(NUM_LAYERS)),
        "donor": "d",
        "parts": ["embeddings", "norm", "head"],
    }
    student_of(folder, [everything], tmp_path / "student", donors={0: donor})
    saved, other = load_file(tmp_path / "student/model.safetensors"), load_file(donor / "model.safetensors")
    assert saved.keys() == other.keys()
    assert all(torch.equal(saved[name], other[name]) for name in saved)


@pytest.mark.slow
def test_embeddings_tied_in_the_donor_only_are_saved_as_two(folder: Path, tmp_path: Path) -> None:
    tied = tiny_checkpoint(tmp_path, "llama_tied", seed=1)
    swap = {"kind": "swap", "layers": [0], "donor": "d", "parts": ["embeddings", "head"]}
    student_of(folder, [swap], tmp_path / "student", donors={0: tied})
    saved, other = load_file(tmp_path / "student/model.safetensors"), load_file(tied / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(saved[name], other["model.embed_tokens.weight"])


@pytest.mark.slow
def test_a_replacement_is_trained_and_saved(folder: Path, tmp_path: Path) -> None:
    edits = [{"kind": "replace", "layers": [2, 3, 4], **TEXT}]
    student = student_of(folder, edits, tmp_path / "student")
    again = student_of(folder, edits, tmp_path / "again")
    name = "model.layers.2.mlp.up_proj.weight"
    assert student.config.num_hidden_layers == 4
    assert not torch.equal(student.get_parameter(name), load_file(folder / "model.safetensors")[name])
    assert torch.equal(student.get_parameter(name), again.get_parameter(name))


@pytest.mark.slow
def test_a_second_cut_renames_what_the_first_zeroed(folder: Path, tmp_path: Path) -> None:
    edits = [{"kind": "skip_attention", "layers": [1, 3]}, {"kind": "skip_mlp", "layers": [4]}]
    student_of(folder, edits, tmp_path / "first")
    second = student_of(tmp_path / "first", [{"kind": "skip_mlp", "layers": [5]}], tmp_path / "second", drop=(0, 3))
    assert getattr(second.config, ZEROED_WEIGHTS) == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ]
    assert not any(second.get_parameter(name).any() for name in getattr(second.config, ZEROED_WEIGHTS))


@pytest.mark.slow
def test_an_edit_that_was_not_baked_in_is_seen(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit_module, "zero_for_good", lambda *_: [])
    with pytest.raises(UserError, match=r"logits differ from those of the teacher after MLP of layer 2 zeroed"):
        student_of(folder, [{"kind": "skip_mlp", "layers": [2]}], tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"kind": "head_mask", "layer": 1, "heads": [4]}, r"layer 1 of llama: head 4: is out of range"),
        ({"kind": "kv_group_mask", "layer": 1, "groups": [2]}, r"layer 1 of llama: key-value head 2: is out of range"),
    ],
)
def test_what_a_layer_has_not_is_refused(folder: Path, tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        student_of(folder, [edit], tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_donor_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path, "llama", hidden_size=16)
    with pytest.raises(UserError, match=r"donor"):
        student_of(folder, [{"kind": "swap", "layers": [1], "donor": "d"}], tmp_path / "student", donors={0: other})


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("llama", {"kind": "swap", "layers": [1], "donor": "d"}, r"shape|hidden_size is 16 in the donor"),
        ("qwen2", {"kind": "merge", "layers": [2, 3]}, r"layers 2 and 3 are of different kinds"),
        (
            "llama",
            {"kind": "replace", "layers": [1, 2], "sequence_length": 2048},
            r"prune.edits.0.sequence_length: 2048 is more than the 1024 positions of",
        ),
    ],
)
def test_what_is_impossible_is_refused_before_any_weight_is_read(
    kind: str, edit: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path, kind)
    donors = {0: tiny_checkpoint(tmp_path / "donor", "llama", hidden_size=16)} if edit["kind"] == "swap" else {}
    monkeypatch.setattr(apply, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        apply_plan(folder, plan([edit]), tmp_path / "student", donors=donors)
    with pytest.raises(UserError, match=message):
        dry_run(folder, plan([edit]), tmp_path / "student", donors=donors)
    assert not (tmp_path / "student").exists()


def test_a_donor_of_another_dtype_is_refused_before_any_weight_is_read(folder: Path, tmp_path: Path) -> None:
    donor = tiny_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"bfloat16 in the donor, and torch.float32 in the model; save or load one"):
        dry_run(folder, plan([{"kind": "swap", "layers": [1], "donor": "d"}]), tmp_path / "s", donors={0: donor})


@pytest.mark.slow
def test_layers_of_a_family_without_sdpa_are_swapped(tmp_path: Path) -> None:
    folders = []
    for seed in range(2):
        folders.append(tmp_path / str(seed))
        tiny_architecture("gemma2", seed=seed).save_pretrained(folders[seed])
        tiny_tokenizer().save_pretrained(folders[seed])
    swap = {"kind": "swap", "layers": [1], "donor": "d"}
    student = student_of(folders[0], [swap], tmp_path / "student", donors={0: folders[1]})
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(student.get_parameter(name), load_file(folders[1] / "model.safetensors")[name])


@pytest.mark.slow
def test_zeros_that_a_later_edit_fills_are_no_longer_listed(folder: Path, donor: Path, tmp_path: Path) -> None:
    silent = [{"kind": "skip_attention", "layers": [1, 4]}, {"kind": "skip_mlp", "layers": [2, 3]}]
    student_of(folder, silent, tmp_path / "first")
    later = [{"kind": "swap", "layers": [1], "donor": "d"}, {"kind": "merge", "layers": [2, 3]}]
    second = student_of(tmp_path / "first", later, tmp_path / "second", donors={0: donor})
    assert getattr(second.config, ZEROED_WEIGHTS) == [
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.3.self_attn.o_proj.weight",
    ]


def test_what_no_measurement_could_make_possible_is_refused_before_measuring(folder: Path, tmp_path: Path) -> None:
    for prune, message in (
        ({"num_drop": 1, "edits": [{"kind": "merge", "layers": [1, 2]}]}, "layers 1 and 2 are of different kinds"),
        (
            {"num_drop": 1, "edits": [{"kind": "replace", "layers": [1, 2], "data": "nowhere"}]},
            "data 'nowhere': cannot be read",
        ),
    ):
        teacher = tiny_checkpoint(tmp_path, "gemma3") if "merge" in str(prune) else folder
        run = open_run(parse_recipe({"model": str(teacher), "run_dir": str(tmp_path / "run"), "prune": prune}))
        with pytest.raises(UserError, match=message):
            pruning.prune(run)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_pipeline_carries_edits_out_and_knows_them_again(folder: Path, donor: Path, tmp_path: Path) -> None:
    def run(weight: float) -> Run:
        edits = [{"kind": "swap", "layers": [2], "donor": str(donor), "weight": weight}]
        raw = {"model": str(folder), "run_dir": str(tmp_path / "run"), "prune": {"edits": edits}}
        return open_run(parse_recipe(raw))

    pruning.prune(run(1.0))
    saved = load_file(tmp_path / "run/student/model.safetensors")
    other = load_file(donor / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(saved[name], other[name])
    inode = (tmp_path / "run/student").stat().st_ino
    pruning.prune(run(1.0))
    assert (tmp_path / "run/student").stat().st_ino == inode
    pruning.prune(run(0.0))
    assert torch.equal(
        load_file(tmp_path / "run/student/model.safetensors")[name], load_file(folder / "model.safetensors")[name]
    )


def test_an_impossible_cut_is_refused_before_a_replacement_is_trained() -> None:
    model = tiny_architecture("gpt2_inverse_scale")
    untrained = plan([{"kind": "replace", "layers": [1, 2], **TEXT}])
    with pytest.raises(UserError, match=r"layer 3: its attn.scaling is .* but would become"):
        edit_module.materials(model, untrained, {}, None, seed=0)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("llama", {"kind": "head_mask", "layer": 4, "heads": [9]}, r"layer 4 of llama: head 9: is out of range"),
        ("llama", {"kind": "kv_group_mask", "layer": 4, "groups": [9]}, r"layer 4 of llama: key-value head 9: is out"),
        ("mamba", {"kind": "skip_mlp", "layers": [4]}, r"layer 4 of mamba"),
    ],
)
def test_edits_that_cannot_be_made_are_refused_before_a_replacement_is_trained(
    kind: str, edit: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_module, "_trained", lambda *_, **__: pytest.fail("trained"))
    untrained = plan([{"kind": "replace", "layers": [2, 3], **TEXT}, edit], drop=(0,))
    with pytest.raises(UserError, match=message):
        edit_module.materials(tiny_architecture(kind), untrained, {}, None, seed=0)
