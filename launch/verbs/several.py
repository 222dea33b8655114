"""Several runs: `shoal compare RUN_DIR RUN_OR_MODEL ...`, and `shoal run RECIPE --each KEY=A,B [--each seed=0,1]`, a
run of every combination, in RUN_DIR/KEY=VALUE."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from shoal.artifacts.importance import Importance
from shoal.errors import UserError
from shoal.eval.compare.comparable import find_common, read_contenders, read_scored
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.page import as_data, comparison_text, write_comparison
from shoal.formatting import listed
from shoal.model_names import names_model
from shoal.progress import loading
from shoal.recipe.recipe import load_recipe
from shoal.redaction import redacted_arguments
from shoal.yaml_text import read_yaml

from ..early import refuse_early
from ..early.asked import out_path
from ..early.model_files import refuse_model
from ..early.run_directory import require_folder

log = logging.getLogger(__name__)

OF_THE_TEACHER = (Importance.FILE, "eval/teacher.items.jsonl", "eval/teacher.json")
"""Results that runs of one model may share; a run of other settings finds them out of date and makes its own."""


def compare(asked: argparse.Namespace) -> Any:
    """The table of runs and models, which is written with its pages and figure too."""
    out, folders = out_path(asked.out), [Path(run) for run in asked.words]
    runs = [Path(name) for name in asked.words if not names_model(name)]
    if not runs:
        raise UserError(
            f"compare: {listed(asked.words)}: pass at least one run directory; its evaluation settings are used "
            "for the checkpoints. To get one, run `shoal eval` with a recipe"
        )
    models = [Path(name).expanduser().resolve() for name in asked.words if names_model(name)]
    if twice := next((model for model in models if models.count(model) > 1), None):
        raise UserError(f"compare: {twice.name} is given twice; give every model once")
    if len(runs) < len(folders):
        read_scored(runs[0])
        if len(runs) > 1:
            find_common(read_contenders(runs), across_teachers=asked.across_teachers)
        for name in filter(names_model, asked.words):
            refuse_model("eval", load_recipe(str(runs[0])), name)
        require_folder(out, setting="--out")
        with loading():
            from .evaluate import scored_beside_runs
        folders = scored_beside_runs(asked.words, out)
    comparison = compare_runs(folders, across_teachers=asked.across_teachers)
    write_comparison(comparison, out)
    return as_data(comparison) if asked.as_json else comparison_text(comparison)


def each(asked: argparse.Namespace, run_one: Callable[[Sequence[str]], int]) -> Any:
    """The table of a run for every combination of the values of --each; ``run_one`` runs the recipe with overrides and
    returns the exit code, with which the process ends where a run fails."""
    for word, axis in itertools.product(asked.words, asked.each):
        key, each_key = word.partition("=")[0], axis.partition("=")[0]
        if f"{key}.".startswith(f"{each_key}."):
            raise UserError(f"--each {each_key}: would replace {redacted_arguments([word])[0]}; give only one of them")
    run_dir = Path(load_recipe(asked.config, asked.words).run_dir).expanduser()
    runs = combinations(run_dir, asked.each)
    for more in runs.values():  # the last of them is refused before the first one has taken hours
        refuse_early("run", load_recipe(asked.config, [*asked.words, *more]), writes=not asked.dry_run)
    if code := run_each(runs, lambda more: run_one([*asked.words, *more])):
        sys.exit(code)
    if asked.dry_run:
        return ""
    comparison = compare_runs(list(runs))
    write_comparison(comparison, run_dir / "compare")
    return as_data(comparison) if asked.as_json else comparison_text(comparison)


def combinations(run_dir: Path, axes: Sequence[str]) -> dict[Path, list[str]]:
    """The overrides of a run for every choice of one value from each of ``axes`` (`key=a,b`), by its folder; the last
    axis changes first.

    Raises:
        UserError: an axis that is not of that form, the run directory, or two runs of one name.
    """
    keys = [axis.partition("=")[0] for axis in axes]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"--each {twice}: is given twice; give all its values at once: {twice}=a,b")
    if "run_dir" in keys:
        raise UserError("--each run_dir: every run has a folder of its own in run_dir; remove it")
    runs: dict[Path, list[str]] = {}
    for chosen in itertools.product(*map(_values, axes)):
        told = [(key.rpartition(".")[2], re.sub(r"[^\w.+-]+", "-", _text(value)).strip("-")) for key, value in chosen]
        folder = run_dir / ",".join(map("=".join, told))
        if folder in runs:
            raise UserError(f"--each {' --each '.join(axes)}: two of these runs have one name; name every value once")
        runs[folder] = [*(f"{key}={_text(value)}" for key, value in chosen), f"run_dir={folder}"]
    return runs


def run_each(runs: Mapping[Path, Sequence[str]], run_one: Callable[[Sequence[str]], int]) -> int:
    """Exit code of the first run that fails, 0 if none does; ``run_one`` runs the recipe with more overrides."""
    first = next(iter(runs))
    for number, (folder, overrides) in enumerate(runs.items(), 1):
        log.info("run %d of %d: %s", number, len(runs), folder)
        for name in OF_THE_TEACHER:
            if (first / name).is_file() and not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(first / name, folder / name)
        if code := run_one(overrides):
            return code
    return 0


def _values(axis: str) -> list[tuple[str, Any]]:
    key, equals, text = axis.partition("=")
    try:
        values = read_yaml(f"[{text}]")
    except YAMLError as error:
        raise UserError(f"--each {axis}: the values are not valid YAML: {error}") from error
    if not (key and equals and values):
        raise UserError(f"--each {axis}: must have the form section.key=value,value")
    return [(key, value) for value in values]


def _text(value: Any) -> str:
    """A value as an override takes it: what is JSON is YAML."""
    return json.dumps(value, ensure_ascii=False, default=str)
