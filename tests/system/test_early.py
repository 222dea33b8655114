"""What needs no model is refused before the libraries that take seconds to load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import cases

HEAVY = ("torch", "transformers", "datasets", "deepspeed", "lm_eval", "numpy")
REFUSED = cases(__file__)
PROGRAM = """
import sys
from shoal.launch.cli import run_verb
from importlib import util

find_spec = util.find_spec
util.find_spec = lambda name, *more: None if name == "vllm" else find_spec(name, *more)
for words in {refused!r}:
    verb, *overrides = words.split()
    print(words, run_verb(verb, {recipe!r}, overrides), [name for name in {heavy!r} if name in sys.modules], sep="|")
"""


@pytest.mark.slow
def test_what_needs_no_model_is_refused_before_libraries_are_loaded(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    model = tmp_path / "model"
    model.mkdir()
    recipe.write_text(json.dumps({"model": str(model), "run_dir": str(tmp_path / "run")}))
    words = [words for words, _ in REFUSED]
    program = PROGRAM.format(refused=words, recipe=str(recipe), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{own}|2|[]" for own in words]
    told = [line for line in done.stderr.splitlines() if line.startswith("shoal: error: ")]
    assert len(told) == len(REFUSED)
    for (own, message), line in zip(REFUSED, told, strict=True):
        assert message in line, own
    assert not (tmp_path / "run").exists()
