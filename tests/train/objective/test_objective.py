"""The student during training: the objective inside its forward, what is frozen, what is shared with the teacher."""

from typing import Any

import architectures
import pytest
import torch
from packed_rows import batch
from tiny import tiny_model
from torch.nn import functional

from shoal.data.packing import IGNORED
from shoal.errors import UserError
from shoal.recipe.distill import SAMPLES
from shoal.recipe.losses import CrossEntropy, ForwardKL
from shoal.train.objective.host_batch import OnHost
from shoal.train.objective.objective import Objective, Signals, final_hidden, output_head, to_logits

TERMS = (ForwardKL(),)


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def objective(student, teacher, terms=TERMS, *, chunk=5, sources=None, host=None):
    installed = Objective(student, to_logits(teacher), terms=terms, chunk=chunk, sources=sources)
    installed.install()
    rows = batch()
    with torch.no_grad():
        hidden = final_hidden(teacher, rows["input_ids"], rows["position_ids"])
    loss, sums = student(**rows, signals=Signals(hidden), on_host=host)
    installed.uninstall()
    return loss, sums


OF_SCALED_LOGITS: dict[str, dict[str, Any]] = {
    "cohere": {"vocab_size": 272, "logit_scale": 0.25},
    "gemma2": {"vocab_size": 272, "final_logit_softcapping": 0.5},
}


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3", "gemma3", *OF_SCALED_LOGITS])
def test_objective_equals_the_loss_on_the_models_own_logits(kind):
    if kind in OF_SCALED_LOGITS:
        student, teacher = (architectures.tiny_model(kind, seed=seed, **OF_SCALED_LOGITS[kind]) for seed in (1, 2))
    else:
        student, teacher = tiny_model(kind, seed=1), tiny_model(kind, seed=2)
    loss, _ = objective(student, teacher)
    loss.backward()
    found = {name: gradient(p).clone() for name, p in student.named_parameters()}
    student.zero_grad()

    rows = batch()
    inputs = {"input_ids": rows["input_ids"], "position_ids": rows["position_ids"], "use_cache": False}
    student_logits = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[:, :-1]
    targets = rows["labels"][:, 1:]
    kept = targets != IGNORED
    assert kept.sum() == 2 * (6 + 4)  # each document predicts all its tokens but the first
    ours, theirs = (logits[kept].log_softmax(-1) for logits in (student_logits, teacher_logits))
    expected = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_undoing_the_objective_gives_the_model_back():
    student = tiny_model("llama")
    before = student(input_ids=batch()["input_ids"]).logits
    objective(student, tiny_model("llama", seed=1))
    assert torch.equal(student(input_ids=batch()["input_ids"]).logits, before)


def test_a_head_that_is_not_linear_is_refused():
    model = tiny_model("llama")
    model.lm_head = torch.nn.Identity()
    with pytest.raises(UserError, match=r"output head is Identity, not nn\.Linear"):
        output_head(model)


def test_a_micro_batch_without_a_supervised_token_gives_zero_through_every_parameter():
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    installed = Objective(student, to_logits(teacher), terms=TERMS, chunk=5)
    installed.install()
    rows = batch()
    rows["labels"] = torch.full_like(rows["labels"], IGNORED)
    with torch.no_grad():
        hidden = final_hidden(teacher, rows["input_ids"], rows["position_ids"])
    loss, sums = student(**rows, signals=Signals(hidden))
    loss.backward()
    installed.uninstall()
    assert loss.item() == 0
    assert not sums.any()
    assert all(not gradient(parameter).any() for parameter in student.parameters())


SOURCES_BS = torch.tensor([[0] * 7 + [1] * 5, [2] * 7 + [0] * 5])
"""A source for every document of the batch."""
BY_SOURCE = (frozenset({0, 2}), frozenset({1, 2}))
"""The first source has the first of two terms, the second the second, the third both."""


@pytest.mark.parametrize("chunk", [3, 100])
def test_a_term_learns_from_the_tokens_of_its_sources_and_from_no_others(chunk):
    """Against a loop over tokens in float64, gradients included."""
    student, teacher = tiny_model("llama", seed=1).double(), tiny_model("llama", seed=2).double()
    terms = (ForwardKL(weight=0.7), CrossEntropy(weight=0.3))
    rows = batch()
    host = OnHost(rows["labels"], rows["position_ids"], rows=(0, 1), sources_BS=SOURCES_BS)
    loss, sums = objective(student, teacher, terms, chunk=chunk, sources=BY_SOURCE, host=host)
    loss.backward()
    found = {name: gradient(p).clone() for name, p in student.named_parameters()}
    student.zero_grad()

    inputs = {"input_ids": rows["input_ids"], "position_ids": rows["position_ids"], "use_cache": False}
    log_q = student(**inputs).logits.log_softmax(-1)
    log_p = teacher(**inputs).logits.log_softmax(-1).detach()
    expected = torch.zeros(2, dtype=torch.float64)
    tokens = [0, 0]
    for row in range(2):
        for place in range(11):
            label, source = int(rows["labels"][row, place + 1]), int(SOURCES_BS[row, place + 1])
            if label == IGNORED:
                continue
            p, q = log_p[row, place], log_q[row, place]
            values = ((p.exp() * (p - q)).sum(), -q[label])
            learns = ([1, 0], [0, 1], [1, 1])[source]
            expected = expected + torch.stack([value * each for value, each in zip(values, learns, strict=True)])
            tokens = [count + each for count, each in zip(tokens, learns, strict=True)]
    (0.7 * expected[0] + 0.3 * expected[1]).backward()
    torch.testing.assert_close(sums[:2], expected.detach())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    plain = Objective(student, to_logits(teacher), terms=terms, chunk=chunk)
    ours = Objective(student, to_logits(teacher), terms=terms, chunk=chunk, sources=BY_SOURCE)
    assert ours.tokens_by_term(host) == tokens == [6 + 6 + 4, 4 + 6]
    assert plain.tokens_by_term(host) == [20, 20]


def test_samples_are_a_source_and_rows_of_no_known_source_are_a_fault():
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    terms = (ForwardKL(weight=0.7), CrossEntropy(weight=0.3))
    rows = batch()
    plain, _ = objective(student, teacher, terms[:1])
    samples, _ = objective(student, teacher, terms, sources=(frozenset({0, SAMPLES}), frozenset({1})))
    assert torch.equal(samples, plain)
    with pytest.raises(AssertionError, match="packed without their sources"):
        objective(student, teacher, terms, sources=BY_SOURCE, host=OnHost(rows["labels"], rows["labels"], rows=(0, 1)))


def test_rows_without_sources_serve_terms_that_ask_no_teacher():
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    rows = batch()
    host = OnHost(rows["labels"], rows["position_ids"], rows=(0, 1))
    found = [objective(student, teacher, (CrossEntropy(),), host=given)[0] for given in (host, None)]
    assert torch.equal(*found)
