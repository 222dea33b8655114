"""Losses against float64 references written from the definition; the chunked head against the whole."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from shoal.terms import CrossEntropy, ForwardKL, needs_teacher, term_names
from shoal.train.losses import LOSSES, chunked_head_loss, cross_entropy, forward_kl

N, V, D = 7, 23, 5


def reference_forward_kl(student, teacher, temperature):
    """Sum over the vocabulary of p (log p - log q), one Python number per token."""
    values = []
    for q_logits, p_logits in zip(student.tolist(), teacher.tolist(), strict=True):
        q_weights = [math.exp(x / temperature) for x in q_logits]
        p_weights = [math.exp(x / temperature) for x in p_logits]
        q = [w / sum(q_weights) for w in q_weights]
        p = [w / sum(p_weights) for w in p_weights]
        values.append(temperature**2 * sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p, q, strict=True)))
    return values


def reference_forward_kl_gradient(student, teacher, temperature):
    """d/dz of T^2 KL(p || softmax(z / T)) is T (q - p)."""
    q = torch.softmax(student / temperature, -1)
    p = torch.softmax(teacher / temperature, -1)
    return temperature * (q - p)


def gradient(leaf):
    assert leaf.grad is not None
    return leaf.grad


def logits(seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, V, generator=generator, dtype=torch.float64)


LABELS = torch.arange(N) * 3 % V


@pytest.mark.parametrize(("temperature", "scale"), itertools.product([0.5, 1.0, 2.0, 7.0], [0.1, 2.0, 8.0]))
def test_forward_kl_equals_its_definition_in_value_and_gradient(temperature, scale):
    student, teacher = logits(0, scale), logits(1, scale)
    leaf = student.float().requires_grad_()
    values = forward_kl(leaf, teacher.float(), LABELS, temperature=temperature)
    values.sum().backward()
    expected = torch.tensor(reference_forward_kl(student, teacher, temperature), dtype=torch.float64)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)
    expected_gradient = reference_forward_kl_gradient(student, teacher, temperature)
    torch.testing.assert_close(gradient(leaf).double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_forward_kl_of_a_teacher_with_itself_is_zero_with_zero_gradient():
    leaf = logits(3).float().requires_grad_()
    values = forward_kl(leaf, leaf.detach().clone(), LABELS, temperature=2.0)
    values.sum().backward()
    assert values.abs().max() < 1e-6
    assert gradient(leaf).abs().max() < 1e-6


def test_forward_kl_is_finite_where_the_student_excludes_the_teachers_token():
    teacher = torch.full((1, V), -1e4)
    teacher[0, 3] = 0.0
    student = torch.zeros(1, V)
    student[0, 3] = -1e4
    assert torch.isfinite(forward_kl(student, teacher, LABELS[:1])).all()


def test_cross_entropy_equals_its_definition():
    student = logits(4)
    leaf = student.float().requires_grad_()
    values = cross_entropy(leaf, None, LABELS)
    values.sum().backward()
    expected = [
        -math.log(math.exp(row[label]) / sum(map(math.exp, row)))
        for row, label in zip(student.tolist(), LABELS.tolist(), strict=True)
    ]
    torch.testing.assert_close(values.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    one_hot = functional.one_hot(LABELS, V).double()
    torch.testing.assert_close(gradient(leaf).double(), torch.softmax(student, -1) - one_hot, rtol=1e-4, atol=1e-6)


def head(hidden, weight, bias=None):
    return functional.linear(hidden, weight, bias)


def setting(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student_hidden, teacher_hidden = (torch.randn(N, D, generator=generator, dtype=dtype) for _ in range(2))
    weight, teacher_weight = (torch.randn(V, D, generator=generator, dtype=dtype) for _ in range(2))
    bias = torch.randn(V, generator=generator, dtype=dtype)
    return student_hidden, teacher_hidden, weight, bias, teacher_weight


TERMS = (ForwardKL(weight=0.7, temperature=2.0), CrossEntropy(weight=0.3))


def whole(student_hidden, teacher_hidden, weight, bias, teacher_weight):
    """The same loss without chunks and without a hand-written backward."""
    student_logits = head(student_hidden, weight, bias)
    teacher_logits = head(teacher_hidden, teacher_weight)
    sums = [
        LOSSES[t.kind](student_logits, teacher_logits, LABELS, temperature=getattr(t, "temperature", 1.0)).sum()
        for t in TERMS
    ]
    return torch.stack([t.weight * s for t, s in zip(TERMS, sums, strict=True)]).sum(), sums


@pytest.mark.parametrize("chunk", [1, 2, 3, N, 100])
def test_chunked_head_loss_equals_the_whole_in_value_and_every_gradient(chunk):
    student_hidden, teacher_hidden, weight, bias, teacher_weight = setting()
    results = []
    for chunked in (False, True):
        leaves = [t.clone().requires_grad_() for t in (student_hidden, weight, bias)]
        if chunked:
            loss, sums = chunked_head_loss(
                leaves[0],
                teacher_hidden,
                LABELS,
                student_head=head,
                student_parameters=(leaves[1], leaves[2]),
                teacher_head=lambda h: head(h, teacher_weight),
                terms=TERMS,
                chunk=chunk,
            )
        else:
            loss, sums = whole(leaves[0], teacher_hidden, leaves[1], leaves[2], teacher_weight)
            sums = torch.stack(sums).double()
        (3.0 * loss).backward()  # a factor, because the trainer divides by the step's token count
        results.append((loss.detach(), sums.detach(), *(leaf.grad for leaf in leaves)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_chunked_head_loss_leaves_a_frozen_head_alone():
    student_hidden, teacher_hidden, weight, bias, teacher_weight = setting()
    leaf = student_hidden.clone().requires_grad_()
    loss, _ = chunked_head_loss(
        leaf,
        teacher_hidden,
        LABELS,
        student_head=head,
        student_parameters=(weight, bias),
        teacher_head=lambda h: head(h, teacher_weight),
        terms=TERMS,
        chunk=3,
    )
    loss.backward()
    expected_leaf = student_hidden.clone().requires_grad_()
    whole(expected_leaf, teacher_hidden, weight, bias, teacher_weight)[0].backward()
    torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=1e-5, atol=1e-5)
    assert weight.grad is None


def test_chunked_head_loss_never_holds_the_logits_of_all_tokens():
    seen = []

    def watching_head(hidden, weight):
        seen.append(len(hidden))
        return head(hidden, weight)

    student_hidden, teacher_hidden, weight, _, teacher_weight = setting()
    chunked_head_loss(
        student_hidden,
        teacher_hidden,
        LABELS,
        student_head=watching_head,
        student_parameters=(weight,),
        teacher_head=lambda h: watching_head(h, teacher_weight),
        terms=TERMS,
        chunk=3,
    )
    assert sorted(seen) == [1, 1, 3, 3, 3, 3]


def test_chunked_head_loss_under_autocast_gives_fp32_gradients_near_the_exact_ones():
    student_hidden, teacher_hidden, weight, _, teacher_weight = setting()
    leaves = [t.clone().requires_grad_() for t in (student_hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_head_loss(
            leaves[0],
            teacher_hidden,
            LABELS,
            student_head=head,
            student_parameters=(leaves[1],),
            teacher_head=lambda h: head(h, teacher_weight),
            terms=TERMS,
            chunk=2,
        )
    loss.backward()
    exact = [t.clone().requires_grad_() for t in (student_hidden, weight)]
    whole(exact[0], teacher_hidden, exact[1], None, teacher_weight)[0].backward()
    for found, expected in zip(leaves, exact, strict=True):
        assert found.grad is not None
        assert found.grad.dtype == torch.float32
        torch.testing.assert_close(found.grad, expected.grad, rtol=0.1, atol=0.15)


def test_chunked_head_loss_refuses_a_batch_without_supervised_tokens():
    student_hidden, teacher_hidden, weight, _, teacher_weight = setting()
    with pytest.raises(ValueError, match="no supervised token"):
        chunked_head_loss(
            student_hidden[:0],
            teacher_hidden[:0],
            LABELS[:0],
            student_head=head,
            student_parameters=(weight,),
            teacher_head=lambda h: head(h, teacher_weight),
            terms=TERMS,
            chunk=3,
        )


def test_terms_of_one_kind_get_curves_of_their_own():
    assert term_names((ForwardKL(), CrossEntropy())) == ["forward_kl", "cross_entropy"]
    assert term_names((ForwardKL(), ForwardKL(temperature=4.0))) == [
        "forward_kl_1",
        "forward_kl_2",
    ]


def test_a_pure_text_loss_needs_no_teacher():
    assert not needs_teacher((CrossEntropy(),))
    assert needs_teacher((ForwardKL(),))


def test_a_term_of_weight_zero_is_computed_for_its_curve_and_trains_nothing():
    student_hidden, teacher_hidden, weight, _, teacher_weight = setting()
    watched = (CrossEntropy(), ForwardKL(weight=0.0))
    assert needs_teacher(watched), "without the teacher's states the zero-weight term fails"
    gradients = []
    for terms in (watched, watched[:1]):
        leaf = student_hidden.clone().requires_grad_()
        loss, sums = chunked_head_loss(
            leaf,
            teacher_hidden if needs_teacher(terms) else None,
            LABELS,
            student_head=head,
            student_parameters=(weight,),
            teacher_head=lambda h: head(h, teacher_weight),
            terms=terms,
            chunk=3,
        )
        loss.backward()
        gradients.append(leaf.grad)
        assert loss.item() == pytest.approx(sums[0].item())
    torch.testing.assert_close(gradients[0], gradients[1])
