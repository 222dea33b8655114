"""Scores of a model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifacts.artifact import Evaluation
from shoal.eval.evaluate import model_evaluation
from shoal.eval.tasks.names import refuse_unknown, tasks_fingerprint
from shoal.models.in_memory import left_as_it_was, name_of, require_tokenizer, require_usable
from shoal.recipe.evaluate import Eval, Tasks
from shoal.recipe.messages import checked
from shoal.recipe.section import Shapes, shaping


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] = Eval.tasks,
    *,
    limit: int | None = Eval.limit,
    limits: Mapping[str, int] | None = None,
    num_fewshot: int | None = None,
    batch_size: int = Tasks.batch_size,
    include_path: str | None = None,
    data_dir: str | None = None,
    perplexity_tokens: int = 0,
    seed: int = 0,
) -> Evaluation:
    """The scores of ``model`` on ``tasks``, each with its 95 % interval and its items.

    The items are the first ones of every task, the same for every model and seed, so that two evaluations can be
    compared item by item. The model computes where it is, in its own precision, and is left as it was.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of docs/evaluating.md, or of any task of lm-eval.
        limit: Items per task; None = all.
        limits: Items of single tasks that get another number.
        num_fewshot: Examples before each item; None = each task's own number.
        batch_size: Prompts at one time.
        include_path: A further folder of task YAMLs.
        data_dir: A folder of data sets in place of the Hub.
        perplexity_tokens: Tokens of held-out Python documentation whose nats per token are scored too; 0 = none.
        seed: Seed of what lm-eval draws at random.

    Returns:
        `tasks`, a score each; `to_pandas()` has a row per task.

    Raises:
        UserError: an unknown task, data that cannot be had, or a task that runs code or needs images.

    Example:
        >>> evaluation = shoal.evaluate(model, tokenizer, ["retrieval_continuation"], limit=100)
        >>> evaluation.to_pandas()[["task", "score", "ci_low", "ci_high"]]
    """
    require_usable(model)
    settings = checked(
        Tasks,
        {
            "tasks": [tasks] if isinstance(tasks, str) else tasks,
            "limit": limit,
            "limits": dict(limits or {}),
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "include_path": include_path,
            "data_dir": data_dir,
            "perplexity_tokens": perplexity_tokens,
        },
        source="shoal.evaluate",
    )
    refuse_unknown(settings.tasks, settings.include_path)
    inputs = {
        "model": name_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "tasks": tasks_fingerprint(settings.tasks, settings.include_path),
        **shaping(settings, Shapes.SCORES, "eval."),
    }
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with left_as_it_was(model):
        return model_evaluation(
            "model", model, require_tokenizer(tokenizer), settings, inputs=inputs, seed=seed, num_bytes=num_bytes
        )
