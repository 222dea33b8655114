"""Parts that change layers: each writes a proven student and a plan that training reads as data.

Covers: shoal.lab.edits.merge.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model as tiny_architecture
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.lab.edits import merge, swap
from shoal.launch.verbs.prune import read_plan
from shoal.launch.verbs.run import Run, open_run
from shoal.models.anatomy import decoder_layers
from shoal.recipe.recipe import parse_recipe


def run_of(folder: Path, out: Path, **recipe: Any) -> Run:
    return open_run(parse_recipe({"model": str(folder), "run_dir": str(out), **recipe}))


def made(part: Any, run: Run, **settings: Any) -> tuple[Plan, Any]:
    """The plan as the run reads it, and the student, loaded by transformers alone."""
    told = part.work(run, part.Settings(**settings))
    assert f"shoal distill {run.dir}" in told
    return read_plan(run), AutoModelForCausalLM.from_pretrained(run.dir / "student", dtype="auto")


def checkpoint(kind: str, path: Path) -> Path:
    if kind in ("llama", "llama_tied", "qwen2", "qwen3", "gemma3"):
        return tiny_checkpoint(path, kind)
    tiny_architecture(kind).save_pretrained(path / kind)
    tiny_tokenizer().save_pretrained(path / kind)
    return path / kind


def test_a_merged_run_is_one_layer_that_stands_for_all(tmp_path: Path) -> None:
    run = run_of(tiny_checkpoint(tmp_path, "llama"), tmp_path / "run")
    plan, student = made(merge, run, layers=(1, 2, 3))
    assert (plan.drop, plan.keep, plan.changed, plan.first_change) == ((2, 3), (0, 1, 4, 5), (1,), 1)
    assert plan.changes[0].runs == ((1, 3),)
    assert plan.in_words() == "dropping 2 of 6 layers: 2, 3; layers 1 to 3 merged into one (laco)"
    teacher = AutoModelForCausalLM.from_pretrained(run.teacher)
    own = [layer.get_parameter("mlp.up_proj.weight").double() for layer in decoder_layers(teacher)]
    assert torch.equal(
        decoder_layers(student)[1].get_parameter("mlp.up_proj.weight").double().float(),
        (own[1] + (own[2] - own[1]) + (own[3] - own[1])).float(),
    )


def test_layers_of_a_donor_stand_in_their_places(tmp_path: Path) -> None:
    donor = tiny_checkpoint(tmp_path / "donor", "llama", seed=1)
    run = run_of(tiny_checkpoint(tmp_path, "llama"), tmp_path / "run")
    plan, student = made(swap, run, layers=(2, 4), donor=str(donor))
    assert (plan.drop, plan.changed, plan.first_change) == ((), (2, 4), 2)
    assert str(tmp_path) not in plan.in_words()
    other = AutoModelForCausalLM.from_pretrained(donor)
    name = "mlp.up_proj.weight"
    for layer in range(NUM_LAYERS):
        is_other = torch.equal(*(decoder_layers(m)[layer].get_parameter(name) for m in (student, other)))
        assert is_other == (layer in (2, 4))
    plan, _ = made(swap, run, layers=(4,), donor=str(donor), weight=0.5)
    assert plan.first_change == 4


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["llama_tied", "gemma3", "gpt2", "mixtral", "falcon"])
def test_merged_models_are_proven_in_all_families(kind: str, tmp_path: Path) -> None:
    run = run_of(checkpoint(kind, tmp_path), tmp_path / "run")
    made(merge, run, layers=(3, 4), method="mean")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 3), r"layers: must be neighbours in increasing order"),
        ((5, 6), r"layers 5..6: this model has the layers 0 to 5"),
    ],
)
def test_what_cannot_be_is_refused(layers: tuple[int, ...], message: str, tmp_path: Path) -> None:
    run = run_of(tiny_checkpoint(tmp_path, "llama"), tmp_path / "run")
    with pytest.raises((UserError, ValueError), match=message):
        merge.work(run, merge.Settings(layers))
    assert not (run.dir / "student").exists()


def test_a_training_of_another_student_is_not_written_over(tmp_path: Path) -> None:
    run = run_of(tiny_checkpoint(tmp_path, "llama"), tmp_path / "run")
    (run.dir / "checkpoints/checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a training of another student"):
        made(merge, run, layers=(1, 2))


def test_a_student_that_is_not_the_teacher_as_changed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tiny_checkpoint(tmp_path, "llama"), tmp_path / "run")
    monkeypatch.setattr(merge, "tensors_in_place", lambda *_: nullcontext())
    with pytest.raises(UserError, match=r"logits differ from those of the teacher with layers 2, 3 merged into one"):
        made(merge, run, layers=(2, 3))
    assert not (run.dir / "student").exists()
    assert not (run.dir / "plan.json").exists()
