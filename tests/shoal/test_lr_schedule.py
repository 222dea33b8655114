"""The learning rate of loops of our own."""

from __future__ import annotations

import pytest

from shoal.lr_schedule import warmup_cosine


def test_the_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    rates = [warmup_cosine(step, 100, final=0.25) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[52] == pytest.approx(0.625, abs=0.01)
    assert rates[99] == pytest.approx(0.25, abs=1e-3)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert warmup_cosine(0, 1, final=0.25) == 1
