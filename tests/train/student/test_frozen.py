"""Frozen weights: one copy for teacher and student, the same curve, and the stored bits in what is written."""

from typing import Any

import pytest
import torch
from cut_students import plan
from tiny import tiny_model
from torch.nn import functional

from shoal.train.student.frozen import finished_state, share_frozen
from shoal.train.student.trainable import train_only, trained_parts

CUT = plan(3, num_layers=7)
BF16 = torch.bfloat16


def pair(kind: str, teacher_dtype: torch.dtype, trainable: str = "near_gaps") -> tuple[Any, Any]:
    """A student of 6 layers in float32 and its teacher of 7, whose numbers bfloat16 can hold."""
    teacher: Any = tiny_model(kind, num_hidden_layers=7, dtype=BF16).requires_grad_(False)
    teacher = teacher.to(teacher_dtype)
    student = tiny_model(kind)
    theirs = teacher.state_dict()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(CUT.keep[int(parts[2])])
            parameter.copy_(theirs[".".join(parts)])
    train_only(student, trained_parts(trainable, CUT))
    return student, teacher


def curve(student: Any, teacher: Any, autocast: torch.dtype | None) -> list[float]:
    """Losses of a few steps, teacher and student in one loop as they train."""
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=0.01)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(4):
        ids = torch.randint(0, 256, (2, 16), generator=generator)
        with torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None):
            with torch.no_grad():
                target = teacher(input_ids=ids).logits.float().softmax(-1)
            loss = functional.cross_entropy(student(input_ids=ids).logits.float().flatten(0, 1), target.flatten(0, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shared_names(student: Any, teacher: Any) -> set[str]:
    places = {parameter.data_ptr() for parameter in teacher.parameters()}
    return {name for name, parameter in student.named_parameters() if parameter.data_ptr() in places}


@pytest.mark.parametrize("trainable", ["near_gaps", "layers"])
@pytest.mark.parametrize(
    ("kind", "teacher_dtype", "autocast"),
    [
        ("llama", torch.float32, None),
        ("llama_tied", torch.float32, BF16),
        ("llama_tied", BF16, BF16),
        ("llama", BF16, BF16),
        ("qwen3", BF16, BF16),  # norms of queries and keys, which read bfloat16
        ("qwen2", BF16, BF16),  # biases
        ("gemma3", BF16, BF16),  # scaled embeddings
    ],
)
def test_one_copy_of_frozen_weights_gives_the_curve_of_two(kind, teacher_dtype, autocast, trainable) -> None:
    apart, teacher = pair(kind, teacher_dtype, trainable)
    expected = curve(apart, teacher, autocast)
    together, teacher = pair(kind, teacher_dtype, trainable)
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    saved = share_frozen(together, teacher, CUT.keep, autocast_dtype=autocast)
    assert curve(together, teacher, autocast) == expected
    assert len(set(expected)) == 4
    for (name, mine), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert torch.equal(mine.float(), other), name
    assert all(torch.equal(before[name], parameter) for name, parameter in teacher.named_parameters())

    shared = shared_names(together, teacher)
    assert saved == 4 * sum(p.numel() for name, p in together.named_parameters() if name in shared)
    frozen = {name for name, parameter in together.named_parameters() if not parameter.requires_grad}
    same = teacher_dtype == torch.float32
    own = {
        name
        for name in frozen
        if not same and ("norm" in name or (kind == "gemma3" and "embed_tokens" in name))  # the dtype of these matters
    }
    assert shared == frozen - own
    assert shared or (kind, trainable) == ("gemma3", "layers")


def test_other_weights_than_the_teachers_stay() -> None:
    student, teacher = pair("llama", BF16)
    changed = "model.layers.5.mlp.up_proj.weight"
    with torch.no_grad():
        student.get_parameter(changed)[0, 0] += 1
    share_frozen(student, teacher, CUT.keep, autocast_dtype=BF16)
    shared = shared_names(student, teacher)
    assert changed not in shared
    assert "model.layers.5.mlp.down_proj.weight" in shared


def test_nothing_is_shared_without_autocast_to_the_teachers_dtype() -> None:
    for autocast in (None, torch.float16):
        student, teacher = pair("llama", BF16)
        assert share_frozen(student, teacher, CUT.keep, autocast_dtype=autocast) == 0
        assert not shared_names(student, teacher)


def test_what_was_trained_is_rounded_and_what_was_not_keeps_its_stored_dtype(tmp_path) -> None:
    student, _ = pair("llama", torch.float32)
    stored = {name: tensor.to(BF16) for name, tensor in student.state_dict().items()}
    # two tensors of a bfloat16 checkpoint in float32
    odd, trained_odd = "model.layers.0.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight"
    for name in (odd, trained_odd):
        with torch.no_grad():
            student.get_parameter(name).add_(1e-6)
        stored[name] = student.get_parameter(name).detach().clone()
    student.save_pretrained(tmp_path, state_dict=dict(stored))
    trained = "model.layers.3.mlp.up_proj.weight"
    with torch.no_grad():
        for name in (trained, trained_odd):
            student.get_parameter(name).add_(1e-3)
    finished = finished_state(student, student.state_dict(), tmp_path, dtype=BF16)
    assert all(torch.equal(finished[name], stored[name]) for name in stored if name not in (trained, trained_odd))
    assert torch.equal(finished[trained_odd], student.get_parameter(trained_odd))
    assert finished[odd].dtype == torch.float32
    assert torch.equal(finished[trained], student.get_parameter(trained).to(BF16))
