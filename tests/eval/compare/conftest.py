"""What tests of the comparison share."""

from __future__ import annotations

from pathlib import Path

import pytest
from compared_runs import write_run


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two runs of one teacher: five layers of eight are left, or four, and the second was healed less."""
    return [write_run(tmp_path / "one"), write_run(tmp_path / "other", distilled=0.55, layers=4)]
