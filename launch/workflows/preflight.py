"""What `shoal run` refuses within seconds instead of after hours.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import GenerationConfig

from shoal.data.sources import load_texts
from shoal.errors import UserError
from shoal.recipe.track import is_gguf

from ..verbs.distill import check_distill
from ..verbs.evaluate import check_eval
from ..verbs.export import check_quantize
from ..verbs.measure_checks import check_measure
from ..verbs.plan_checks import refuse_impossible_plan
from ..verbs.run import Run, check_length

log = logging.getLogger(__name__)


def preflight(run: Run) -> None:
    """Refuse within seconds what a later stage would refuse after hours: layers, data, tasks, training arguments.

    Raises:
        UserError: as the stages do.
    """
    from shoal.eval.evaluate import checked_items
    from shoal.eval.tasks.load import tasks_of

    recipe = run.recipe
    refuse_impossible_plan(run)
    if recipe.export.gguf:
        from shoal.compress.targets.gguf import check_export

        check_export(run.config())
    if recipe.quantize is not None:
        check_quantize(run)
        if recipe.eval.backend == "vllm" and not is_gguf(recipe.quantize.format):
            raise UserError(
                f"eval.backend: vllm does not score copies in {recipe.quantize.format} (quantize.format); use backend: "
                "transformers, or a format of llama.cpp"
            )
    check_measure(run)
    check_distill(run)
    check_eval(run)
    check_length(run, recipe.eval.sequence_length, "eval.sequence_length")
    for source in recipe.eval.perplexity_data:
        load_texts(source, max_characters=1)
    tasks = tasks_of(recipe.eval)
    checked_items(tasks, recipe.eval, config=run.config(), tokenizer=run.tokenizer())
    if recipe.quantize is not None and is_gguf(recipe.quantize.format):
        _refuse_penalties(run, [name for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"])


def _refuse_penalties(run: Run, written: Sequence[str]) -> None:
    """Refuse tasks that write text where llama.cpp is to write it and the model asks for more than its likeliest
    tokens."""
    from shoal.eval.harness.writing import NEUTRAL_SETTINGS

    if not written or not (run.teacher / "generation_config.json").is_file():
        return
    own = GenerationConfig.from_pretrained(run.teacher).to_diff_dict().keys() - NEUTRAL_SETTINGS
    if own:
        raise UserError(
            "quantize.format: copies of this format are scored by llama.cpp, which does not do what "
            f"{run.recipe.model}/generation_config.json asks for ({', '.join(sorted(own))}), and {written[0]} writes "
            "text; quantise to another format, or leave the tasks that write out of eval.tasks"
        )
