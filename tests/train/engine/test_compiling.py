"""Layers and the loss at the head that run compiled: the same numbers, the same names, and a way back.

Most tests take graphs without machine code (`aot_eager`), which needs no C++ compiler.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packed_rows import batch
from tiny import tiny_model
from torch import Tensor
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from transformers import PreTrainedModel

from shoal.models.anatomy import decoder_layers
from shoal.recipe.losses import (
    JSD,
    TAID,
    CrossEntropy,
    ForwardKL,
    LogitTerm,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from shoal.train.engine import kernels
from shoal.train.engine.kernels import Compiled
from shoal.train.objective.chunked_loss import Coarse, block_loss
from shoal.train.objective.objective import Objective, Signals, final_hidden, to_logits
from shoal.train.on_policy import own_forwards

pytestmark = pytest.mark.slow

DENSE: tuple[LogitTerm, ...] = (
    ForwardKL(),
    ReverseKL(weight=0.5, temperature=2.0),
    JSD(weight=0.3),
    SkewedForwardKL(weight=0.2),
    SkewedReverseKL(weight=0.2),
    TAID(weight=0.1),
    CrossEntropy(weight=0.1),
)
COARSE: tuple[LogitTerm, ...] = (ForwardKL(), JSD(weight=0.3), CrossEntropy(weight=0.1))
ROWS, VOCABULARY, STORED = 24, 300, 8


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    dynamo_utils.counters.clear()
    monkeypatch.setattr(kernels, "BACKEND", "aot_eager")


def step(
    kind: str, *, compiled: bool, checkpointing: bool = False, autocast: bool = True
) -> tuple[Tensor, dict[str, Tensor], PreTrainedModel]:
    """The loss of one micro-batch, its gradients, and the student, whose lowest layer is frozen."""
    student, teacher = tiny_model(kind, seed=1).train(), tiny_model(kind, seed=2).requires_grad_(False)
    decoder_layers(student)[0].requires_grad_(False)
    if checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    layers = [*decoder_layers(student), *decoder_layers(teacher)] if compiled else None
    objective = Objective(student, to_logits(teacher), terms=(ForwardKL(),), chunk=5, compiled_layers=layers)
    objective.install()
    rows = batch()
    with torch.no_grad():
        hidden = final_hidden(teacher, rows["input_ids"], rows["position_ids"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = student(**rows, signals=Signals(hidden))
    loss.backward()
    objective.uninstall()
    return loss, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, student


@pytest.mark.sample(6)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3"])
def test_compiled_layers_and_loss_give_the_same_bits_as_graphs(kind: str, checkpointing: bool) -> None:
    loss, gradients, plain = step(kind, compiled=False, checkpointing=checkpointing)
    again, gradients_again, student = step(kind, compiled=True, checkpointing=checkpointing)
    assert dynamo_utils.counters["stats"]["unique_graphs"] >= 3, "of both models, and the loss"
    assert not dynamo_utils.counters["graph_break"]
    assert torch.equal(loss, again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert list(student.state_dict()) == list(plain.state_dict())
    assert not any("forward" in vars(layer) for layer in decoder_layers(student))


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler for inductor"
)


@pytest.mark.prove
@needs_compiler
def test_machine_code_gives_the_same_loss_and_gradients_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BACKEND", "inductor")
    loss, gradients, _ = step("llama", compiled=False, autocast=False)
    again, gradients_again, _ = step("llama", compiled=True, autocast=False)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.prove
def test_layers_of_a_kind_share_their_graphs() -> None:
    step("llama", compiled=True)
    first = dynamo_utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    dynamo_utils.counters.clear()
    student = tiny_model("llama", num_hidden_layers=12)
    compiled = Compiled(decoder_layers(student))
    compiled.install()
    student(input_ids=batch()["input_ids"], use_cache=False)
    compiled.uninstall()
    assert dynamo_utils.counters["stats"]["unique_graphs"] == 1 < first


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no instructions for this")


def fails_backwards() -> Callable[..., Any]:
    return aot_autograd(fw_compiler=lambda graph, _inputs: make_boxed_func(graph.forward), bw_compiler=fails)


@pytest.mark.parametrize("backend", [fails, fails_backwards()], ids=["forward", "backward"])
def test_what_cannot_be_compiled_runs_as_it_is_after_one_warning(
    backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loss, gradients, _ = step("llama", compiled=False)
    monkeypatch.setattr(kernels, "BACKEND", backend)
    with caplog.at_level(logging.WARNING, logger="shoal"):
        again, gradients_again, _ = step("llama", compiled=True)
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("shoal")]
    assert warning.startswith("distill.trainer.torch_compile: LlamaDecoderLayer.forward cannot be compiled; training")
    assert "no instructions for this" in warning
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, gradients_again[name]) for name, gradient in gradients.items())


@pytest.mark.prove
def test_text_is_written_by_layers_that_are_not_compiled() -> None:
    student = tiny_model("llama")
    compiled = Compiled(decoder_layers(student))
    compiled.install()
    with own_forwards(student):
        student.generate(batch()["input_ids"], max_new_tokens=3)  # pyright: ignore[reportCallIssue]
        assert not dynamo_utils.counters["stats"]
    student(input_ids=batch()["input_ids"])
    assert dynamo_utils.counters["stats"]
    compiled.uninstall()


def block(terms: Sequence[LogitTerm], *, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments of block_loss against a whole teacher."""
    made = torch.Generator().manual_seed(rows)
    student, teacher = (torch.randn(rows, VOCABULARY, generator=made).to(dtype) for _ in range(2))
    labels = torch.randint(0, VOCABULARY, (rows,), generator=made)
    learns = {index: None if index % 2 else torch.rand(rows, generator=made) > 0.3 for index in range(len(terms))}
    return terms, [0.4] * len(terms), student, teacher, labels, learns


def coarse_block(terms: Sequence[LogitTerm]) -> tuple[Any, ...]:
    _, shares, student, teacher, labels, learns = block(terms)
    log, ids = teacher.log_softmax(-1).topk(STORED)
    tail = (1 - log.exp().sum(-1, keepdim=True)).log()
    log = torch.cat([log, tail], -1)
    return terms, shares, student, Coarse(ids, log, log.exp(), 1.0), labels, learns


@pytest.mark.prove
@needs_compiler
@pytest.mark.parametrize("arguments", [block(DENSE), coarse_block(COARSE)], ids=["whole", "stored"])
def test_the_compiled_loss_is_the_eager_one_up_to_rounding(
    arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BACKEND", "inductor")
    compiled = Compiled([])
    loss = compiled.function(block_loss)
    values, gradient = block_loss(*arguments)
    compiled.install()
    values_again, gradient_again = loss(*arguments, True)
    compiled.uninstall()
    torch.testing.assert_close(values_again, values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_again, gradient, rtol=1e-4, atol=1e-6)
