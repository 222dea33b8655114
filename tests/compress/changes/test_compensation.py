"""What makes up for dropped layers: the regression against an independent one, and folded weights against hooks.

Covers: shoal.compress.changes.fit, shoal.compress.changes.fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_model
from packed_rows import packed
from torch import Tensor
from transformers import PreTrainedModel

from shoal.compress.changes import fit, fold
from shoal.compress.changes.calibration import Source
from shoal.compress.changes.fit import SHRINKAGES, Fitted, Sums, fit_correction, fit_factor
from shoal.compress.changes.fold import REMEDY
from shoal.compress.edits.tensors import tensors_in_place
from shoal.compress.metrics.metric import Calibration
from shoal.compress.surgery.cut_model import cut_model, skipped
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, state_of, with_state
from shoal.recipe.prune import Compensate

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "smollm3", "granite", "phi3", "starcoder2", "nemotron", "olmo", "helium"),
    *("gemma", "gemma2", "gemma3_text", "glm4"),  # the last three norm what the halves write
    *("gpt2", "gpt_neox", "gptj", "falcon", "cohere", "phi", "stablelm", "bloom", "mpt"),  # parallel ones among them
    *("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "dbrx"),
)
NO_FACTOR = ("olmo2", "openai-gpt")
"""Families that read the raw residual stream, and norm what the halves write."""
POST_NORM = ("gemma2", "gemma3_text", "glm4")
"""Families that norm what the halves write."""
DROP = (2, 4)


def some(names: Sequence[str]) -> list[Any]:
    """Cases of a test over families, of which `make test` runs three."""
    return [
        name if name in ("llama", "gemma2", "gpt2") else pytest.param(name, marks=pytest.mark.prove) for name in names
    ]


MANY = packed([[16, 16]] * 24)
LONG = packed([[16, 16]] * 160)
ROWS = replace(MANY, input_ids_NS=MANY.input_ids_NS % 90)  # the tiny models know 96 tokens


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ROWS.input_ids_NS[:4], use_cache=False).logits.double()


@contextmanager
def multiplied(teacher: PreTrainedModel, factors: dict[int, float]) -> Iterator[None]:
    """The state after a layer times a factor, while the block runs."""

    def hook(factor: float) -> Any:
        return lambda _, __, output: with_state(output, state_of(output) * factor)

    with ExitStack() as stack:
        for layer, factor in factors.items():
            stack.enter_context(decoder_layers(teacher)[layer].register_forward_hook(hook(factor)))
        yield


def held_out_end(teacher: PreTrainedModel, rows: PackedRows) -> Tensor:
    """(B, S, D) The teacher's final state of the first held-out batch."""
    fitting = fit._Fitting(Source(teacher), DROP, Compensate(method="scale"), Calibration(rows, 4), None)
    fitting._see_teacher()
    return fitting.held_out[0].behind[fit.END]


def compensate(teacher: PreTrainedModel, drop: Sequence[int], settings: Compensate, rows: PackedRows) -> Fitted:
    return fit.compensate(Source(teacher), drop, settings, Calibration(rows, 4))


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-4


@pytest.mark.parametrize("name", some(FAMILIES))
@pytest.mark.usefixtures("always_closed")
def test_folded_factors_equal_a_hook_that_multiplies(name: str) -> None:
    teacher = tiny_model(name)
    before = logits(teacher)
    found = compensate(teacher, DROP, Compensate(method="scale"), ROWS)
    factors = {gap.last: gap.factor for gap in found.gaps}
    assert [(gap.first, gap.last) for gap in found.gaps] == [(2, 2), (4, 4)]
    assert all(factor != 1 for factor in factors.values())
    with skipped(teacher, DROP), multiplied(teacher, factors):
        expected = logits(teacher)
    with tensors_in_place(teacher, found.layers):
        student = cut_model(teacher, DROP)
    assert_near(logits(student), expected)
    assert torch.equal(logits(teacher), before)
    assert not found.layers.keys() & {0, 1, 2}, "what lies below the first gap stays the teacher's"
    with skipped(teacher, DROP):
        assert float((logits(teacher) - expected).norm() / expected.norm()) > 1e-3, "the factors change nothing"


@pytest.mark.parametrize("name", some([name for name in FAMILIES if name not in POST_NORM]))
@pytest.mark.parametrize("method", ["linear", "both"])
@pytest.mark.usefixtures("always_closed")
def test_a_folded_correction_moves_the_state_towards_the_teachers(name: str, method: Any) -> None:
    """With the corrected weights in force, a factor's hook and the skips, the teacher gives what the student gives."""
    teacher = tiny_model(name)
    found = compensate(teacher, DROP, Compensate(method=method), ROWS)
    factors = {gap.last: gap.factor for gap in found.gaps}
    assert all(gap.error_after < gap.error_before for gap in found.gaps)
    assert (method == "linear") == all(factor == 1 for factor in factors.values())
    with tensors_in_place(teacher, found.layers):
        student = cut_model(teacher, DROP)
    # the teacher with the corrections alone: what the factors below took from layer 3 is given back
    product = factors[2]
    own = dict(decoder_layers(teacher)[3].named_parameters())
    changed = {n: t for n, t in found.layers[3].items() if not torch.allclose(t * product, own[n], rtol=1e-4)}
    corrected = {1: found.layers[1], 3: {n: t * product for n, t in changed.items()}}
    with tensors_in_place(teacher, corrected), skipped(teacher, DROP), multiplied(teacher, factors):
        assert_near(logits(student), logits(teacher))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, method) for name in NO_FACTOR for method in ("scale", "linear", "both")),
        *((name, method) for name in POST_NORM for method in ("linear", "both")),
    ],
)
def test_what_cannot_be_folded_is_refused_before_anything_is_fitted(
    name: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit._Fitting, "_close", lambda *_: pytest.fail("fitted"))
    with pytest.raises(UserError, match=f"can be folded into (them|its weights); {REMEDY}"):
        compensate(tiny_model(name), DROP, Compensate(method=method), ROWS)


def test_a_gap_where_the_divergence_does_not_fall_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_model("llama")
    told = iter([[11.0, 10.0], [7.0]])
    monkeypatch.setattr(fit._Fitting, "_divergences", lambda *_: next(told))
    found = compensate(teacher, DROP, Compensate(method="scale"), ROWS)
    first, second = found.gaps
    assert not first.is_closed
    assert first.divergence_after == first.divergence_before == second.divergence_before == 10
    assert second.is_closed
    assert second.divergence_after == 7
    assert found.layers.keys() == {5}


@pytest.mark.parametrize("num_features", [0, 1, 48, 1536])
@pytest.mark.parametrize("length", [2, 64, 512])
def test_text_is_as_long_as_a_correction_needs_and_a_row_more_is_held_out(num_features: int, length: int) -> None:
    num_tokens = fit.needed_tokens(num_features, length)

    def is_enough(num_rows: int) -> bool:
        held_out = max(1, num_rows // 8)
        return num_rows > held_out and (num_rows - held_out) * length >= 4 * num_features

    assert num_tokens % length == 0
    assert is_enough(num_tokens // length)
    assert not is_enough(num_tokens // length - 1)


def reference_correction(x: np.ndarray, f: np.ndarray, y: np.ndarray, shrinkage: float) -> tuple[float, np.ndarray]:
    """The factor and the matrix of least weighted error, by one system of equations over all unknowns."""
    w = 1 / (y**2).sum(-1)
    num_features, size = f.shape[1], x.shape[1]
    mean_square = (w[:, None] * f**2).sum() / num_features
    # unknowns: the factor, then the matrix row by row
    rows = np.concatenate(
        [x[:, :, None], np.einsum("nf,de->ndfe", f, np.eye(size)).reshape(len(x), size, -1)], axis=2
    ).reshape(len(x) * size, -1)
    weights = np.repeat(w, size)
    normal = rows.T @ (weights[:, None] * rows)
    normal[1:, 1:] += shrinkage * mean_square * np.eye(num_features * size)
    found = np.linalg.solve(normal, rows.T @ (weights * y.reshape(-1)))
    return float(found[0]), found[1:].reshape(num_features, size)


@pytest.mark.parametrize("with_factor", [True, False])
def test_the_regression_is_that_of_an_independent_solver(with_factor: bool) -> None:
    chance = np.random.default_rng(0)
    x, f = chance.normal(size=(400, 5)), chance.normal(size=(400, 7))
    true = chance.normal(size=(7, 5)) * 0.3
    y = 1.3 * x + f @ true + 0.05 * chance.normal(size=(400, 5))
    y[::50] *= 100  # sinks
    x[::50] *= 100
    train, test = Sums(), Sums()
    for part in np.array_split(np.arange(300), 4):
        train.add(*(torch.from_numpy(a[part]) for a in (x, f, y)))
    test.add(*(torch.from_numpy(a[300:]) for a in (x, f, y)))
    found = fit_correction(train, test, with_factor=with_factor)
    assert found.added_FD is not None

    def error_of(factor: float, added: np.ndarray) -> float:
        rest = y[300:] - factor * x[300:] - f[300:] @ added
        return float(((rest**2).sum(-1) / (y[300:] ** 2).sum(-1)).mean())

    expected = []
    for shrinkage in SHRINKAGES:
        factor, added = reference_correction(x[:300], f[:300], y[:300], shrinkage)
        if not with_factor:
            w_y = 1 / (y[:300] ** 2).sum(-1)
            normal = (f[:300] * w_y[:, None]).T @ f[:300]
            normal += shrinkage * np.trace(normal) / 7 * np.eye(7)
            factor, added = 1.0, np.linalg.solve(normal, (f[:300] * w_y[:, None]).T @ (y[:300] - x[:300]))
        expected.append((error_of(factor, added), factor, added))
    least = min(error for error, *_ in expected)
    error, factor, added = next(one for one in expected if one[0] <= 1.02 * least)
    assert found.error == pytest.approx(error, rel=1e-3)
    assert found.factor == pytest.approx(factor, rel=1e-3)
    np.testing.assert_allclose(found.added_FD.numpy(), added, rtol=0.02, atol=2e-3)
    assert test.error() == pytest.approx(error_of(1.0, np.zeros((7, 5))), rel=1e-4)


def test_the_factor_alone_is_the_weighted_least_squares_one() -> None:
    chance = np.random.default_rng(1)
    x = chance.normal(size=(100, 4)) * chance.uniform(0.1, 50, size=(100, 1))
    y = 0.7 * x + 0.1 * chance.normal(size=(100, 4))
    sums = Sums()
    sums.add(torch.from_numpy(x), None, torch.from_numpy(y))
    w = 1 / (y**2).sum(-1, keepdims=True)
    assert fit_factor(sums, sums).factor == pytest.approx(float((w * x * y).sum() / (w * x * x).sum()), rel=1e-5)


def test_it_costs_less_than_two_forwards_over_its_text() -> None:
    teacher, passed = tiny_model("llama"), 0
    rows = replace(LONG, input_ids_NS=LONG.input_ids_NS % 90)

    def count_rows(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal passed
        passed += (args[0] if args else kwargs["hidden_states"]).shape[0]

    with ExitStack() as stack:
        for layer in decoder_layers(teacher):
            stack.enter_context(layer.get_submodule("mlp").register_forward_pre_hook(count_rows, with_kwargs=True))
        compensate(teacher, DROP, Compensate(method="both"), rows)
    assert len(rows) * 6 < passed <= 1.7 * len(rows) * 6


def test_one_sink_does_not_prove_a_wrong_fold() -> None:
    expected = torch.ones(1, 10, 4)
    expected[0, 0] *= 1e5
    change, wrong = torch.full_like(expected, 0.05), expected.clone()
    wrong[0, 1:] += 0.05
    assert fold.same_states(expected + 1e-4 * change, expected, change)
    assert not fold.same_states(wrong, expected, change)


@pytest.mark.parametrize("name", ["llama", "bloom", "mpt"])  # the last two take no positions
def test_documents_of_a_row_do_not_see_each_other(name: str) -> None:
    teacher = tiny_model(name)
    end_BSD = held_out_end(teacher, ROWS)
    alone = replace(ROWS, input_ids_NS=ROWS.input_ids_NS[:, 16:], position_ids_NS=ROWS.position_ids_NS[:, 16:])
    expected_BSD = held_out_end(teacher, alone)
    torch.testing.assert_close(end_BSD[:, 16:], expected_BSD, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "both"])
@pytest.mark.parametrize("name", some(["llama", "granite", "mixtral"]))
@pytest.mark.usefixtures("always_closed")
def test_the_state_behind_a_gap_is_as_near_to_the_teachers_as_the_regression_says(name: str, method: Any) -> None:
    teacher, single = tiny_model(name), packed([[32]] * 24)
    rows = replace(single, input_ids_NS=single.input_ids_NS % 90)
    found = compensate(teacher, DROP, Compensate(method=method), rows)
    held_out = rows.input_ids_NS[-3:]

    def after(layer: int) -> Tensor:
        caught: list[Tensor] = []
        with (
            torch.no_grad(),
            decoder_layers(teacher)[layer].register_forward_hook(
                lambda _, __, output: caught.append(state_of(output).double())
            ),
        ):
            teacher(input_ids=held_out, use_cache=False)
        return caught[0]

    target = after(2)
    with tensors_in_place(teacher, {1: found.layers[1]}):
        ours = after(1) * found.gaps[0].factor
    error = ((ours - target).square().sum(-1) / target.square().sum(-1)).mean()
    assert float(error) == pytest.approx(found.gaps[0].error_after, rel=2e-4)
