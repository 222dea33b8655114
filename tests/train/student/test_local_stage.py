"""Healing gap by gap on hidden states: which layers learn what, to the same weights after a kill and on more ranks."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import flash_stand_in
import pytest
import torch
from safetensors.torch import load_file
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_model
from torch import Tensor, nn
from training_runs import Trial, finished, prepare, recipe, run
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.models.checkpoint_files import ZEROED_WEIGHTS
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import Distill, LocalHeal, Record
from shoal.train.student import local_stage as local
from shoal.train.student.local_stage import LocalResult, heal_locally, local_stage
from shoal.train.student.spec import Ranks, train_spec
from shoal.train.student.trainable import Gap, gaps

KEEP = (0, 1, 4, 5)
"""Of the six layers; the one before the gap is layer 1, which is to give the state after layer 3."""
STEPS = 16


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ((0, 1, 4, 5), [Gap(1, 3)]),
        ((0, 2, 4), [Gap(0, 1), Gap(1, 3), Gap(2, 5)]),
        ((0, 1, 2, 3), [Gap(3, 5)]),
        ((2, 3, 5), [Gap(0, 2), Gap(1, 4)]),
        ((2, 5), [Gap(0, 4)]),  # one layer on both sides of a gap learns what is asked of it last
        ((5,), [Gap(0, 5)]),
        ((0, 1, 2, 3, 4, 5), []),
    ],
)
def test_the_layer_before_every_gap_learns_the_state_behind_it(keep, expected):
    assert gaps(keep, 6) == tuple(expected)


def models(keep: tuple[int, ...] = KEEP) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student without some of the teacher's layers, and the teacher."""
    teacher = tiny_model("llama").requires_grad_(False)
    student: Any = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(student.model.layers[layer] for layer in keep)
    student.config.num_hidden_layers = len(keep)
    return student, teacher


def text(num_rows: int = 64, length: int = 24) -> PackedRows:
    """Rows of two documents each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (num_rows, length), generator=generator, dtype=torch.int32)
    positions = torch.cat([torch.arange(10), torch.arange(length - 10)]).int().expand(num_rows, -1)
    return PackedRows(ids, positions.contiguous())


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    *,
    keep: tuple[int, ...] = KEEP,
    scale: float = 1.0,
    rows: PackedRows | None = None,
    num_steps: int = STEPS,
    inputs: dict[str, Any] | None = None,
    **settings: Any,
) -> LocalResult:
    settings = {"batch_size": 4, "rows_at_once": 2, "learning_rate": 3e-3, **settings}
    return heal_locally(
        student,
        teacher,
        rows or text(),
        LocalHeal(**settings, num_tokens=num_steps * settings["batch_size"] * 24),
        [replace(gap, scale=scale) for gap in gaps(keep, NUM_LAYERS)],
        autocast=False,
        folder=folder,
        inputs=inputs or {"model": "a"},
    )


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1.25], ids=["plain", "compensated"])
def test_the_error_is_that_of_the_definition_and_falls_and_nothing_but_the_layers_before_gaps_moves(tmp_path, scale):
    keep = (0, 2, 3)
    student, teacher = models(keep)
    before = weights(student)
    expected = error_of_the_first_step(student, teacher, {0: 1, 2: 5}, scale)
    result = heal(student, teacher, tmp_path, keep=keep, scale=scale)
    assert result.before == pytest.approx(expected, rel=1e-5)
    assert all(result.after[layer] < 0.9 * result.before[layer] for layer in (0, 2))
    moved = {name for name, weight in weights(student).items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[2] for name in moved} == {"0", "2"}
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(student))


def error_of_the_first_step(
    student: PreTrainedModel, teacher: PreTrainedModel, targets: dict[int, int], scale: float
) -> dict[int, float]:
    """In float64: the mean over all tokens but those whose next one is not learnt and every document's first."""
    rows = text()
    counted = torch.ones(4, 24, dtype=torch.bool)
    counted[:, [0, 9, 10, 23]] = False

    def states(model: PreTrainedModel, layer: int) -> Tensor:
        kept = []
        exact = copy.deepcopy(model).double()
        decoder_layers(exact)[layer].register_forward_hook(lambda *seen: kept.append(seen[-1]))
        with torch.no_grad():
            ids, positions = rows.input_ids_NS[:4].long(), rows.position_ids_NS[:4].long()
            exact(input_ids=ids, position_ids=positions, use_cache=False)
        return kept[0][counted]

    pairs = {layer: (states(student, layer), states(teacher, target)) for layer, target in targets.items()}
    return {
        layer: ((scale * ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().mean().item()
        for layer, (ours, theirs) in pairs.items()
    }


def test_what_an_edit_zeroed_stays_zero_and_the_rest_of_the_layer_learns(tmp_path):
    student, teacher = models()
    skipped, masked = (f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "self_attn.o_proj"))
    with torch.no_grad():
        student.get_parameter(skipped).zero_()
        student.get_parameter(masked)[:, 8:16] = 0
    setattr(student.config, ZEROED_WEIGHTS, [skipped, masked])
    before = student.get_parameter(masked).clone()
    heal(student, teacher, tmp_path, num_steps=2)
    assert not student.get_parameter(skipped).any()
    moved = student.get_parameter(masked) != before
    assert moved[:, :8].all()
    assert moved[:, 16:].all()
    assert not moved[:, 8:16].any()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 13])
def test_a_killed_healing_goes_on_to_the_same_weights(tmp_path, monkeypatch, step):
    whole, teacher = models()
    expected = heal(whole, teacher, tmp_path / "whole")
    take_step, steps = local._step, itertools.count(1)

    def killed(*args: Any, **kwargs: Any) -> list[float]:
        if next(steps) == step:
            raise KeyboardInterrupt
        return take_step(*args, **kwargs)

    monkeypatch.setattr(local, "_step", killed)
    student, _ = models()
    with pytest.raises(KeyboardInterrupt):
        heal(student, teacher, tmp_path / "killed")
    monkeypatch.setattr(local, "_step", take_step)
    student, _ = models()
    assert heal(student, teacher, tmp_path / "killed") == expected
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(student).items())


@pytest.mark.slow
def test_progress_of_another_run_is_not_gone_on_with(tmp_path, caplog):
    student, teacher = models()
    heal(student, teacher, tmp_path, inputs={"model": "b"})
    fresh, _ = models()
    expected = heal(fresh, teacher, tmp_path / "other")
    again, _ = models()
    with caplog.at_level("WARNING"):
        assert heal(again, teacher, tmp_path) == expected
    assert "local: starts again, because model is 'a' in this recipe but 'b' there" in caplog.text


@pytest.mark.slow
def test_the_weights_do_not_depend_on_how_many_rows_are_read_at_once(tmp_path):
    healed = []
    for at_once in (1, 3, 4):
        student, teacher = models()
        heal(student, teacher, tmp_path / str(at_once), rows_at_once=at_once)
        healed.append(weights(student))
    for name, weight in healed[0].items():
        for other in healed[1:]:
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-5)


def test_what_is_not_healed_is_written_as_it_was_stored(tmp_path):
    whole, whole_teacher = models()
    odd, trained = "model.layers.3.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
    stored = {name: weight.to(torch.bfloat16) for name, weight in whole.state_dict().items()}
    stored[odd] = whole.get_parameter(odd).detach().clone()  # one of a bfloat16 checkpoint in float32
    whole.save_pretrained(tmp_path / "student", state_dict=dict(stored))
    config = tmp_path / "student" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    whole_teacher.save_pretrained(tmp_path / "teacher")
    rows = text(8)
    settings = Distill(local=LocalHeal(num_tokens=1, batch_size=4), sequence_length=24, precision="float32")
    identity: dict[str, Any] = dict.fromkeys(
        ("model", "student", "prune.drop", "dtype", "attention", "distill.teacher", "distill.local")
    )
    teacher, student = (Checkpoint.read(tmp_path / n, LoadSettings("float32")) for n in ("teacher", "student"))
    plan = PruningPlan(Provenance({}), num_layers=NUM_LAYERS, drop=(2, 3), reason="")
    spec = train_spec(teacher, student, plan, settings, Record(), Ranks(1, 1, torch.device("cpu")))
    healed = local_stage(spec, rows, folder=tmp_path / "local", inputs=identity)
    written = load_file(healed / "model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in stored.items() if ".layers.1." not in name)
    assert written[odd].dtype == torch.float32
    assert written[trained].dtype == torch.bfloat16
    assert not torch.equal(written[trained], stored[trained])
    assert json.loads((healed / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("how", [{"weights": "bfloat16"}, {"precision": "float32"}])
def test_flash_kernels_get_halves_whatever_training_computes_in(tmp_path, monkeypatch, how):
    flash_stand_in.install(monkeypatch, halves_only=True)
    for name, model in zip(("student", "teacher"), models(), strict=True):
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)  # pyright: ignore[reportArgumentType]
    settings = Distill(local=LocalHeal(num_tokens=1, batch_size=2), sequence_length=24, **how)
    teacher, student = (
        Checkpoint.read(tmp_path / n, LoadSettings("bfloat16", "flash")) for n in ("teacher", "student")
    )
    plan = PruningPlan(Provenance({}), num_layers=NUM_LAYERS, drop=(2, 3), reason="")
    spec = train_spec(teacher, student, plan, settings, Record(), Ranks(1, 1, torch.device("cpu")))
    identity: dict[str, Any] = dict.fromkeys(
        ("model", "student", "prune.drop", "dtype", "attention", "distill.teacher", "distill.local")
    )
    assert (local_stage(spec, text(2), folder=tmp_path / "local", inputs=identity) / "config.json").is_file()


def test_what_cannot_be_healed_is_refused(tmp_path, monkeypatch):
    student, teacher = models(tuple(range(NUM_LAYERS)))
    with pytest.raises(UserError, match=r"distill\.local: this plan leaves no gap .*; leave it out"):
        heal(student, teacher, tmp_path, keep=tuple(range(NUM_LAYERS)))
    student, teacher = models()
    with pytest.raises(UserError, match=r"batch_size: 65 rows are more than the 64 that there are; lower it or raise"):
        heal(student, teacher, tmp_path, batch_size=65)
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "3")
        with pytest.raises(UserError, match=r"batch_size: 4 rows cannot be shared by 3 ranks; choose a multiple"):
            heal(student, teacher, tmp_path)
    decoder_layers(teacher)[3].get_parameter("mlp.down_proj.weight").fill_(torch.nan)
    with pytest.raises(UserError, match=r"step 1: the states are not finite any more; lower distill\.local\.learning"):
        heal(student, teacher, tmp_path)


@pytest.mark.slow
def test_two_ranks_heal_to_the_student_of_one_and_training_starts_from_it(tmp_path):
    teacher = tiny_checkpoint(tmp_path, "llama")
    cut = prepare(tmp_path / "cut", teacher)
    settings = {"trainer": {"max_steps": 1}, "local": {"num_tokens": 5000, "batch_size": 4}}

    def trained(name: str, *, ranks: int, **more: Any) -> Trial:
        return finished(run(recipe(tmp_path / name, teacher, cut, **settings, **more), ranks=ranks))

    # frozen below the cut, where the healed layer is: what lies below may be shared with the teacher, it may not
    alone = trained("alone", ranks=1, trainable="from_first_cut")
    together = trained("together", ranks=2, trainable="layers")
    assert "distill.local.num_tokens: 5000 are more than the 2048 of distill.num_tokens" in alone.log
    told = [json.loads((trial.dir / "local" / "local.json").read_text()) for trial in (alone, together)]
    assert told[0]["after"] == pytest.approx(told[1]["after"], rel=1e-5)
    assert told[0]["after"]["1"] < told[0]["before"]["1"]
    healed, other = (trial.weights("local/student") for trial in (alone, together))
    for name, weight in healed.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-5)
    assert not torch.equal(
        healed["model.layers.1.mlp.up_proj.weight"], alone.weights("student")["model.layers.1.mlp.up_proj.weight"]
    )
    assert alone.curve(steps=1) == pytest.approx(together.curve(steps=1), abs=1e-5)
    assert alone.training.settings["shared_layers"] == 1
    layer = {name: weight for name, weight in healed.items() if name.startswith("model.layers.1.")}
    assert all(torch.equal(alone.weights()[name], weight) for name, weight in layer.items())
    (alone.dir / "distill.json").unlink()
    assert "local: done already" in finished(run(alone.recipe)).log
