"""Numbers and tables for a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


def bytes_text(count: float) -> str:
    """A size in the unit a reader thinks in."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def meant(name: str, known: Iterable[str], otherwise: str, *, cutoff: float = 0.5) -> str:
    """`did you mean 'x'?` of the one of ``known`` that is spelt most like ``name``; ``otherwise`` where none is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else otherwise


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> list[str]:
    """Lines whose columns have equal width, all flush right but those of ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def paragraphs(parts: Iterable[Sequence[str]]) -> str:
    """Lines of each part below each other, a blank line between parts; empty ones are left out."""
    return "\n\n".join("\n".join(part) for part in parts if part)


def signed(value: float, digits: int) -> str:
    """A number with its sign, a real minus sign where it is negative; without one where it is rounded to zero."""
    return _number_text(value, f"+.{digits}f")


def interval_text(values: Iterable[float], spec: str, unit: str = "", *, scale: float = 1) -> str:
    """`72.0 % [65.8, 78.2]`: a value times ``scale`` with the ends of its interval; `+` in ``spec`` as in signed."""
    value, low, high = (_number_text(scale * number, spec) for number in values)
    return f"{value}{unit} [{low}, {high}]"


def _number_text(value: float, spec: str) -> str:
    text = f"{value:{spec}}"
    return text[1:] if spec.startswith("+") and float(text) == 0 else text.replace("-", "−")


def listed(words: Iterable[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""


def layers_text(layers: Sequence[int]) -> str:
    """Indices with runs of three or more joined, each once: `3, 13 to 15`."""
    layers = tuple(dict.fromkeys(layers))
    parts: list[str] = []
    start = 0
    for end in range(1, len(layers) + 1):
        if end < len(layers) and layers[end] == layers[end - 1] + 1:
            continue
        run = layers[start:end]
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(layer) for layer in run]
        start = end
    return ", ".join(parts)


def count_text(count: float) -> str:
    """`134.5 million`; small counts in full."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:,.0f}"


def duration_text(seconds: float) -> str:
    """Seconds as minutes and hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
