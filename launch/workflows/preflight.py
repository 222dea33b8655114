"""What `shoal run` refuses within seconds instead of after hours.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging

from shoal.data.sources import load_texts

from ..verbs.distill import check_distill
from ..verbs.evaluate import check_eval
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
        from shoal.compress.gguf.export import check_export

        check_export(run.config())
    check_measure(run)
    check_distill(run)
    check_eval(run)
    check_length(run, recipe.eval.sequence_length, "eval.sequence_length")
    for source in recipe.eval.perplexity_data:
        load_texts(source, max_characters=1)
    checked_items(tasks_of(recipe.eval), recipe.eval, config=run.config(), tokenizer=run.tokenizer())
