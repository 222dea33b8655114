"""Tasks that models are scored on: the recipe's section `eval`, and what `measure.sweep` shares with it.

A suite is tasks, limits and a stated cost under one name, so that runs of different people ask the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from shoal.recipe.section import Data, DataSource, Positive, RowLength, Section, Shapes, Text, adapter
from shoal.yaml_text import read_yaml

SuiteName = Literal["quick", "transfer", "standard", "full"]
CONFIGS_DIR = Path(__file__).parents[1] / "configs"
if not CONFIGS_DIR.exists():  # editable install through a tree without symlinks
    CONFIGS_DIR = Path(__file__).parents[3] / "configs"
SUITES_DIR = CONFIGS_DIR / "suites"


@dataclass(frozen=True)
class Tasks(Section):
    """Tasks and running text that models are scored on, and on how much of them."""

    tasks: Annotated[tuple[str, ...], Shapes.SCORES] = ()
    """lm-eval task or group names: shoal's own (configs/tasks) and every task lm-eval ships."""
    limit: Annotated[Positive | None, Shapes.SCORES] = None
    """Items per task; None = all."""
    limits: Annotated[dict[str, Positive], Shapes.SCORES] = field(default_factory=dict)
    """Items of single tasks that get another number, by task name."""
    batch_size: Annotated[Positive, Shapes.SCORES] = 16
    """Prompts or questions per rank at one time."""
    num_fewshot: Annotated[Annotated[int, Field(ge=0)] | None, Shapes.SCORES] = None
    """Examples shown before each item; None = each task's own default."""
    include_path: Annotated[str | None, Shapes.SCORES] = None
    """A further folder of task YAMLs."""
    data_dir: Annotated[str | None, Shapes.BY_CONTENT] = None
    """A folder with one folder per data set, from which tasks take what they otherwise read from the Hub."""
    perplexity_data: Annotated[Data, Shapes.PERPLEXITY | Shapes.SCORES] = (DataSource("python_docs_heldout"),)
    """Running text that is scored token by token."""
    perplexity_tokens: Annotated[int, Field(ge=0), Shapes.PERPLEXITY | Shapes.SCORES] = 0
    """Tokens of running text; 0 = none is scored."""
    sequence_length: Annotated[RowLength, Shapes.PERPLEXITY | Shapes.SCORES] = 512
    """Window of the perplexity measurement, in tokens."""


@dataclass(frozen=True)
class Eval(Tasks):
    """What the models are scored on."""

    suite: Annotated[SuiteName | None, Shapes.BY_CONTENT] = None
    """Tasks and limits by name, see configs/suites: quick (minutes, bundled data), transfer (minutes, what a healed
    model is judged by), standard or full. Tasks named beside it are added, and everything else that is set here wins;
    limit caps the suite's limits of single tasks too."""
    tasks: Annotated[tuple[str, ...], Shapes.SCORES] = (
        *("retrieval_continuation", "knowledge_continuation", "reasoning_continuation"),
        *("retrieval_twin_continuation", "knowledge_twin_continuation", "reasoning_twin_continuation"),
    )
    """By default every ability in a form that training text may have, and as a twin: without one a form that was learnt
    passes for an ability that came back."""
    limit: Annotated[Positive | None, Shapes.SCORES] = 200
    perplexity_tokens: Annotated[Positive, Shapes.PERPLEXITY | Shapes.SCORES] = 10_000
    backend: Annotated[
        Literal["transformers", "vllm"], Shapes.SCORES, Field(exclude_if=lambda backend: backend == "transformers")
    ] = "transformers"
    """Library that runs the models. vllm has to be installed, needs a GPU and answers on one rank. Its likelihoods and
    texts are its own, so its scores are compared with scores of vLLM alone. Speed is measured with transformers."""
    control: Annotated[bool, Shapes.NOTHING] = False
    """Train the uncut teacher too, on the same rows with the same settings, and score it as the role `control`, which
    shows what training on this text does to a model that has lost nothing. Takes longer than training the student."""
    speed: Annotated[bool, Shapes.NOTHING] = True
    """Measure prefill and decode tokens per second, time to the first token and memory of teacher, pruned and
    distilled, interleaved."""
    speed_batch_sizes: Annotated[Annotated[tuple[Positive, ...], Field(min_length=1)] | None, Shapes.SPEED] = None
    """Sequences at once that speed is measured with; None = 1 and 4 on a CPU, 1, 8 and 32 on an accelerator."""


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
    limit: Positive | None
    perplexity_tokens: Positive
    sequence_length: RowLength
    limits: dict[str, Positive] = field(default_factory=dict)


def read_suite(name: str) -> Suite:
    """The suite of this name."""
    text = (SUITES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    return adapter(Suite).validate_python(read_yaml(text))


def with_suite(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain mapping with the suite it names spelled out; a second time changes nothing.

    Tasks that the recipe names itself are added to the suite's, and everything else that it sets wins; its limit caps
    the suite's limits of single tasks too. A mapping that is wrong in some other way is left for the recipe to refuse.
    """
    section = raw.get("eval")
    if not isinstance(section, Mapping) or section.get("suite") not in get_args(SuiteName):
        return dict(raw)
    suite = read_suite(section["suite"])
    further_tasks, further_limits = section.get("tasks", []), section.get("limits", {})
    if not isinstance(further_tasks, list | tuple) or not isinstance(further_limits, Mapping):
        return dict(raw)
    settings = {name: getattr(suite, name) for name in ("limit", "perplexity_tokens", "sequence_length")}
    tasks = list(dict.fromkeys([*suite.tasks, *further_tasks]))
    limits, cap = dict(suite.limits), section.get("limit")
    if isinstance(cap, int):
        limits = {name: min(limit, cap) for name, limit in limits.items()}
    return {**raw, "eval": {**settings, **section, "tasks": tasks, "limits": {**limits, **further_limits}}}
