"""Which token is drawn, from a distribution that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shoal.inference.generation import draw


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_distribution_says(temperature: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, -math.inf, 1.0])
    count = 40_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(count))
    drawn = draw(logits.expand(count, -1), uniforms, temperature=temperature)
    expected = torch.softmax(logits.double() / temperature, 0)
    found = drawn.bincount(minlength=5) / count
    # five standard errors of a share
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert found[3] == 0


def test_temperature_0_takes_the_likeliest_token_and_low_temperatures_come_to_it() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(1))
    greedy = draw(logits, uniforms, temperature=0)
    assert torch.equal(greedy, logits.argmax(-1))
    assert torch.equal(draw(logits, uniforms, temperature=1e-4), greedy)


def test_top_p_keeps_the_fewest_tokens_that_hold_the_share() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    uniforms = torch.linspace(0, 1, 1001)[:-1]
    drawn = draw(logits.expand(1000, -1), uniforms, temperature=1.0, top_p=0.7)
    assert drawn.unique().tolist() == [1, 3]
    assert (drawn == 1).double().mean().item() == pytest.approx(2 / 3, abs=2e-3)
