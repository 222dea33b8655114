"""The text that layers are measured on: which of it, and the same for the command and for Python."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny import tiny_tokenizer

from shoal.compress.changes.calibration import calibration_rows
from shoal.launch.api.compressing import _rows
from shoal.recipe.measure import Measure
from shoal.recipe.section import TextSource


def test_text_sorted_by_kind_is_read_of_both_kinds_by_the_command_and_by_python(tmp_path: Path) -> None:
    """Of the first characters alone the second kind would never be seen."""
    texts = ["a" * 200] * 300 + ["b" * 200] * 300
    file = tmp_path / "sorted.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = Measure(data=(TextSource(str(file)),), num_tokens=1024, sequence_length=64)
    rows = calibration_rows(settings, tiny_tokenizer(), seed=0)
    letters = tiny_tokenizer().decode(rows.input_ids_NS.flatten().tolist())
    assert 0.2 < letters.count("a") / (letters.count("a") + letters.count("b")) < 0.8
    for given in (str(file), texts):
        assert torch.equal(_rows(given, tiny_tokenizer(), settings, 1024, seed=0).input_ids_NS, rows.input_ids_NS)
