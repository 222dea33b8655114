"""Which parameters are trained, and which stay as they are."""

import torch
from tiny import tiny_model

from shoal.edits import ZEROED_WEIGHTS
from shoal.train.trainable import keep_zeros, set_trainable


def trained_names(student):
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


def test_trainable_names_what_is_trained():
    student = tiny_model("llama")
    everything = {name for name, _ in student.named_parameters()}
    set_trainable(student, "layers", first_change=2)
    assert everything - trained_names(student) == {"model.embed_tokens.weight", "lm_head.weight"}
    set_trainable(student, "from_first_cut", first_change=2)
    frozen = everything - trained_names(student)
    assert {name for name in frozen if ".layers." in name} == {
        n for n in everything if n.startswith(("model.layers.0.", "model.layers.1."))
    }
    assert "model.norm.weight" in trained_names(student)
    set_trainable(student, "all", first_change=2)
    assert trained_names(student) == everything


def test_zeroed_weights_stay_zero_in_training_and_others_move() -> None:
    student = tiny_model("llama").train()
    skipped, masked = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 3))
    with torch.no_grad():
        student.get_parameter(skipped).zero_()
        student.get_parameter(masked)[:, 8:16] = 0
    setattr(student.config, ZEROED_WEIGHTS, [skipped, masked])
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    keep_zeros(student)
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
        student(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not student.get_parameter(skipped).any()
    after = student.get_parameter(masked)
    assert not after[:, 8:16].any()
    assert (after[:, :8] != before[masked][:, :8]).all()
    assert (after[:, 16:] != before[masked][:, 16:]).all()


def test_student_without_edits_is_trained_as_ever() -> None:
    student = tiny_model("llama")
    keep_zeros(student)
    assert all(p.requires_grad and not p._backward_hooks for p in student.parameters())
