"""Scores of a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifacts.artifact import Evaluation
from shoal.eval.evaluate import model_evaluation
from shoal.eval.tasks.names import refuse_unknown, tasks_fingerprint
from shoal.models.in_memory import left_as_it_was, measured_with, require_positions, require_tokenizer, require_usable
from shoal.recipe.evaluate import Eval, Tasks
from shoal.recipe.messages import of_arguments
from shoal.recipe.section import Shapes

TAKEN = ("limits", "num_fewshot", "batch_size", "include_path", "data_dir", "perplexity_tokens", "sequence_length")
"""Keys of the recipe's section `eval` that mean the same here, besides those that are named."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] = Eval.tasks,
    *,
    limit: int | None = Eval.limit,
    seed: int = 0,
    **settings: Any,
) -> Evaluation:
    """The scores of ``model`` on ``tasks``, each with its 95 % interval and its items.

    The items are the first ones of every task, the same for every model and seed, so that two evaluations can be
    compared item by item. The model computes where it is, in its own precision, and is left as it was.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of docs/evaluating.md, or of any task of lm-eval.
        limit: Items per task; None = all.
        seed: Seed of what lm-eval draws at random.
        settings: Keys of the recipe's section `eval`: limits (items of single tasks), num_fewshot (examples before each
            item; each task's own number if not given), batch_size (prompts at one time, 16), include_path (a further
            folder of task YAMLs), data_dir (a folder of data sets in place of the Hub), perplexity_tokens (tokens of
            held-out Python documentation whose nats per token are scored too; none if not given) and sequence_length
            (their window, 512).

    Returns:
        `tasks`, a score each; `to_pandas()` has a row per task.

    Raises:
        UserError: an unknown task, data that cannot be had, or a task that runs code or needs images.

    Example:
        >>> evaluation = shoal.evaluate(model, tokenizer, ["retrieval_continuation"], limit=100)
        >>> evaluation.to_pandas()[["task", "score", "ci_low", "ci_high"]]
    """
    require_usable(model)
    named = {"tasks": [tasks] if isinstance(tasks, str) else tasks, "limit": limit}
    section = of_arguments(Tasks, named | settings, taken=(*named, *TAKEN), source="shoal.evaluate")
    refuse_unknown(section.tasks, section.include_path)
    if section.perplexity_tokens:
        require_positions(model, section.sequence_length)
    asked = tasks_fingerprint(section.tasks, section.include_path)
    inputs = measured_with(model, section, Shapes.SCORES, "eval.", seed=seed, tasks=asked)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with left_as_it_was(model):
        return model_evaluation(
            "model", model, require_tokenizer(tokenizer), section, inputs=inputs, seed=seed, num_bytes=num_bytes
        )
