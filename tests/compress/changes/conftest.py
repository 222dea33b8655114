"""What tests of compensation share."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.compress.changes import fit


@pytest.fixture
def always_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gap is closed, as if the divergence fell each time: random models gain little."""
    real = fit._Fitting._divergences

    def falling(self: Any, start: int, *variants: Any) -> list[float]:
        closed, *opened = real(self, start, *variants)
        return [closed / 1e6**start, *(100 * divergence for divergence in opened)]

    monkeypatch.setattr(fit._Fitting, "_divergences", falling)
    monkeypatch.setattr(fit, "FACTORS", (1e-3, 1e3))
    monkeypatch.setattr(fit, "TOKENS_PER_FEATURE", 1)
