"""docs/tutorials/python.md: all its code, block after block as a reader would run it, on a tiny checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

DOCUMENT = Path(__file__).parents[3] / "docs/tutorials/python.md"
NAME = '"HuggingFaceTB/SmolLM2-135M"'


def blocks() -> list[tuple[int, str]]:
    """Every block of Python with the number of its first line."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


@pytest.mark.prove
def test_every_example_runs(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a launched training asks this machine what it multiplies fast in: so does this process
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert blocks()[0][1].count(NAME) == 1
    for line, block in blocks():
        code = "\n" * (line - 1) + block.replace(NAME, repr(str(teacher)))
        exec(compile(code, str(DOCUMENT), "exec"), names)  # a traceback names the document's line
    assert len(names["plan"].drop) == 2
    assert list(names["run"].scores) == ["teacher", "pruned", "distilled"]
    assert len(names["run"].to_pandas()) == 6
    healed, student = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("distilled", "distilled-chat")
    )
    assert healed.config.num_hidden_layers == student.config.num_hidden_layers == 4


def test_every_block_of_the_document_is_python() -> None:
    """What is written as plain text would not be run."""
    fences = re.findall(r"^```(\w*)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert fences[::2] == ["python"] * len(blocks())
    assert not any(fences[1::2])
