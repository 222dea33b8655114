"""Tasks that models are scored on: the recipe's section `eval`.

A suite is tasks, limits and a stated cost under one name, so that runs of different people ask the same.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_before_validator_function

from shoal.recipe.section import Data, Place, Positive, Section, Shapes, Text, TextSource, adapter
from shoal.yaml_text import own_yaml

log = logging.getLogger(__name__)
SUITES = ("quick", "transfer", "standard", "full")
NO_TEMPLATE = (
    "eval.apply_chat_template: the tokenizer has no chat template; remove it, or name an instruction-tuned model"
)
CONFIGS_DIR = Path(__file__).parents[1] / "configs"
if not CONFIGS_DIR.exists():  # editable install through a tree without symlinks
    CONFIGS_DIR = Path(__file__).parents[3] / "configs"
SUITES_DIR = CONFIGS_DIR / "suites"
OLD_NAME = re.compile(r"^(shoal|retrieval|knowledge|reasoning|reasoning_1step|json|rules|refusal_\w+?)_twins?(?=_|$)")
DEFAULT = "default"
"""What stands in a limit for all tasks that it does not name."""
Names = Annotated[tuple[Text, ...], BeforeValidator(lambda names: in_suites(names))]
"""One name of a task, group or suite, or a list of them."""
Limit = Positive | dict[str, Positive | None] | None
"""Items per task: the same for all, {default: 200, gsm8k: 100}, or all there are (None)."""


def renamed(task: str) -> str:
    """A task's name of today."""
    return OLD_NAME.sub(r"\1_reworded", task)


def limit_of(limit: Limit, task: str) -> int | None:
    """Items of ``task`` under ``limit``; None = all."""
    return limit.get(task, limit.get(DEFAULT)) if isinstance(limit, dict) else limit


@dataclass(frozen=True)
class Limited(Section):
    """A section whose limit names tasks, or whose tasks may name suites."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        strict = super().__get_pydantic_core_schema__(source, handler)
        return no_info_before_validator_function(partial(spelled_out, cls), strict)


@dataclass(frozen=True)
class Eval(Limited):
    """Evaluation of the models."""

    tasks: Annotated[Annotated[Names, Field(min_length=1)], Shapes.SCORES] = (
        *("retrieval_continuation", "knowledge_continuation", "reasoning_continuation"),
        *("retrieval_reworded_continuation", "knowledge_reworded_continuation", "reasoning_reworded_continuation"),
    )
    """Tasks, groups and suites by name, of shoal and of lm-eval. Suites: quick (minutes, bundled data), transfer
    (minutes, judges a distilled model), standard, full; the first suite sets limit and perplexity_tokens. Default:
    every ability in the trained wording and reworded, to separate learnt wording from recovered ability; for a model
    that trains on public text by default, public benchmarks."""
    limit: Annotated[Limit, Shapes.SCORES] = 200
    """Items per task, or per named task: {default: 200, gsm8k: 100}. `None`: all items. Also the maximum for tasks with
    a limit from a suite."""
    batch_size: Annotated[Positive | Literal["auto"], Shapes.SCORES] = "auto"
    """Prompts per rank at the same time. `auto`: 16, or 8 in the ablation, where each prompt runs under all
    variants."""
    num_fewshot: Annotated[Annotated[int, Field(ge=0)] | None, Shapes.SCORES | Shapes.IMPORTANCE] = None
    """Examples before each item, also in measure.sweep. Default: each task's own number."""
    apply_chat_template: Annotated[bool, Shapes.SCORES | Shapes.IMPORTANCE] = False
    """Ask through the tokenizer's chat template, like lm-eval, also in measure.sweep. Examples become turns. For
    instruction-tuned models."""
    include_path: Annotated[Place | None, Shapes.SCORES | Shapes.IMPORTANCE] = None
    """Folder with your own task YAML files."""
    data_dir: Annotated[Place | None, Shapes.BY_CONTENT] = None
    """Folder with one folder per data set, used instead of the Hub."""
    perplexity_data: Annotated[Data, Shapes.PERPLEXITY | Shapes.SCORES] = (TextSource("python_docs_heldout"),)
    """Running text for perplexity. Windows have 512 tokens, or the model's positions if fewer."""
    perplexity_tokens: Annotated[int, Field(ge=0), Shapes.PERPLEXITY | Shapes.SCORES] = 10_000
    """Tokens of running text. `0`: no perplexity."""
    backend: Annotated[
        Literal["transformers", "vllm"], Shapes.SCORES, Field(exclude_if=lambda backend: backend == "transformers")
    ] = "transformers"
    """Library that runs the models. `vllm`: must be installed, needs a GPU and one rank, and its scores are only
    comparable with scores of vllm. Speed is always measured with transformers."""
    control: Annotated[bool | None, Shapes.NOTHING] = None
    """Also train the teacher on the same rows and score it as `control`. It shows how this text changes an unpruned
    model. Takes longer than training the student. Default: only for a model that trains on public text by default."""
    speed: Annotated[bool | Annotated[tuple[Positive, ...], Field(min_length=1)], Shapes.SPEED] = True
    """Measure speed and memory of teacher, pruned and distilled. A list names the numbers of sequences at the same
    time. `true`: 1 and 4 on a CPU; 1, 8 and 32 on a GPU."""

    def at_once(self, auto: int = 16) -> int:
        """Prompts or questions per rank at one time."""
        return auto if self.batch_size == "auto" else self.batch_size


@dataclass(frozen=True)
class Cost(Section):
    """What one model has to do."""

    items: Positive
    requests: Positive
    """Prompts to write after and options to score."""
    tokens: Positive
    """Tokens read and written, three characters each; what items of a question or task have in common counts once."""


@dataclass(frozen=True)
class Suite(Section):
    """One file of configs/suites."""

    about: Text
    needs: Text
    """Data that its tasks read, and where they come from."""
    cost: Cost
    tasks: Annotated[tuple[Text, ...], Field(min_length=1)]
    limit: Limit
    perplexity_tokens: Positive


def read_suite(name: str) -> Suite:
    """The suite of this name."""
    return adapter(Suite).validate_python(own_yaml(SUITES_DIR / name))


def in_suites(names: Any) -> Any:
    """One name or a list of them, with a suite's tasks in place of its name; what is none is left to be refused."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return names
    if old := next(filter(OLD_NAME.search, names), None):
        log.warning("tasks: %s is called %s now; rename it, and others like it", old, renamed(old))
    parts = (read_suite(name).tasks if name in SUITES else (renamed(name),) for name in names)
    return list(dict.fromkeys(itertools.chain.from_iterable(parts)))


def spelled_out(section: Any, said: Any) -> Any:
    """What is said of a section, with the numbers of suites among its ``tasks`` and the default of a limit by tasks.

    What is said wins over a suite, and its limit caps the suite's limits of single tasks. What is wrong in some other
    way is left to be refused.
    """
    if not isinstance(said, Mapping):
        return said
    names, limit = said.get("tasks", ()), said.get("limit", {})
    names = [names] if isinstance(names, str) else names
    is_eval = section is Eval and isinstance(names, list | tuple)
    suites = [read_suite(name) for name in names if name in SUITES] if is_eval else []
    asked = limit if isinstance(limit, Mapping) else {DEFAULT: limit}
    if not suites and asked is not said.get("limit"):
        return said
    given: dict[str, Any] = {DEFAULT: limit_of(suites[0].limit, DEFAULT) if suites else section.limit}
    for suite in suites:
        given = {**(suite.limit if isinstance(suite.limit, dict) else {}), **given}
    if isinstance(cap := asked.get(DEFAULT), int):
        given = {task: min(number, cap) if number else number for task, number in given.items()}
    limits = {renamed(str(task)): number for task, number in {**given, **asked}.items()}
    numbers = {"perplexity_tokens": suites[0].perplexity_tokens} if suites else {}
    return {**numbers, **said, "limit": limits if len(limits) > 1 else limits[DEFAULT]}
