"""A whole recipe, from Python."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifacts.artifact import Tabular, given_path
from shoal.artifacts.evaluation import CONTROL, Scores
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import make_folder, write_json, write_text
from shoal.errors import UserError, explained_paths
from shoal.eval.report.card import model_card
from shoal.eval.report.hub import push
from shoal.eval.report.run import read_run
from shoal.models.anatomy import decoder_layers
from shoal.models.in_memory import require_tokenizer, require_usable
from shoal.models.load import load_model
from shoal.recipe.recipe import of_arguments, parse_recipe, read_settings, settled
from shoal.recipe.remembered import remembering
from shoal.recipe.section import plain_value

from ..early import refuse_early
from ..verbs import run as verbs
from ..verbs.launch import LaunchEnded, launch_ranks, seeing
from ..verbs.pipeline import run_all


@dataclass(frozen=True, repr=False)
class Run(Tabular):
    """The results in a run directory. The result of a stage that did not run is None.
    Example:
        >>> shoal.Run.load("runs/mine").plan
    """

    folder: Path
    """The run directory."""
    importance: Importance | None
    plan: Plan | None
    training: Training | None
    scores: dict[str, Scores]
    """Scores by role: teacher, pruned, distilled, and control if the recipe sets eval.control."""

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read the results in the run directory ``path``.

        Raises:
            UserError: the folder does not exist, has no results, or its results do not belong together.
        """
        found = read_run(given_path(path, "shoal.Run.load"))
        return cls(found.folder, found.importance, found.plan, found.training, found.evaluations)

    def model(self, role: str = "distilled") -> PreTrainedModel:
        """Load the run's `distilled`, `pruned` or `control` model in eval mode, in the precision of its files.

        Raises:
            UserError: the run does not have this model yet.
        """
        folders = {"pruned": "student", "distilled": "distilled", CONTROL: CONTROL}
        there = {own: self.folder / name for own, name in folders.items() if (self.folder / name).is_dir()}
        if role not in there:
            raise UserError(f"{self.folder}: has no model {role!r}; existing are {', '.join(there) or 'none'}")
        return load_model(there[role])

    def save(self, path: str | Path) -> None:
        """Write all results, without models, to the folder ``path``. Run.load reads them.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = Path(path).expanduser()
        make_folder(folder / "eval", setting="path")
        for part in filter(None, (self.importance, self.plan, self.training)):
            part.save(folder / part.FILE)
        for role, own in self.scores.items():
            own.save(folder / "eval" / f"{role}.json")
        if (told := self.folder / "run.json").is_file():
            write_text(folder / told.name, told.read_text(encoding="utf-8"))

    def push_to_hub(self, repo_id: str, *, private: bool = True, **hub: Any) -> str:
        """Push the distilled model and its card to the Hub, and return the URL.

        ``hub``: as in shoal.push_to_hub.

        Raises:
            UserError: no distilled model, or an error of the Hub.
        """
        repo_id, private = _repository(repo_id, private=private)
        return push(self.folder / "distilled", model_card(self.folder), repo_id, private=private, **hub)

    def title(self) -> str:
        """The folder and the plan, in one line."""
        return f"{self.folder}: {('nothing is pruned yet' if self.plan is None else self.plan.in_words())}"

    def rows(self) -> list[dict[str, Any]]:
        """One row per role and task."""
        return [{"role": role, **row} for role, scores in self.scores.items() for row in scores.rows()]


def run(recipe: str | Path | Mapping[str, Any], *overrides: str) -> Run:
    """Run all stages, like `shoal run`: measure, prune, distill, evaluate, report. Skip stages that are up to date.

    Training runs in processes of the DeepSpeed launcher, one per GPU. With GPUs, all other stages do so too.

    Args:
        recipe: A recipe file, the name of a shipped recipe, a run directory, or a mapping.
        overrides: `section.key=value`, as on the command line; `allow=send,write,code` is the option --allow.

    Raises:
        UserError: wrong settings, models or data.
        KeyboardInterrupt: training was stopped and saved its state; the same call resumes it.
        RuntimeError: a launched process failed; stderr has its message.

    Example:
        >>> shoal.run("mine.yaml", "run_dir=runs/new").scores["distilled"]
    """
    if not isinstance(recipe, str | Path | Mapping):
        raise UserError(f"shoal.run: recipe: is {type(recipe).__name__}; pass a file, a folder, a name or a mapping")
    if wrong := next((override for override in overrides if not isinstance(override, str)), None):
        raise UserError(f"shoal.run: override {wrong!r}: is {type(wrong).__name__}; pass section.key=value as text")
    with TemporaryDirectory() as temporary, explained_paths():
        config = str(recipe) if isinstance(recipe, str | Path) else str(Path(temporary) / "recipe.yaml")
        if isinstance(recipe, Mapping):
            overrides = (*overrides, "allow=send,write,code")  # Python is the user's own word
            said: dict[str, Any] = plain_value(recipe)
            parse_recipe(said)  # whose messages say `recipe`, and not a file that nobody has written
            try:
                write_json(Path(config), said)  # JSON is YAML
            except TypeError as error:
                raise UserError(f"shoal.run: recipe: holds a value that a YAML file cannot hold ({error})") from error
        said, file = read_settings(config, overrides)
        settings = settled(said, file, overrides)
        refuse_early("run", settings)
        folder = verbs.Run(settings).dir
        try:
            with seeing(settings.device), remembering(folder, said) as memory:
                run_all(
                    verbs.open_run(settings, memory=memory), partial(launch_ranks, config=config, overrides=overrides)
                )
        except LaunchEnded as ended:
            if ended.code == 128 + signal.SIGINT:
                raise KeyboardInterrupt(ended.text) from ended
            reason = ended.text or "its message is on stderr, above"
            raise RuntimeError(f"shoal.run: ended with exit code {ended.code}; {reason}") from ended
        return Run.load(folder)


def _plan_of_all(
    plan: Plan | None, model: PreTrainedModel, training: Training | None, scores: Sequence[Scores]
) -> Plan:
    """``plan``, which the others belong to as far as they tell."""
    if plan is None:
        raise UserError(
            "shoal.push_to_hub: plan: is missing, and the card needs it; pass it, or call model.push_to_hub, which "
            "writes no card"
        )
    Plan.require(plan, "plan")
    require_usable(model)
    if (kept := len(decoder_layers(model))) != len(plan.keep):
        raise UserError(
            f"shoal.push_to_hub: plan: keeps {len(plan.keep)} layers, and the model has {kept}; pass its own"
        )
    if training is not None:
        Training.require(training, "training")
    for one in scores:
        Scores.require(one, "scores")
    if len({one.role for one in scores}) < len(scores):
        raise UserError("shoal.push_to_hub: scores: two have the same role; set one in evaluate, such as role='pruned'")
    return plan


def _repository(repo_id: str, *, private: bool) -> tuple[str, bool]:
    """Both, which are such as section `export` takes."""
    if repo_id is None:
        raise UserError("shoal.push_to_hub: repo_id: is missing; give owner/name")
    export = of_arguments("export", {"hub_repo": repo_id, "private": private}, source="shoal.push_to_hub")
    return export.hub_repo, export.private


def push_to_hub(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    *,
    plan: Plan | None = None,
    training: Training | None = None,
    scores: Scores | Sequence[Scores] = (),
    private: bool = True,
    **hub: Any,
) -> str:
    """Push ``model``, its tokenizer and a model card to the Hub, and return the URL.

    The card lists the dropped layers, the training and the ``scores``, also as `model-index`.

    Args:
        model: The pruned or distilled model.
        tokenizer: The tokenizer.
        repo_id: `owner/name`. If the repository does not exist, it is created.
        plan: The plan of choose_layers, or `Plan.load(...)`; required.
        training: The result of distill.
        scores: Results of evaluate, each with its role: teacher, pruned, distilled, control.
        private: Create the repository as private.
        hub: Arguments of huggingface_hub's create_repo and upload_folder, such as commit_message.

    Raises:
        UserError: no plan, a plan or scores of another model, or an error of the Hub.

    Example:
        >>> shoal.push_to_hub(student, tokenizer, "me/shallow", plan=plan, training=training, scores=[teacher, pruned])
    """
    every: list[Any] = [*scores] if isinstance(scores, list | tuple) else [scores]
    plan = _plan_of_all(plan, model, training, every)
    known = require_tokenizer(tokenizer, model)
    tokenizer = known if tokenizer is None else tokenizer  # as it is, without a pad token that it lacks
    repo_id, private = _repository(repo_id, private=private)
    healing = {} if training is None else {"losses": training.provenance.inputs["distill.losses"]}
    sources = [] if training is None else [{"path": name} for name in training.data["sources"]]
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder / "distilled")
        tokenizer.save_pretrained(folder / "distilled")
        model.config.save_pretrained(folder / "student")
        Run(folder, None, plan, training, {one.role: one for one in every}).save(folder)
        name = plan.provenance.model  # of a model made in memory its family
        told = {"model": name if "/" in name else None, "export": {"hub_repo": repo_id}}
        told["distill"] = {**healing, "data": sources}
        write_json(folder / "run.json", {"recipe": told})
        card = model_card(folder)
        return push(folder / "distilled", card, repo_id, private=private, retry="Call it again", **hub)
