"""What the MMLU task files in this folder refer to."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from shoal.errors import UserError


def over_all_subjects(questions: Dataset) -> Dataset:
    """The questions in one seeded random order: as they come, the first thousand would be of a few subjects only."""
    return questions.shuffle(seed=0)


class ExamplesOfTheSubject(ConfigurableTask):
    """A task whose examples are of the question's own subject, as lm-eval's task of each subject shows them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *how: Any, **named: Any) -> str | list[str]:
        """The examples and the question, as lm-eval writes them.

        Raises:
            UserError: the subject has fewer examples.
        """
        if num_fewshot:
            own = self._examples[doc["subject"]]
            if len(own) < num_fewshot:
                raise UserError(
                    f"eval.num_fewshot: {self.config.task} has {len(own)} examples of {doc['subject']}, and "
                    f"{num_fewshot} are asked for; lower it"
                )
            self.sampler.replace_df(own)
        return super().fewshot_context(doc, num_fewshot, *how, **named)

    @cached_property
    def _examples(self) -> dict[str, list[dict[str, Any]]]:
        """The examples by their subject."""
        by_subject = defaultdict[str, list[dict[str, Any]]](list)
        for example in self.fewshot_docs():
            by_subject[example["subject"]].append(example)
        return by_subject
