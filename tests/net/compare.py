"""Which entries differ between two recordings of the net: `python -m tests.net.compare OLD.json NEW.json`.

Exact by default; with `--tolerance .01` numbers may differ by that share, and what ends in `.bits` is left out, as
between processors of two kinds. Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEAST = 1e-4
"""Differences below it are none where there is a tolerance: losses near 0 are sums of rounding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float)
    options = parser.parse_args()
    old, new = (json.loads(file.read_text()) for file in (options.old, options.new))
    found = list(differences(old, new, options.tolerance))
    print(*(found or ["nothing differs"]), sep="\n")
    sys.exit(bool(found))


def differences(old: dict[str, Any], new: dict[str, Any], tolerance: float | None) -> Iterator[str]:
    """`case entry: old -> new` for every one that differs."""
    for case in dict.fromkeys([*old, *new]):
        if case not in old or case not in new:
            yield f"{case}: only in the {'new' if case not in old else 'old'} recording"
            continue
        for entry in dict.fromkeys([*old[case], *new[case]]):
            if tolerance is not None and entry.endswith(".bits"):
                continue
            before, after = old[case].get(entry), new[case].get(entry)
            if not equal(before, after, tolerance):
                yield f"{case} {entry}: {json.dumps(before)[:300]} -> {json.dumps(after)[:300]}"


def equal(old: Any, new: Any, tolerance: float | None) -> bool:
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(equal(a, b, tolerance) for a, b in zip(old, new, strict=True))
    if tolerance is not None and isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=tolerance, abs_tol=LEAST)
    return old == new


def portable(found: dict[str, Any]) -> dict[str, Any]:
    """What holds on every processor, numbers of seven digits."""
    return {
        case: {entry: rounded(value) for entry, value in entries.items() if not entry.endswith(".bits")}
        for case, entries in found.items()
    }


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
