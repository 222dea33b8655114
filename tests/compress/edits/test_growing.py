"""New layers between a model's: the grown checkpoint against the model with its layers run twice, on real families."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model as tiny_architecture
from model_outputs import logits
from safetensors.torch import load_file
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_model, tiny_tokenizer
from torch import Tensor
from training_runs import finished, run, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.compress import apply
from shoal.compress.apply import apply_plan
from shoal.compress.dry_run import dry_run
from shoal.compress.edits.growing import inserted_in_place, new_layers
from shoal.compress.surgery.cut_model import cut_model
from shoal.errors import UserError
from shoal.launch.verbs import prune
from shoal.launch.verbs.run import open_run
from shoal.models.anatomy import decoder_layers
from shoal.models.checkpoint_files import KEPT_LAYERS, ZEROED_WEIGHTS
from shoal.recipe.edits import Insert, removed_layers
from shoal.recipe.recipe import parse_recipe

TINY = ("llama", "llama_tied", "qwen2", "qwen3", "gemma3")
"""Window or not by a threshold (qwen2) and by a list (gemma3), tied heads."""
ARCHITECTURES = ("gpt2", "qwen3_moe", "qwen3_moe_step", "deepseek_v3", "qwen3_next", "gpt_oss")
"""Biases, and projections as GPT-2 has them; experts by a list, a step and a count; linear attention by a list."""


def plan(edits: Sequence[dict[str, Any]], drop: tuple[int, ...] = (), num_layers: int = NUM_LAYERS) -> PruningPlan:
    recipe = parse_recipe({"model": "m", "run_dir": "r", "prune": {"drop": list(drop), "edits": list(edits)}})
    gone = tuple(sorted({*drop, *removed_layers(recipe.prune.edits)}))
    return PruningPlan(Provenance({}), num_layers, gone, "named by the test", recipe.prune.edits)


def insert(*after: int, init: str) -> dict[str, Any]:
    return {"kind": "insert", "after": list(after), "init": init}


def checkpoint(kind: str, path: Path) -> Path:
    if kind in TINY:
        return tiny_checkpoint(path, kind)
    folder = path / kind
    tiny_architecture(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def grown(folder: Path, out: Path, *edits: dict[str, Any], drop: tuple[int, ...] = ()) -> PreTrainedModel:
    """The saved student, loaded by transformers alone. Proven by running wherever that is possible."""
    apply_plan(folder, plan(edits, drop), out, proof="run")
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto")


@contextmanager
def run_twice(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """A reference that shares nothing with the code: each layer's forward calls itself on what it gave."""

    def twice(forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        state = output[0] if isinstance(output, tuple) else output
        if args:
            return forward(state, *args[1:], **kwargs)
        return forward(**{**kwargs, "hidden_states": state})

    with ExitStack() as stack:
        for layer in layers:
            module: Any = decoder_layers(model)[layer]
            module.forward = partial(twice, module.forward)
            stack.callback(delattr, module, "forward")
        yield


def some_logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", [*TINY, *ARCHITECTURES])
def test_new_layers_that_write_nothing_change_no_bit(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(kind, tmp_path)
    student = grown(folder, tmp_path / "student", insert(1, 3, init="zero"))
    intact = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert len(decoder_layers(student)) == NUM_LAYERS + 2
    assert torch.equal(some_logits(student), some_logits(intact))
    config = json.loads((tmp_path / "student/config.json").read_text())
    assert config[KEPT_LAYERS] == [0, 1, 1, 2, 3, 3, 4, 5]
    assert ZEROED_WEIGHTS not in config  # a training may fill them


@pytest.mark.parametrize("kind", [*TINY, *ARCHITECTURES])
def test_copies_are_the_layers_run_twice(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(kind, tmp_path)
    student = grown(folder, tmp_path / "student", insert(0, 3, 5, init="copy"))
    intact = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert not torch.equal(some_logits(student), some_logits(intact))
    with run_twice(intact, (0, 3, 5)):
        assert torch.equal(some_logits(student), some_logits(intact))
    numbers = [layer for layer in range(NUM_LAYERS) for _ in range(2 if layer in (0, 3, 5) else 1)]
    for field in ("layer_types", "mlp_layer_types"):
        if kinds := getattr(intact.config, field, None):
            assert getattr(AutoConfig.from_pretrained(tmp_path / "student"), field) == [kinds[n] for n in numbers]


@pytest.mark.parametrize("init", ["mean", "lesa"])
@pytest.mark.parametrize("kind", ["llama_tied", "gemma3", "gpt_oss", "deepseek_v3"])
def test_calculated_layers_are_saved_and_proven(kind: str, init: str, tmp_path: Path) -> None:
    """Beside a drop, also between layers of different attention; what stays is stored as it was."""
    folder = checkpoint(kind, tmp_path)
    student = grown(folder, tmp_path / "student", insert(2, 3, init=init), drop=(0,) if kind != "deepseek_v3" else ())
    keep = plan([insert(2, 3, init=init)], (0,) if kind != "deepseek_v3" else ()).keep
    intact = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    new = {keep.index(2) + 1, keep.index(3) + 1}
    for place, layer in enumerate(keep):
        for name, tensor in decoder_layers(student)[place].state_dict().items():
            own = decoder_layers(intact)[layer].state_dict()[name]
            if place not in new:
                assert torch.equal(tensor, own), (place, name)
            elif init == "mean" and tensor.is_floating_point():
                above = decoder_layers(intact)[layer + 1].state_dict()[name]
                torch.testing.assert_close(tensor.double(), (own.double() + above.double()) / 2, rtol=1e-6, atol=1e-8)
            elif tensor.ndim > 1 and "weight" in name:
                assert not torch.equal(tensor, own), (place, name)


def test_a_layer_that_is_masked_or_swapped_is_followed_by_one_that_is_not_masked(tmp_path: Path) -> None:
    """Swaps come before insertions, masks after."""
    folder, donor = tiny_checkpoint(tmp_path, "llama"), tiny_checkpoint(tmp_path / "donor", "llama", seed=1)
    edits = [
        {"kind": "swap", "layers": [2], "donor": "d"},
        {"kind": "skip_mlp", "layers": [2]},
        insert(2, init="copy"),
        {"kind": "skip_mlp", "layers": [4]},
    ]
    apply_plan(folder, plan(edits), tmp_path / "student", donors={0: donor}, proof="run")
    saved, other = load_file(tmp_path / "student/model.safetensors"), load_file(donor / "model.safetensors")
    assert not saved["model.layers.2.mlp.down_proj.weight"].any()
    assert not saved["model.layers.5.mlp.down_proj.weight"].any()
    assert torch.equal(saved["model.layers.3.mlp.down_proj.weight"], other["model.layers.2.mlp.down_proj.weight"])
    config = AutoConfig.from_pretrained(tmp_path / "student")
    assert getattr(config, ZEROED_WEIGHTS) == [f"model.layers.{n}.mlp.down_proj.weight" for n in (2, 5)]


def test_a_grown_model_can_be_cut_and_names_the_first_teachers_layers(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "gemma3")
    grown(folder, tmp_path / "grown", insert(1, 2, init="zero"))
    apply_plan(tmp_path / "grown", plan([], (2, 4), NUM_LAYERS + 2), tmp_path / "cut", proof="run")
    cut, intact = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "cut", folder))
    assert torch.equal(logits(cut), logits(intact))
    assert getattr(cut.config, KEPT_LAYERS) == list(range(NUM_LAYERS))


def test_the_model_is_left_as_it_was_and_shares_nothing_with_what_is_new() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit = Insert("insert", (1,), "copy")
    made = new_layers(model, edit, seed=0)
    pointers = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(tensor.data_ptr() not in pointers for tensor in made[1].values())
    expected = logits(model)
    with inserted_in_place(model, made):
        assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("llama", insert(5, init="mean"), r"insert after 5: is the last layer, and mean needs one on both sides"),
        ("llama", insert(5, init="lesa"), r"insert after 5: is the last layer, and lesa needs one on both sides"),
        ("deepseek_v3", insert(1, init="mean"), r"layers 1 and 2 hold different tensors: the shape of mlp\."),
        (
            "jamba",
            insert(0, init="copy"),
            r"_layer_period=.*says that one layer in .*; insert new layers in other places",
        ),
        ("zamba2", insert(3, init="copy"), r"shares parameters with other layers|num_mem_blocks=2"),
        ("modernbert-decoder", insert(0, init="copy"), r"insert: layer 0 of .* alone has no attention norm"),
        ("qwen3_next", insert(2, init="lesa"), r"layers 2 and 3 hold different tensors"),
        (
            "gemma3n_text",
            insert(2, init="copy"),
            r"layers .* use the keys and values of layer 2 .* insert it elsewhere",
        ),
        ("diffllama", insert(2, init="copy"), r"insert: diffllama computes lambda_init .* cannot be made deeper"),
        ("gpt2_inverse_scale", insert(2, init="copy"), r"layer 2: its attn.scaling is .* but would become"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name_before_any_weight_is_changed(
    kind: str, edit: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(kind, tmp_path)
    num_layers = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).num_hidden_layers
    monkeypatch.setattr(apply, "edited_student", lambda *_: pytest.fail("a student was made"))
    with pytest.raises(UserError, match=message):
        apply_plan(folder, plan([edit], num_layers=num_layers), tmp_path / "student")
    with pytest.raises(UserError, match=message):
        dry_run(folder, plan([edit], num_layers=num_layers), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_layers_that_do_not_exist_or_are_dropped_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"insert: 6 is no layer of this model; its layers are 0\.\.5"):
        cut_model(model, (), insert=(6,))
    with pytest.raises(UserError, match=r"insert: layer 2 is dropped, so nothing can follow it"):
        cut_model(model, (2,), insert=(2,))


def test_an_inserted_layer_that_was_not_saved_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    monkeypatch.setattr("shoal.compress.edits.apply.zero_for_good", lambda *_: [])
    with pytest.raises(UserError, match=r"logits differ from those of the teacher after 1 new after layer 2 \(zero\)"):
        grown(folder, tmp_path / "student", insert(2, init="zero"))


def test_a_run_grows_a_model_and_tells_so(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3")
    raw = {"model": str(folder), "run_dir": str(tmp_path / "run"), "prune": {"edits": [insert(1, 4, init="lesa")]}}
    growing = open_run(parse_recipe(raw))
    told = prune.prune_dry_run(growing)
    assert "edit:    2 new after layers 1, 4 (lesa)\n" in told
    assert "saves neither" not in told
    assert ["layers", "6", "8", "1.333"] in [line.split() for line in told.splitlines()]
    prune.prune(growing)
    made = PruningPlan.read(tmp_path / "run/plan.json")
    assert (made.keep, made.new_layers) == ((0, 1, 1, 2, 3, 4, 4, 5), (2, 6))
    assert (made.first_change, made.changed_layers) == (2, ())
    assert "seed" in made.provenance.inputs
    stored = (tmp_path / "run/student").stat().st_ino
    prune.prune(growing)
    assert (tmp_path / "run/student").stat().st_ino == stored


@pytest.mark.slow
def test_new_layers_are_trained_alone_evaluated_and_reported(tmp_path: Path) -> None:
    """All that is not new is stored as the teacher has it, the layers above the new one included."""
    folder = tiny_checkpoint(tmp_path, "llama")
    losses = [{"kind": "cross_entropy"}, {"kind": "hidden_states"}]
    path = write_recipe(tmp_path / "trial", folder, trainable="near_gaps", losses=losses)
    edits = "[{kind: insert, after: [2], init: copy}]"
    changes = ("prune.drop=null", f"prune.edits={edits}", "eval.speed=false")
    trial = finished(run(path, *changes))
    for verb in ("eval", "report"):
        finished(run(path, *changes, verb=verb))
    healed, whole = trial.weights(), load_file(folder / "model.safetensors")
    place = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 5}
    for name, tensor in healed.items():
        number = int(name.split(".")[2]) if ".layers." in name else None
        own = name if number is None else name.replace(f".{number}.", f".{place[number]}.", 1)
        assert torch.equal(tensor, whole[own]) == (number != 3), name
    assert AutoModelForCausalLM.from_pretrained(trial.dir / "distilled").config.num_hidden_layers == NUM_LAYERS + 1
    report = (trial.dir / "report.html").read_text()
    assert "1 new after layer 2 (copy)" in report
    for role in ("teacher", "pruned", "distilled"):
        told = json.loads((trial.dir / "eval" / f"{role}.json").read_text())["num_layers"]
        assert told == NUM_LAYERS + (role != "teacher")
