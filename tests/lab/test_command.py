"""The verb of the lab: its list, and what it refuses before anything is loaded."""

from __future__ import annotations

import pytest

from shoal.errors import UserError
from shoal.lab import command


def test_the_list_has_a_line_for_every_part() -> None:
    listed = command.lab([])
    assert [line.split()[2] for line in listed.splitlines()] == list(command.PARTS)


def test_an_unknown_part_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"^shoal lab tarot: there is no such part; there are "):
        command.lab(["tarot", "runs/mine"])


def test_a_part_without_a_run_is_refused() -> None:
    for name in command.PARTS:
        with pytest.raises(UserError, match="name a recipe or a run directory"):
            command.lab([name, "key=1"])
