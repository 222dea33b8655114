"""eval/<role>.json: what one model scores, task by task and item by item; the roles that models have in a run; and
eval/speed.json: how fast they read and write."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from shoal.artifacts.artifact import Artifact, Json, Tabular
from shoal.atomic_files import strict_json, write_text
from shoal.recipe.section import adapter
from shoal.task_words import Column

FEW_ITEMS = 50
"""Number of items below which whoever shows an interval says that they are few."""
CONTROL = "control"
"""Role of the teacher that was trained as the student, and the folder of its training in a run directory."""
MODEL = "model"
"""Role of a model that is no run's: a checkpoint as it is, which `shoal compare` takes beside runs."""
PERPLEXITY = "perplexity"
"""Name of the score of running text, which is there whatever the tasks are."""
NATS_PER_TOKEN = "nats_per_token"
"""Metric of running text, which models of unequal tokenizers do not share."""
ROLES = ("teacher", "pruned", CONTROL, "distilled")
"""Roles that an evaluation may have, in the order in which they are shown."""
KEY = ("task", "protocol", "metric")
"""What tells the scores of one evaluation apart."""
LIKELIHOOD_PROTOCOLS = ("loglikelihood", "continuation")


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class ItemScore:
    """One evaluated item under one protocol."""

    id: str
    score: float
    """Score: 1 or 0 for accuracy-like metrics, nats per token for likelihood metrics."""
    prediction: str = ""
    """Answer that the model chose or wrote."""
    target: str = ""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this item in the task's mean: 1, or the tokens of a perplexity window."""
    rates: dict[str, float] = field(default_factory=dict)
    """Of generated text `malformed`, `repetition`, `cut_off` and, where requests may be harmful, `refused` as 1 or 0,
    `tokens` as a count; of a choice among options
    `confidence`, the probability of the likeliest, and `overconfidence`, that less 1 where it is right; else empty."""
    question: str = ""
    """Question without few-shot examples; the middle of a long one is left out."""


@dataclass(frozen=True)
class TaskScore:
    """One task's mean under one protocol, with its interval and its items."""

    task: str
    """Name of the lm-eval task."""
    ability: str
    """Ability: retrieval, knowledge, reasoning, language, or the task's own group."""
    protocol: str
    """Protocol: loglikelihood, continuation, generation, worked (nats of the right answer), or rolling (perplexity)."""
    metric: str
    score: float
    ci_low: float
    ci_high: float
    """Upper end of the 95 % interval of the score."""
    n: Annotated[int, Field(ge=1)]
    chance: Annotated[float, Field(ge=0, lt=1)]
    higher_is_better: bool
    version: str
    """Version of the task: prompt and matching rules."""
    num_fewshot: int
    items: tuple[ItemScore, ...]
    family: str | None = None
    """Family of tasks that differ in nothing but their level; None = the task has no family."""
    level: float | None = None
    """Level within the family: steps of reasoning, pairs of a look-up, position of the answer."""
    rates: dict[str, float] = field(default_factory=dict)
    """Over the items, of generated text `malformed`, `repetition`, `cut_off`, `refused` (where requests may be harmful)
    and `mean_tokens`, of choices `overconfidence`, `calibration_error` and `calibration_luck`; else empty. See
    eval/harness/rates.py."""
    prompts: str = ""
    """Fingerprint of everything that was asked, few-shot examples included, and of the task's rules of matching."""
    matching: int = 1
    """Version of the code that reads answers out of generated text (shoal.abilities.matching); 1 for other tasks."""
    column: Column | Literal[""] = ""
    """How the items relate to training text; empty = not said."""
    reworded_of: str = ""
    """Task that asks the same items (by id) in a wording that training text may have; empty = none."""
    engine: str = "transformers"
    """What ran the model: transformers or vllm. Scores of two engines are never paired."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, protocol and metric, which tell the scores of one evaluation apart."""
        return self.task, self.protocol, self.metric

    def contradictions(self) -> Iterator[str]:
        """`place: what is wrong`, as in an artifact."""
        if len(self.items) != self.n:
            yield f"items: holds {len(self.items)} items, but n is {self.n}"
        if self.ci_low > self.ci_high:
            yield f"ci_low: {self.ci_low} is above ci_high ({self.ci_high})"
        total = math.fsum(item.weight for item in self.items)
        mean = math.fsum(item.score * item.weight for item in self.items) / total
        if not math.isclose(self.score, mean, rel_tol=1e-6, abs_tol=1e-9):
            yield f"score: {self.score} is not the mean of its items ({mean})"


def items_file(path: Path) -> Path:
    """The file of the items that belong to eval/<role>.json."""
    return path.with_name(f"{path.stem}.items.jsonl")


def _key(said: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(said.get(name) for name in KEY)


@dataclass(frozen=True, repr=False)
class Scores(Tabular, Artifact):
    """eval/ROLE.json: the scores of one model. eval/ROLE.items.jsonl next to it has one line per item.

    Example:
        >>> shoal.Scores.load("runs/mine/eval/teacher.json").tasks[0].score
    """

    role: str
    """Role of the model: teacher, pruned, control, distilled or model."""
    tasks: Annotated[tuple[TaskScore, ...], Field(min_length=1)]
    num_parameters: int
    num_layers: int
    num_bytes: int
    """Bytes of the checkpoint's weights on disk."""
    seconds: float
    num_requests: int = 0
    """Requests that were asked of the model, each once; 0 = not recorded."""
    num_kept: int = 0
    """Requests whose answers were there before ``seconds`` began."""

    def save(self, path: str | Path) -> None:
        """Write the file to ``path`` and its items next to it. The file appears only after its items are complete."""
        path = self.place(path)
        if path.exists():
            path.unlink()
        dump = adapter(ItemScore).dump_python
        items = (dict(zip(KEY, task.key, strict=True)) | dump(item) for task in self.tasks for item in task.items)
        lines = (json.dumps(item, ensure_ascii=False, allow_nan=False) for item in items)
        write_text(items_file(path), "".join(f"{line}\n" for line in lines))
        super().save(path)

    def body(self) -> dict[str, Json]:
        body = super().body()
        for task in body["tasks"]:
            del task["items"]
        return body

    @classmethod
    def completed(cls, body: dict[str, Json], path: Path) -> dict[str, Json]:
        if not items_file(path).is_file():
            raise ValueError(f"its items file {items_file(path).name} is missing")
        items: dict[tuple[Any, ...], list[Any]] = {}
        try:
            for line in filter(None, items_file(path).read_text(encoding="utf-8").split("\n")):
                item = strict_json(line)
                items.setdefault(_key(item), []).append(item)
            return {**body, "tasks": [{**task, "items": items.get(_key(task), [])} for task in body.get("tasks", [])]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its tasks or items do not have the expected fields ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"its items file {items_file(path).name} is not valid JSON ({error})") from error

    @property
    def engine(self) -> str:
        """Library that ran the model: `transformers` or `vllm`."""
        return self.tasks[0].engine

    def title(self) -> str:
        """Role and size of the model, in one line."""
        return f"{self.role}: {self.num_layers} layers, {self.num_parameters / 1e6:,.1f} million parameters"

    def rows(self) -> list[dict[str, Any]]:
        """One row per task."""
        names = ("task", "ability", "protocol", "metric", "score", "ci_low", "ci_high", "n", "chance")
        return [{name: getattr(task, name) for name in names} for task in self.tasks]

    def contradictions(self) -> Iterator[str]:
        keys = [task.key for task in self.tasks]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                yield f"tasks.{index}: {' '.join(key)} appears twice"
        for index, task in enumerate(self.tasks):
            yield from (f"tasks.{index}.{problem}" for problem in task.contradictions())


@dataclass(frozen=True)
class BatchSpeed:
    """Median speeds of one role at one batch size, and the most memory it took."""

    batch_size: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    """Seconds from handing over the prompts to knowing the first new token of each."""
    peak_memory_bytes: int | None
    """Bytes of weights, cache and intermediate tensors at the fullest moment; None = not measured."""
    samples: dict[str, tuple[float, ...]]
    """Values of all repeats of `prefill`, `decode` and `first_token`, so that a reader sees the noise."""


@dataclass(frozen=True)
class SpeedScore:
    """Median speeds of one role at the first batch size, and its size."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    samples: dict[str, tuple[float, ...]]
    """Values of all repeats, so that a reader sees the noise."""
    batches: tuple[BatchSpeed, ...] = ()
    """Speeds by batch size, increasing."""
    num_layers: int | None = None
    num_parameters: int | None = None
    num_bytes: int | None = None
    """Bytes of the checkpoint's weights on disk."""
    kv_bytes_per_token: int | None = None
    """Bytes that one more token of one sequence adds to the cache."""


@dataclass(frozen=True)
class Speed(Artifact):
    """eval/speed.json: the roles' speeds, measured interleaved in one process."""

    FILE: ClassVar[str] = "eval/speed.json"

    roles: dict[str, SpeedScore]
    batch_size: int
    """First batch size, to which the speeds directly under a role belong."""
    prompt_tokens: int
    new_tokens: int
    dtype: str
    left_out: tuple[str, ...] = ()
    """Reasons why a batch size that was asked for is missing, a sentence each."""
