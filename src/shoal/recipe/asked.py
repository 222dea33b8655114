"""A recipe may come from anybody: what it can say that acts beyond its run directory, and who has to say that.

The command line is the user's own word, and so is Python. A file is data: it may have come by mail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from shoal.errors import UserError
from shoal.yaml_text import own_yaml

ALLOW = "allow"
"""Word of the command that stands where `section.key=value` may, and is no key of a recipe."""
KINDS = ("send", "write", "code")
"""Values of it."""


class Row(NamedTuple):
    """One place of a recipe that acts beyond the run directory."""

    place: str
    can: Literal["send", "write", "code", "secret"]
    """What it can do: send something away, write outside the run directory, run code, read a secret."""
    answer: Literal["asked", "refused"]
    """asked = a file alone may not say it: the command line does, or allows it. refused = nobody may say it."""
    why: str
    """What it does, or what to set instead."""
    value: Any = None
    """The value that does it; None = any that switches it on."""

    def is_in(self, said: Mapping[str, Any]) -> bool:
        """Whether ``said``, a recipe as plain mappings, says it."""
        found = at(said, self.place)
        if isinstance(found, Mapping):
            return found.get("enabled", True) is not False
        return found not in (None, False) if self.value is None else found == self.value


ROWS = [Row(**row) for row in own_yaml(__file__)]


def at(said: Any, place: str) -> Any:
    """What stands at ``place``; None = nothing."""
    for key in place.split("."):
        said = said.get(key) if isinstance(said, Mapping) else None
    return said


def refused(section: str) -> dict[str, str]:
    """Keys of ``section`` that no recipe may say, each with what to set instead."""
    places = {row.place: row.why for row in ROWS if row.answer == "refused"}
    return {place.removeprefix(f"{section}."): why for place, why in places.items() if place.startswith(f"{section}.")}


def asked(said: Mapping[str, Any], own: Collection[str]) -> Iterator[Row]:
    """What ``said`` does that acts beyond its run directory and is not in ``own``, places that the user has said."""
    for row in ROWS:
        if row.answer == "asked" and row.is_in(said) and not any(f"{row.place}.".startswith(f"{key}.") for key in own):
            yield row


def allowed(overrides: Sequence[str]) -> set[str]:
    """The kinds of what a recipe can do that the words `allow=send,code` among ``overrides`` allow it."""
    words = [word.partition("=") for word in overrides]
    kinds = {kind for key, _, value in words if key == ALLOW for kind in value.split(",")}
    if unknown := kinds.difference(KINDS):
        raise UserError(f"{ALLOW}: must be one or more of {', '.join(KINDS)}, with commas (got {', '.join(unknown)!r})")
    return kinds
