"""Steps of training under flash attention are those under masks: loss, gradients, checkpointing, autocast."""

from __future__ import annotations

from collections.abc import Callable

import architectures
import flash_stand_in
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.data.packing import IGNORED
from shoal.models import document_masks
from shoal.models.attention import implementation, without_kernels
from shoal.models.document_masks import document_borders, documents_known
from shoal.recipe.losses import CrossEntropy, ForwardKL
from shoal.train.objective.host_batch import OnHost
from shoal.train.objective.objective import Objective, Signals, final_hidden, to_logits
from shoal.train.student.sizes import student_size

CPU = torch.device("cpu")
IDS = torch.randint(5, 90, (2, 14), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[*range(10), *range(4)], [*range(3), *range(11)]])


def step(student: PreTrainedModel, teacher: PreTrainedModel, kernels: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a micro-batch; both models run with ``kernels``."""
    for model in (student, teacher):
        name = implementation(kernels, model.config)
        assert name is not None
        model.set_attn_implementation(name)
    installed = Objective(student, to_logits(teacher), terms=(ForwardKL(), CrossEntropy(weight=0.5)), chunk=5)
    installed.install()
    labels = IDS.masked_fill(POSITIONS == 0, IGNORED)
    host = OnHost(labels, POSITIONS, IDS)
    with documents_known(host.position_ids_BS, CPU):
        with torch.no_grad():
            signals = Signals(final_hidden(teacher, IDS, POSITIONS))
        loss, _ = student(IDS, POSITIONS, labels, signals=signals, on_host=host)
    installed.uninstall()
    student.zero_grad()
    loss.backward()  # where documents are not known any more: checkpointing has to hand on what it was given
    return loss.detach(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "install"),
    [
        *((name, flash_stand_in.install) for name in ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_oss")),
        *((name, flash_stand_in.install_torchs_own) for name in ("llama", "qwen3", "gemma3_text", "mistral")),
    ],
)
def test_loss_and_gradients_are_those_under_masks(
    name: str, install: Callable[..., object], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    student, teacher = architectures.tiny_model(name).train(), architectures.tiny_model(name, num_hidden_layers=8)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    expected_loss, expected = step(student, teacher, without_kernels("flash", student.config))
    loss, found = step(student, teacher, "flash")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=key)


@pytest.mark.parametrize("install", [flash_stand_in.install, flash_stand_in.install_torchs_own])
def test_kernels_get_half_precision_under_autocast(
    install: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, halves_only=True)
    student, teacher = architectures.tiny_model("llama").train(), architectures.tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = step(student, teacher, "sdpa")
        loss, gradients = step(student, teacher, "flash")
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_borders_known_on_the_host_are_taken_and_not_asked_of_the_device() -> None:
    asked = document_masks.document_borders
    with documents_known(POSITIONS, CPU):
        # positions without a value, such as those that a device has not computed yet
        known = document_masks.document_borders(torch.empty_like(POSITIONS, device="meta"), CPU)
        assert document_masks.document_borders(POSITIONS, CPU) is known
    assert document_masks.document_borders is asked is document_borders
    assert torch.equal(known["cu_seq_lens_q"], document_borders(POSITIONS, CPU)["cu_seq_lens_q"])


def test_what_is_kept_for_the_backward_pass_holds_no_masks_under_flash() -> None:
    config = architectures.tiny_model("llama").config
    masked, flash = (
        student_size(config, sequence_length=64, prepare=lambda _: None, attention=kernels)
        for kernels in ("sdpa", "flash")
    )
    for with_mask, without in zip(masked.layers, flash.layers, strict=True):
        assert without.kept.per_row < with_mask.kept.per_row - 64 * 64, "at least a byte for every pair of tokens"
