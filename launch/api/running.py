"""A whole recipe, from Python."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from shoal.artifacts.artifact import Tabular
from shoal.artifacts.evaluation import CONTROL, Scores
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import write_json
from shoal.errors import UserError, explained_paths
from shoal.eval.report.card import model_card
from shoal.eval.report.hub import push
from shoal.eval.report.run import read_run
from shoal.models.load import load_model
from shoal.recipe.recipe import parse_recipe, read_settings, settled
from shoal.recipe.remembered import remembering

from ..verbs import run as verbs
from ..verbs.launch import LaunchEnded, launch_distill
from ..verbs.pipeline import run_all


@dataclass(frozen=True, repr=False)
class Run(Tabular):
    """A run directory: what its stages have made, None where one has not run."""

    folder: Path
    """The run directory."""
    importance: Importance | None
    plan: Plan | None
    training: Training | None
    scores: dict[str, Scores]
    """Scores by role: teacher, pruned, distilled, and control where the recipe asks for it."""

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """What is there in the run directory ``path``.

        Raises:
            UserError: no such folder, nothing in it, or results that do not belong together.
        """
        found = read_run(Path(path).expanduser())
        return cls(found.folder, found.importance, found.plan, found.training, found.evaluations)

    def model(self, role: str = "distilled") -> PreTrainedModel:
        """The run's `distilled`, `pruned` or `control` model in eval mode, in the precision of its files.

        Raises:
            UserError: there is none.
        """
        folders = {"pruned": "student", "distilled": "distilled", CONTROL: CONTROL}
        there = {own: self.folder / name for own, name in folders.items() if (self.folder / name).is_dir()}
        if role not in there:
            raise UserError(f"{self.folder}: has no model {role!r}; there is {', '.join(there) or 'none'}")
        return load_model(there[role])

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """The URL of the Hub repository that now holds the distilled model, with its card.

        Raises:
            UserError: nothing to push, or what the Hub refuses.
        """
        return push(self.folder / "distilled", model_card(self.folder), repo_id, private=private)

    def title(self) -> str:
        """Where it is, and what was cut."""
        return f"{self.folder}: {'nothing is cut yet' if self.plan is None else self.plan.in_words()}"

    def rows(self) -> list[dict[str, Any]]:
        """One row per role and task."""
        return [{"role": role, **row} for role, scores in self.scores.items() for row in scores.rows()]


def run(recipe: str | Path | Mapping[str, Any], *overrides: str) -> Run:
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
        >>> run = shoal.run("quickstart.yaml", "run_dir=runs/quickstart")
        >>> run.scores["distilled"]
    """
    with TemporaryDirectory() as temporary, explained_paths():
        config = str(recipe) if isinstance(recipe, str | Path) else str(Path(temporary) / "recipe.yaml")
        if isinstance(recipe, Mapping):
            parse_recipe(dict(recipe))  # whose messages say `recipe`, and not a file that nobody has written
            write_json(Path(config), dict(recipe))  # JSON is YAML
        said, file = read_settings(config, overrides)
        settings = settled(said, file, overrides)
        folder = verbs.Run(settings).dir
        try:
            with remembering(folder, said) as memory:
                run_all(
                    verbs.open_run(settings, memory=memory), partial(launch_distill, config=config, overrides=overrides)
                )
        except LaunchEnded as ended:
            if ended.code == 128 + signal.SIGINT:
                raise KeyboardInterrupt(ended.text) from ended
            reason = ended.text or "its message is on stderr, above"
            raise RuntimeError(f"distill: ended with exit code {ended.code}; {reason}") from ended
        return Run.load(folder)
