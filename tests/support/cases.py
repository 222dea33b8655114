"""Cases of a test as rows of a YAML file beside it, where they are plain text and what is said or found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.yaml_text import read_yaml


def cases(test_file: str) -> Any:
    """What `x.yaml` beside `test_x.py` holds: rows, or lists of rows by name."""
    path = Path(test_file)
    return read_yaml(path.with_name(f"{path.stem.removeprefix('test_')}.yaml").read_text(encoding="utf-8"))
