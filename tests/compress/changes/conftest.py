"""What tests of compensation share."""

from __future__ import annotations

import pytest

from shoal.compress.changes import fit


@pytest.fixture
def always_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gap is closed, as if the divergence fell each time: random models gain little."""
    monkeypatch.setattr(fit._Fitting, "_helps", lambda *_: True)
    monkeypatch.setattr(fit, "TOKENS_PER_FEATURE", 1)
