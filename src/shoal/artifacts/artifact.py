"""What a stage hands on: typed JSON with a schema number and the provenance of what made it.

Every artifact carries `provenance.inputs`, a flat mapping of everything that shaped it (fingerprints and settings). Two
runs are the same run exactly when these mappings are equal, and a refusal can name the field that differs.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, ValidationError

from shoal.artifacts.importance import Atlas, Removal, Sweep, outside
from shoal.artifacts.tables import Tabular
from shoal.artifacts.width import KeptWidth
from shoal.atomic_files import fingerprint, write_text
from shoal.errors import UserError
from shoal.recipe.edits import Edits, Insert, edited_layers, first_change, in_words, insertions
from shoal.recipe.evaluate import Samples
from shoal.recipe.section import adapter, as_dict
from shoal.runtime import environment

Json = Any
ABSENT = "absent"
ROUND = "round"
"""Input of a plan that says which of prune.rounds it belongs to, from 1; absent where there is one."""
Column = Literal["in", "twin", "out", "public", "disputed"]
"""How items relate to training text: `in` = in a form that it may have, `twin` = the content of such items in a form
that it never has, `out` = an ability that it never shows, `public` = a public benchmark; `disputed` = the items of any
of them on which people do not agree, which choose nothing."""


@dataclass(frozen=True)
class Provenance:
    """What made an artifact, where and when."""

    inputs: dict[str, Json]
    """Fingerprints and settings by name: `model`, `data`, `prune.drop`, ..."""
    environment: dict[str, Json] = field(default_factory=environment)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def fingerprint(self) -> str:
        """A short hash of the inputs."""
        return fingerprint(self.inputs)


@dataclass(frozen=True)
class Artifact:
    """A JSON file of the run directory. Subclasses are frozen dataclasses whose fields are the file's keys."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    FILE: ClassVar[str] = ""
    SCHEMA: ClassVar[int] = 1

    provenance: Provenance

    def write(self, path: Path) -> None:
        """Write the file at ``path``, whole or not at all."""
        body = adapter(type(self)).dump_python(self, mode="json")
        body = {"schema": self.SCHEMA, **body}
        write_text(path, json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The artifact at ``path``.

        Raises:
            UserError: missing, not JSON, of another schema, with wrong fields, or contradicting itself.
        """
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; run the stage that makes it first") from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path}: is not valid JSON ({error}); delete it and run its stage again") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable or delete it") from error
        schema = body.pop("schema", None) if isinstance(body, dict) else None
        if schema != cls.SCHEMA:
            raise UserError(
                f"{path}: has schema {schema}, this version reads {cls.SCHEMA}; delete it and run its stage again"
            )
        try:
            artifact = adapter(cls).validate_python(body)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            got = reprlib.repr(first["input"])
            raise UserError(
                f"{path}: {where}: {first['msg']} (got {got}); delete it and run its stage again"
            ) from error
        if (problem := next(artifact.contradictions(), None)) is not None:
            raise UserError(f"{path}: {problem}; delete it and run its stage again")
        return artifact

    def contradictions(self) -> Iterator[str]:
        """`place: what is wrong`, for everything that single fields cannot tell."""
        yield from ()


@dataclass(frozen=True)
class Importance(Tabular, Artifact):
    """importance.json: what every layer is worth. Higher = keep."""

    FILE: ClassVar[str] = "importance.json"

    num_layers: int
    num_tokens: int
    """Real (unpadded) tokens that were averaged over."""
    layers: dict[str, tuple[float, ...]]
    """Metric name -> one score per layer."""
    runs: dict[str, tuple[tuple[float, ...], ...]]
    """Metric name -> scores[n - 1][l] of the run of n layers that starts at layer l; row n - 1 has num_layers - n + 1
    entries."""
    errors: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    """Standard errors of the scores of metrics that are estimated from samples; None = not known."""
    orders: dict[str, tuple[Removal, ...]] = field(default_factory=dict)
    """Greedy metric name -> what it removes, first removal first."""
    atlas: Atlas | None = None
    """Single layers by task and protocol; None where no task was swept."""
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    """Operator -> its table, for every operator but that of single layers."""
    kept: tuple[int, ...] = ()
    """The teacher's layers that the measured model has, where it is the healed student of an earlier round; layers are
    numbered as in that model everywhere else here. Empty = it is the teacher."""

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's number of every layer."""
        return self.kept or tuple(range(self.num_layers))

    def places(self, teacher_layers: Iterable[int]) -> tuple[int, ...]:
        """Those of ``teacher_layers`` that the measured model has, by their numbers in it."""
        wanted = set(teacher_layers)
        return tuple(place for place, layer in enumerate(self.teacher_layers) if layer in wanted)

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer: its score by every metric, of metrics of runs that of the layer alone, the standard error
        of a score that is estimated, and its importance for every swept task."""
        columns: dict[str, Mapping[int, Any]] = {name: dict(enumerate(scores)) for name, scores in self.layers.items()}
        columns |= {f"{name}_error": dict(enumerate(errors)) for name, errors in self.errors.items()}
        columns |= {name: dict(enumerate(scores[0])) for name, scores in self.runs.items()}
        if self.atlas is not None:
            sweep = self.atlas.sweep
            layers = [unit.layers[0] for unit in sweep.units]
            columns |= {sweep.title(of): dict(zip(layers, of.importances, strict=True)) for of in sweep.columns}
            columns |= self._read_write_by_layer(self.atlas)
        return [
            {"layer": layer, **{name: values.get(place) for name, values in columns.items()}}
            for place, layer in enumerate(self.teacher_layers)
        ]

    def _read_write_by_layer(self, atlas: Atlas) -> Iterator[tuple[str, Mapping[int, float]]]:
        """`ability/protocol/reading`, `/writing` and `/interaction`; `task/task/hidden_writing` of two protocols."""
        parts = atlas.read_write
        if parts is None:
            return
        for column, own in zip(parts.columns, atlas.columns, strict=True):
            for part in ("reading", "writing", "interaction"):
                estimates = enumerate(getattr(column, part))
                yield f"{atlas.sweep.title(own)}/{part}", {layer: one.value for layer, one in estimates}
        for gap in parts.hidden_writing:
            yield (
                f"{gap.likelihood}/{gap.generation}/hidden_writing",
                {layer: one.value for layer, one in enumerate(gap.gaps)},
            )

    def contradictions(self) -> Iterator[str]:
        count = self.num_layers
        if count < 1:
            yield f"num_layers: is {count}"
        if self.kept and (len(self.kept) != count or list(self.kept) != sorted(set(self.kept))):
            yield f"kept: is {list(self.kept)}; it names a layer of the teacher for each of {count}, increasing"
        for field_name in ("layers", "errors"):
            for metric, scores in getattr(self, field_name).items():
                if len(scores) != count:
                    yield f"{field_name}.{metric}: has {len(scores)} scores for {count} layers"
        for metric, rows in self.runs.items():
            if not rows:
                yield f"runs.{metric}: is empty"
            for length, row in enumerate(rows, 1):
                if len(row) != count - length + 1:
                    wanted = f"{count - length + 1} runs of {length} layers"
                    yield f"runs.{metric}.{length - 1}: has {len(row)} scores for {wanted}"
        for name, order in self.orders.items():
            yield from outside(f"orders.{name}", [step.unit for step in order], num_layers=count)
        sweeps = {f"sweeps.{name}": sweep for name, sweep in self.sweeps.items()}
        if self.atlas is not None:
            sweeps["atlas.sweep"] = self.atlas.sweep
        for place, sweep in sweeps.items():
            yield from sweep.contradictions(place, num_layers=count)
        if self.atlas is not None and self.atlas.read_write is not None:
            yield from self.atlas.read_write.contradictions(self.atlas.sweep)


@dataclass(frozen=True)
class ClosedGap:
    """What makes up for one run of dropped layers without training, and what it does on text that it was not fitted to.

    Errors are means over tokens of ||y - x||^2 / ||y||^2, where x is the student's state behind the gap and y the
    teacher's; divergences KL(teacher || student) in nats per token, with the gaps below closed and those above open.
    """

    first: int
    last: int
    """The dropped layers are ``first`` to ``last``, of the teacher."""
    factor: float
    """The state behind the gap is so many times as large; in the student all layers above write so many times less."""
    is_corrected: bool
    """Whether the MLP below the gap writes something else."""
    error_before: float
    error_after: float
    divergence_before: float
    divergence_after: float

    @property
    def is_closed(self) -> bool:
        """Whether anything makes up for the layers."""
        return self.is_corrected or self.factor != 1

    def in_words(self) -> str:
        """What was done, for a reader."""
        how = [f"a factor of {self.factor:.3f}"] if self.factor != 1 else []
        how += ["a correction"] if self.is_corrected else []
        gone = f"layers {self.first} to {self.last}" if self.last > self.first else f"layer {self.first}"
        return f"{' and '.join(how)} for {gone}"


@dataclass(frozen=True)
class PruningPlan(Artifact):
    """plan.json: which of the teacher's layers go. Indices are 0-based and the teacher's."""

    FILE: ClassVar[str] = "plan.json"

    num_layers: int
    """Layers of the teacher."""
    drop: tuple[int, ...]
    """Dropped layers, strictly increasing."""
    reason: str
    """Reason for this choice of layers, for a reader."""
    edits: Edits = ()
    """Changes to layers that stay; ``drop`` holds the layers that merges and replacements took in."""
    gaps: tuple[ClosedGap, ...] = ()
    """How prune.compensate closed the gaps that ``drop`` leaves, increasing; empty = they are open."""
    width: KeptWidth | None = None
    """What stays within the layers that prune.width narrows; None = they are as wide as they were."""
    text: dict[str, Json] = field(default_factory=dict)
    """What prune.compensate was fitted to, or prune.width chosen on, as Training.data: documents and tokens by source,
    and what of evaluation items and forms stands in it."""
    vision_blocks: int | None = None
    """Blocks of the vision tower that stay, where those above them go because nothing reads them; None = all stay."""
    mtp: bool = False
    """Whether the multi-token-prediction modules are kept behind the last layer, as they are."""
    student: str = ""
    """Fingerprint of this plan together with the student that was made by it; empty = not recorded."""

    def contradictions(self) -> Iterator[str]:
        drop, asked = list(self.drop), self.provenance.inputs.get("prune.drop")
        if drop != sorted(set(drop)):
            yield f"drop: is {drop}; layers are named once, increasing"
        if wrong := [layer for layer in drop if not 0 <= layer < self.num_layers]:
            yield f"drop: names layer {wrong[0]} of a model of {self.num_layers} layers"
        if len(drop) >= self.num_layers:
            yield "drop: leaves no layer"
        for index, gap in enumerate(self.gaps):
            if not set(range(gap.first, gap.last + 1)) <= set(drop):
                yield f"gaps.{index}: is of layers {gap.first} to {gap.last}, which are not all dropped"
            if not 0 < gap.factor < math.inf:
                yield f"gaps.{index}.factor: is {gap.factor}"
        if self.width is not None:
            yield from self.width.contradictions(len(self.keep))
        if asked and not (set(asked) <= set(drop) if self.edits else set(asked) == set(drop)):
            yield f"drop: is {drop}, and the recipe that made it asked for {asked}"

    def sealed(self, student: str) -> str:
        """Value of the field ``student`` for a student of this fingerprint."""
        closed = [[asdict(gap) for gap in self.gaps]] if self.gaps else []
        width = [] if self.width is None else [asdict(self.width)]
        tower = [] if self.vision_blocks is None else [self.vision_blocks]
        edits = [as_dict(edit) for edit in self.edits]
        return fingerprint([self.num_layers, list(self.drop), edits, *closed, *width, *tower, student])

    def in_words(self) -> str:
        """The changes to the teacher in one line."""
        gone = f"dropping {len(self.drop)} of {self.num_layers} layers: {', '.join(map(str, self.drop))}"
        closed = [gap.in_words() for gap in self.gaps if gap.is_closed]
        tower = [] if self.vision_blocks is None else [f"ending the vision tower with block {self.vision_blocks - 1}"]
        width = [] if self.width is None else [f"keeping {self.width.in_words()}"]
        kept = ["keeping multi-token prediction, untrained"] if self.mtp else []
        return "; ".join([*([gone] if self.drop else []), *map(in_words, self.edits), *closed, *width, *tower, *kept])

    def state_scale(self, layer: int) -> float:
        """How many times larger the teacher's state after ``layer`` is than the student's that stands for it."""
        return math.prod(gap.factor for gap in self.gaps if gap.last <= layer)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.in_words())}</p><p>{escape(self.reason)}</p>"

    @property
    def changes_layers(self) -> bool:
        """Whether the student's layers are others than the teacher's."""
        return bool(self.drop or self.edits or self.width)

    @property
    def first_change(self) -> int:
        """The lowest layer at which the student is not the teacher any more; behind the last where it is in none."""
        if self.width is not None:
            return 0
        changed = [first_change(self.drop, self.edits)] if self.drop or self.edits else []
        return min([*changed, *self._corrected], default=self.num_layers)

    @property
    def edited_layers(self) -> set[int]:
        """The teacher's layers that stay and that edits change; new ones are beside them."""
        changing = [edit for edit in self.edits if not isinstance(edit, Insert)]
        return {layer for edit in changing for layer in edited_layers(edit)} - {*self.drop}

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """The teacher's layers that stay with other weights, before any training, increasing."""
        changed = {layer for layer in self.keep if self.width is not None or self.state_scale(layer) != 1}
        return tuple(sorted((self.edited_layers | changed | {*self._corrected}) - {*self.drop}))

    @property
    def _corrected(self) -> tuple[int, ...]:
        return tuple(gap.first - 1 for gap in self.gaps if gap.is_corrected)

    @property
    def keep(self) -> tuple[int, ...]:
        """For every layer of the student the teacher's layer that it is, in order. A new layer has the number of the
        one below it, whose kind it has: of a number that is there twice the first is the teacher's layer."""
        dropped, followed = set(self.drop), set(insertions(self.edits))
        own = (layer for layer in range(self.num_layers) if layer not in dropped)
        return tuple(number for layer in own for number in (layer,) * (2 if layer in followed else 1))

    @property
    def new_layers(self) -> tuple[int, ...]:
        """The student's layers that edits insert, by their numbers in it."""
        return tuple(
            place for place, (lower, upper) in enumerate(itertools.pairwise(self.keep), start=1) if lower == upper
        )


@dataclass(frozen=True)
class ItemScore:
    """One evaluated item under one protocol."""

    id: str
    score: float
    """Score: 1 or 0 for accuracy-like metrics, nats per token for likelihood metrics."""
    prediction: str = ""
    """Answer that the model chose or wrote."""
    target: str = ""
    weight: float = 1.0
    """Share of this item in the task's mean: 1, or the tokens of a perplexity window."""
    rates: dict[str, float] = field(default_factory=dict)
    """Rates of generated text: `malformed`, `repetition` and `cut_off` as 1 or 0, `tokens` as a count; else empty."""
    question: str = ""
    """Question without few-shot examples; the middle of a long one is left out."""
    num_right: int | None = None
    """Right ones among the texts that were drawn beside the greedy one; None = none were drawn."""


@dataclass(frozen=True)
class PassAt:
    """Share of items of which at least one of ``k`` drawn texts is right, with its 95 % interval over the items."""

    k: int
    score: float
    ci_low: float
    ci_high: float
    chance: float
    """Share that guessing reaches in ``k`` texts."""


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
    n: int
    chance: float
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
    """Rates of generated text over the items: `malformed`, `repetition`, `cut_off` and `mean_tokens`; else empty. See
    eval/harness/rates.py."""
    prompts: str = ""
    """Fingerprint of everything that was asked, few-shot examples included, and of the task's rules of matching."""
    matching: int = 1
    """Version of the code that reads answers out of generated text (shoal.abilities.matching); 1 for other tasks."""
    column: Column | Literal[""] = ""
    """How the items relate to training text; empty = not said."""
    twin_of: str = ""
    """Task that asks the same items (by id) in a form that training text may have; empty = none."""
    samples: Samples | None = None
    """Drawing of the texts that the items' ``num_right`` count; None = none were drawn."""
    pass_at: tuple[PassAt, ...] = ()
    """pass@k by k, increasing."""
    ceiling: float = 1.0
    """Best score there is: below 1 where an answer scores the share of people who gave it too."""
    engine: str = "transformers"
    """What ran the model: transformers, vllm or llama.cpp. Scores of two engines are never paired."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, protocol and metric, which tell the scores of one evaluation apart."""
        return self.task, self.protocol, self.metric

    def contradictions(self) -> Iterator[str]:
        """`place: what is wrong`, as in an artifact."""
        if self.n < 1:
            yield f"n: is {self.n}"
        if len(self.items) != self.n:
            yield f"items: has {len(self.items)} items, n says {self.n}"
        if not 0 <= self.chance < 1:
            yield f"chance: is {self.chance}; it is 0 or more and less than 1"
        if not self.chance <= self.ceiling <= 1:
            yield f"ceiling: is {self.ceiling}; it is at least chance, {self.chance}, and at most 1"
        for index, item in enumerate(self.items):
            if item.weight <= 0:
                yield f"items.{index}.weight: is {item.weight}"
            drawn = self.samples.n if self.samples else None
            if (item.num_right is None) != (drawn is None) or not 0 <= (item.num_right or 0) <= (drawn or 0):
                yield f"items.{index}.num_right: is {item.num_right}, and {drawn or 'no'} texts were drawn"
        if self.ci_low > self.ci_high:
            yield f"ci_low: {self.ci_low} is above ci_high, {self.ci_high}"
        total = math.fsum(item.weight for item in self.items)
        mean = math.fsum(item.score * item.weight for item in self.items) / total
        if not math.isclose(self.score, mean, rel_tol=1e-6, abs_tol=1e-9):
            yield f"score: is {self.score}, and the mean over its items is {mean}"


@dataclass(frozen=True)
class Evaluation(Tabular, Artifact):
    """eval/<role>.json: the abilities of one model."""

    role: str
    """Role of the model: teacher, pruned, control, distilled, quantized or teacher_quantized."""
    tasks: tuple[TaskScore, ...]
    num_parameters: int
    num_layers: int
    num_bytes: int
    """Bytes of the checkpoint's weights on disk."""
    seconds: float
    num_requests: int = 0
    """Requests that were asked of the model, each once; 0 = not recorded."""
    num_kept: int = 0
    """Requests whose answers were there before ``seconds`` began."""

    @property
    def engine(self) -> str:
        """What ran the model."""
        return self.tasks[0].engine

    def rows(self) -> list[dict[str, Any]]:
        """One row per task."""
        names = ("task", "ability", "protocol", "metric", "score", "ci_low", "ci_high", "n", "chance")
        return [{name: getattr(task, name) for name in names} for task in self.tasks]

    def contradictions(self) -> Iterator[str]:
        if not self.tasks:
            yield "tasks: is empty"
        keys = [task.key for task in self.tasks]
        for index, task in enumerate(self.tasks):
            if task.key in keys[:index]:
                yield f"tasks.{index}: {' '.join(task.key)} is there twice"
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
    expected: dict[str, float] = field(default_factory=dict)
    """Name of a field above -> the teacher's value, scaled by what the layer count says; empty for the teacher."""

    @property
    def step_ms(self) -> float:
        """Milliseconds between two written tokens of a sequence."""
        return 1000 * self.batch_size / self.decode_tokens_per_s


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
    expected: dict[str, float] = field(default_factory=dict)
    """Name of a size above -> what the teacher's would be with this role's number of layers; empty for the teacher."""


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
    half_depth: SpeedScore | None = None
    """The teacher without every second layer, where no role has fewer layers than it: what time does not shrink with
    the layers is told by two depths."""


QUANTIZED = ("quantized", "teacher_quantized")
"""Roles of the quantised copies of the student and of the teacher, and their folders in a run directory."""


@dataclass(frozen=True)
class Quantized(Artifact):
    """quantize.json in quantized/ and teacher_quantized/: what the copy beside it was made of, and how."""

    FILE: ClassVar[str] = "quantize.json"

    source: str
    """Role of the model that was quantised."""
    format: str
    library: str
    """Library that did it, with its version."""
    num_bytes: int
    """Bytes of the copy's weights on disk."""
    source_bytes: int
    """The same of what it was made of."""
    num_tokens: int
    """Tokens it was calibrated on; 0 = the format takes none."""
    seconds: float
    content: str = ""
    """Content hash of the copy, by which its scores know it; empty = not recorded."""


CONTROL = "control"
"""Role of the uncut teacher that was trained as the student, and the folder of its training in a run directory."""
MODEL = "model"
"""Role of a model that is no run's: a checkpoint as it is, which `shoal compare` takes beside runs."""
NATS_PER_TOKEN, BITS_PER_BYTE = "nats_per_token", "bits_per_byte"
"""Metrics of running text; of models with unequal tokenizers the second alone can be compared."""
ROLES = ("teacher", "pruned", CONTROL, "distilled", *QUANTIZED)
"""Roles that an evaluation may have, in the order in which they are shown."""


@dataclass(frozen=True)
class Training(Tabular, Artifact):
    """distill.json: how the student was trained; written when distilled/ is complete. Of the control: control/."""

    FILE: ClassVar[str] = "distill.json"

    num_steps: int
    num_tokens: int
    """Tokens that the student was trained on, over all ranks."""
    seconds: float
    history: tuple[dict[str, float], ...]
    """Logged values by step: `step`, `loss`, each loss term, `learning_rate`, `grad_norm`, ..."""
    settings: dict[str, Json]
    """Training arguments and DeepSpeed configuration as resolved."""
    data: dict[str, Json]
    """Documents, tokens, truncations and drops by source."""
    peak_memory_bytes: int
    """Bytes at the peak of the largest rank."""

    def rows(self) -> list[dict[str, Any]]:
        """One row per logged step."""
        return list(self.history)


def differences(expected: dict[str, Json], actual: dict[str, Json]) -> list[str]:
    """A sentence for every field in which two sets of inputs differ: both values, or whose files are not the same."""
    return [
        _in_words(key, expected.get(key, ABSENT), actual.get(key, ABSENT))
        for key in sorted(expected.keys() | actual.keys())
        if _plain(expected.get(key, ABSENT)) != _plain(actual.get(key, ABSENT))
    ]


def require_same_run(expected: dict[str, Json], provenance: Provenance, path: Path, *, remedy: str) -> None:
    """Refuse an artifact that belongs to another run.

    Only the fields of ``expected`` are compared, so that a stage can ask for what matters to it.

    Raises:
        UserError: naming the file, the fields and both values, and ``remedy``.
    """
    asked = {key: provenance.inputs[key] for key in expected if key in provenance.inputs}
    differing = differences(expected, asked)
    if differing:
        raise UserError(f"{path}: belongs to another run: {'; '.join(differing)}. {remedy}")


def _in_words(key: str, here: Json, there: Json) -> str:
    if ABSENT not in (here, there):  # two hashes would tell nobody anything
        if key == "tasks":
            return "the task files, or what makes their items, differ"
        if key.endswith(" (files)"):
            return f"the files of {key.removesuffix(' (files)')} differ"
    return f"{key} is {here!r} in this recipe but {there!r} there"


def _plain(value: Json) -> Json:
    return json.loads(json.dumps(value, default=str))


LIKELIHOOD_PROTOCOLS = ("loglikelihood", "continuation")
