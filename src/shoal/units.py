"""Numbers with their units, in words."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """A size in the unit a reader thinks in."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
