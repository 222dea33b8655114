"""What tests of the preflight share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def tiny_job() -> Any:
    from jobs import job_of  # loads torch

    return job_of()
