"""A whole recipe, from Python."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shoal.artifacts.artifact import Tabular
from shoal.artifacts.evaluation import Scores
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import write_json
from shoal.errors import explained_paths
from shoal.recipe.recipe import parse_recipe, read_settings, settled
from shoal.recipe.remembered import remembering

from ..verbs.evaluate import roles
from ..verbs.launch import LaunchEnded, launch_distill
from ..verbs.pipeline import run_all
from ..verbs.run import Run, open_run


@dataclass(frozen=True)
class RunResults(Tabular):
    """What a run directory holds when all is done."""

    folder: Path
    """The run directory."""
    importance: Importance
    plan: Plan
    training: Training
    evaluations: dict[str, Scores]
    """Evaluations by role: teacher, pruned, distilled, and control where the recipe asks for it."""

    @property
    def distilled(self) -> Path:
        """Folder of the healed model, a plain checkpoint."""
        return self.folder / "distilled"

    def rows(self) -> list[dict[str, Any]]:
        """One row per role and task."""
        return [{"role": role, **row} for role, evaluation in self.evaluations.items() for row in evaluation.rows()]


def run(recipe: str | Path | Mapping[str, Any], *overrides: str) -> RunResults:
    """Everything that `shoal run` does: measure, prune, distill, evaluate, report, skipping what is done and unchanged.

    Training runs in processes of its own under the DeepSpeed launcher, one per GPU.

    Args:
        recipe: A recipe file, the name of a shipped one, a run directory, or a recipe as a mapping.
        overrides: `section.key=value`, as on the command line.

    Raises:
        UserError: wrong settings, models or data; what launched processes refuse they have said on stderr.
        KeyboardInterrupt: training was stopped and has saved; the same call goes on.
        RuntimeError: launched processes have failed, and said why on stderr.

    Example:
        >>> results = shoal.run("quickstart.yaml", "run_dir=runs/quickstart")
        >>> results.to_pandas()
    """
    with TemporaryDirectory() as temporary, explained_paths():
        config = str(recipe) if isinstance(recipe, str | Path) else str(Path(temporary) / "recipe.yaml")
        if isinstance(recipe, Mapping):
            parse_recipe(dict(recipe))  # whose messages say `recipe`, and not a file that nobody has written
            write_json(Path(config), dict(recipe))  # JSON is YAML
        said, file = read_settings(config, overrides)
        settings = settled(said, file, overrides)
        folder = Run(settings).dir
        try:
            with remembering(folder, said) as memory:
                opened = open_run(settings, memory=memory)
                run_all(opened, partial(launch_distill, config=config, overrides=overrides))
        except LaunchEnded as ended:
            if ended.code == 128 + signal.SIGINT:
                raise KeyboardInterrupt(ended.text) from ended
            reason = ended.text or "its message is on stderr, above"
            raise RuntimeError(f"distill: ended with exit code {ended.code}; {reason}") from ended
        return RunResults(
            folder,
            Importance.read(folder / Importance.FILE),
            Plan.read(folder / Plan.FILE),
            Training.read(folder / Training.FILE),
            {role: Scores.read(folder / "eval" / f"{role}.json") for role in roles(opened)},
        )
