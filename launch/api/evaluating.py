"""Scores of a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from transformers import PreTrainedTokenizerBase

from shoal.artifacts.artifact import Artifact, Provenance, Tabular
from shoal.artifacts.evaluation import Scores, TaskScore
from shoal.errors import UserError
from shoal.eval.compare.standings import by_task
from shoal.eval.evaluate import Questions, model_evaluation
from shoal.eval.tasks.names import refuse_unknown, tasks_fingerprint
from shoal.models.in_memory import Model, as_model, identity_of, left_as_it_was, require_tokenizer
from shoal.recipe.evaluate import Eval, Limit
from shoal.recipe.recipe import of_arguments
from shoal.recipe.section import Shapes, shaping
from shoal.stats.paired import holm, paired, require_same_measurement, retention, verdict

from .settings import EvalSettings


def evaluate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: str | Sequence[str] = Eval.tasks,
    *,
    limit: Limit = Eval.limit,
    role: str = "model",
    seed: int = 0,
    **settings: Unpack[EvalSettings],
) -> Scores:
    """Score ``model`` on ``tasks``: each score with its 95 % interval and its items.

    All models and seeds get the same items, the first ones of each task, so scores can be compared item by item. The
    model stays on its device and in its precision. It is not changed.

    Args:
        model: A causal language model, or its name.
        tokenizer: The tokenizer. Default: the one with the model's name.
        tasks: Names of `shoal list tasks`, or of any task of lm-eval.
        limit: Items per task, or `{"default": 200, "gsm8k": 100}`. None = all.
        role: Name of the model in figures. teacher, pruned, control and distilled have their own colours.
        seed: Seed for random choices of lm-eval.
        settings: Other keys of the recipe's section `eval`:
            num_fewshot: examples before each item. Default: each task's own number.
            apply_chat_template: ask through the tokenizer's chat template.
            batch_size: prompts at the same time.
            include_path, data_dir: folder with your own task files; folder of data sets, used instead of the Hub.
            perplexity_tokens: tokens of held-out Python documentation for a perplexity. Default: no perplexity.

    Returns:
        `tasks` has one score per task; `to_pandas()` has one row per task.

    Raises:
        UserError: an unknown task, data that cannot be loaded, or a task that runs code or needs images.

    Example:
        >>> scores = shoal.evaluate(model, tokenizer, ["retrieval_continuation"], limit=10)
        >>> scores.to_pandas()[["task", "score", "ci_low", "ci_high"]]
    """
    given: dict[str, Any] = {"tasks": tasks, "limit": limit, "perplexity_tokens": 0, **settings}
    taken = ("tasks", "limit", *EvalSettings.__annotations__)
    section: Eval = of_arguments("eval", given, taken=taken, source="shoal.evaluate", seed=seed)
    refuse_unknown(section.tasks, section.include_path)
    if not isinstance(role, str) or not role:
        raise UserError(f"shoal.evaluate: role: must be a name (got {role!r})")
    model = as_model(model)  # only now, since a large one takes minutes to load
    seed = int(seed)  # a number of numpy's is no JSON
    inputs = identity_of(model, seed=seed) | {"tasks": tasks_fingerprint(section.tasks, section.include_path)}
    inputs |= shaping(section, Shapes.SCORES, "eval.")
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with left_as_it_was(model):
        scores = model_evaluation(
            role,
            model,
            require_tokenizer(tokenizer, model),
            Questions(section, seed),
            inputs=inputs,
            num_bytes=num_bytes,
        )
    return replace(scores, provenance=replace(scores.provenance, model=inputs["model"]))


@dataclass(frozen=True, repr=False)
class Comparison(Tabular, Artifact):
    """Changes of the scores from one model to others, item by item.
    Example:
        >>> shoal.compare(teacher, pruned).to_pandas()[["task", "change", "ci_low", "ci_high", "verdict"]]
    """

    reference: Scores
    others: tuple[Scores, ...]

    def title(self) -> str:
        """The reference, in one line."""
        return f"change from {self.reference.role}, with 95 % intervals"

    def rows(self) -> list[dict[str, Any]]:
        """One row per model and common task: the change, the verdict, and the share kept of the reference's score above
        chance. `adjusted_p` is Holm-corrected for the number of rows. `verdict` is `better` or `worse` if it is below
        0.05, else `unclear`."""
        pairs = [(other.role, *pair) for other in self.others for pair in shared_tasks(self.reference, other)]
        changes = [paired(before, after) for _, before, after in pairs]
        adjusted = holm([change.p_value for change in changes])
        return [
            {
                "model": role,
                "task": before.task,
                "reference": before.score,
                "score": after.score,
                "change": change.difference,
                "ci_low": change.ci_low,
                "ci_high": change.ci_high,
                "verdict": verdict(change, p_value, higher_is_better=before.higher_is_better),
                "kept": retention(before, after).value,
                "metric": before.metric,
                "adjusted_p": p_value,
                "won": change.won,
                "lost": change.lost,
                "n": change.n,
            }
            for (role, before, after), change, p_value in zip(pairs, changes, adjusted, strict=True)
        ]


def shared_tasks(reference: Scores, other: Scores) -> list[tuple[TaskScore, TaskScore]]:
    """The scores of tasks that both have.

    Raises:
        UserError: there is none.
    """
    first, second = by_task(reference), by_task(other)
    if not (shared := [(first[task], second[task]) for task in first if task in second]):
        raise UserError(
            f"compare: the evaluations have no task in common ({', '.join(first)}; {', '.join(second)}); evaluate "
            "both models on the same tasks"
        )
    return shared


def compare(reference: Scores, *others: Scores) -> Comparison:
    """Compare ``others`` with ``reference`` on each common task: the change with its 95 % interval.

    All models answered the same items, so changes are computed item by item.

    Raises:
        UserError: only one model, no common task, or a task with different settings or items.

    Example:
        >>> shoal.compare(teacher, pruned, distilled)
    """
    for scores in (reference, *others):
        Scores.require(scores, "compare")
    if not others:
        raise UserError("compare: a second evaluation is missing; pass the scores of another model too")
    for other in others:
        for before, after in shared_tasks(reference, other):
            require_same_measurement(before, after)
    inputs = {"reference": reference.provenance.fingerprint, "others": [o.provenance.fingerprint for o in others]}
    return Comparison(Provenance(inputs), reference, others)
