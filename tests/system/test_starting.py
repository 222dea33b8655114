"""What a command loads before it can say no, and what it may pick up from the folder that it is started in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from compared_runs import write_run

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "lm_eval", "numpy", "huggingface_hub")
"""Each takes longer to import than a recipe takes to be read."""
SHIPPED_RECIPES = "for file in sorted(CONFIGS_DIR.glob('*.yaml')): load_recipe(file)"
MISSPELT_KEY = "assert run_verb('prune', 'quickstart.yaml', ['prune.dorp=1']) == 2"
MISSPELT_TASK = "assert run_verb('eval', 'quickstart.yaml', ['eval.tasks=[retreival_generation]']) == 2"

EXPLAINED = (
    "assert _main(['explain', 'distill.losses']) == 0 == _main(['explain']); assert _main(['explain', 'x']) == 2"
)
OPTIONS = (
    "import contextlib; from shoal.launch.arguments import parse; parse(['eval', 'm/x', '--tasks', 'a,b'])\n"
    "with contextlib.suppress(SystemExit): parse(['distill', '--help'])"
)
LISTED = "assert not any(_main(['list', what]) for what in ('recipes', 'tasks', 'losses', 'data', 'suites'))"


@pytest.mark.parametrize("work", [SHIPPED_RECIPES, MISSPELT_KEY, MISSPELT_TASK, EXPLAINED, LISTED, OPTIONS])
def test_a_recipe_is_read_and_refused_before_anything_heavy_is_loaded(work: str) -> None:
    script = f"""
import sys
from shoal.launch.cli import _main, run_verb
from shoal.recipe.recipe import load_recipe
from shoal.recipe.evaluate import CONFIGS_DIR
{work}
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("there", "unloaded"), [(True, ()), (False, ("scipy", "matplotlib"))])
def test_runs_are_compared_without_torch_and_refused_before_anything_is_drawn(
    tmp_path: Path, there: bool, unloaded: tuple[str, ...]
) -> None:
    heavy = {*HEAVY, "scipy.stats", "scipy.optimize", "tqdm", *unloaded} - {"numpy"}
    for name in ("a", "b") if there else "a":
        write_run(tmp_path / name)
    script = f"""
import sys
from shoal.launch.cli import _main
code = _main(["compare", "a", "b", "--out", "out"])
loaded = [name for name in {sorted(heavy)!r} if name in sys.modules]
assert (code, loaded) == ({0 if there else 2}, []), (code, loaded)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_of_the_whole_loads_no_recipe() -> None:
    script = (
        "import sys; sys.modules.update(pydantic=None, tqdm=None); from shoal.launch import cli; cli.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout


@pytest.mark.slow
def test_what_a_training_is_and_takes_loads_no_trainer() -> None:
    """A report and `init` ask for it, and the Trainer loads datasets and pandas."""
    heavy = {"transformers.trainer", "datasets", "pandas", "deepspeed"}
    modules = "shoal.train.identity, shoal.train.preflight.throughput"
    script = f"import sys, {modules}; loaded = {heavy!r} & {{*sys.modules}}; assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
