"""How a pruned model is distilled from its teacher: the section `distill`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from shoal.errors import UserError
from shoal.recipe.evaluate import Names
from shoal.recipe.losses import ForwardKL, Losses, LossTerm, asked_sources, needs_teacher, temperatures
from shoal.recipe.section import AUTO, DataSource, Dtype, Place, Positive, RowLength, Section, Shapes, Text, listed_as
from shoal.recipe.trainer_arguments import DEFAULTS, HALVES

Packing = Literal["wrapped", "bfd"]
"""wrapped: rows are filled to the last token; a document that does not fit goes on in the next row as one of its own.
bfd (best fit): documents stay whole, and what is longer than a row is cut off; the rest of a row is padding that is not
learnt. Unlike in TRL, whose words these are, documents of a row stay apart under both."""
Trainable = Literal["all", "layers", "from_first_cut", "near_gaps", "norm_and_head"]
Precision = Literal["auto", "float32", "bf16-mixed", "bf16-true", "fp16-mixed", "fp16-true"]


@dataclass(frozen=True, kw_only=True)
class Generate(Section):
    """Let the teacher write the text: continue openings of texts, or replace the last assistant turn of
    conversations."""

    prompt_tokens: Positive = 24
    """Tokens of each text that the teacher continues. Conversations: everything before the last assistant turn."""
    max_new_tokens: Positive = 232
    """Maximum number of tokens that the teacher writes. Conversations too long for a row are skipped."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Sampling temperature. `1`: the teacher's own distribution; `0`: always the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass of the most probable tokens to sample from. `1`: all tokens."""
    keep: Literal["all", "correct"] = "all"
    """Texts to keep. `correct`: only turns with the same final answer as in the data."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Library that runs the teacher. `vllm`: must be installed, and runs on one rank."""


@dataclass(frozen=True)
class TrainingSource(DataSource):
    """Source of training text, and its losses."""

    losses: Annotated[Losses | None, Field(exclude_if=lambda terms: terms is None)] = None
    """Losses for the tokens of this source. Default: distill.losses. Each sum is divided by all trained tokens of the
    step, so a source with few tokens adds little. Without a teacher's loss, the teacher does not read these rows."""
    generate: Annotated[Generate | None, Field(exclude_if=lambda generate: generate is None)] = None
    """Let the teacher write this source's text before training. Default: the text itself."""


TrainingData = Annotated[tuple[TrainingSource, ...], listed_as("path"), Field(min_length=1)]
"""One source or a list of them."""


@dataclass(frozen=True)
class Live(Section):
    """Run the teacher during training."""

    kind: Annotated[Literal["live"], Shapes.TRAINING] = "live"
    dtype: Annotated[Dtype | None, Shapes.TRAINING] = None
    """Precision of the teacher. Default: the recipe's dtype."""
    offload: Annotated[bool, Shapes.NOTHING] = False
    """Keep the teacher's weights in CPU memory: slower, less memory on the device. ZeRO 3 shards them instead."""


@dataclass(frozen=True)
class Recorded(Section):
    """Store the teacher's outputs before training, and train from the files. The files hold its distributions at the
    losses' temperature, and the states for hidden_states (two bytes per hidden dimension, token and layer)."""

    kind: Annotated[Literal["recorded"], Shapes.TRAINING] = "recorded"
    path: Annotated[Place | None, Shapes.NOTHING] = None
    """Folder of the files; several runs can share it. A folder with other files is an error. Default: RUN_DIR/signals,
    replaced if out of date."""
    top_k: Annotated[Positive, Shapes.SIGNALS | Shapes.TRAINING] = 32
    """Number of most probable next tokens stored per position. The other probabilities are stored as one sum."""
    prefix: Annotated[bool, Shapes.TRAINING] = False
    """Also store the teacher's state below the lowest trained layer. Then neither model runs the layers below. Takes
    one number per hidden dimension and token."""
    backend: Annotated[Literal["transformers", "vllm"], Shapes.SIGNALS | Shapes.TRAINING] = "transformers"
    """Library that runs the teacher. `vllm`: must be installed, runs on one rank, and must agree with transformers."""

    def refuse_all(self, vocabulary: int | None) -> None:
        """Refuse to store every token of the ``vocabulary``."""
        if vocabulary is not None and self.top_k >= vocabulary:
            raise UserError(
                f"distill.teacher.top_k: {self.top_k} covers all of the {vocabulary:,} tokens of the vocabulary, but "
                "the losses need some outside the top k; lower it"
            )

    def folder(self, run_dir: str | Path) -> Path:
        """Where the files of a run lie."""
        return Path(self.path or f"{run_dir}/signals").expanduser()


TeacherSource = Annotated[
    Annotated[Live | Recorded, Field(discriminator="kind")],
    BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
]
"""A bare word is short for {kind: word}."""


@dataclass(frozen=True)
class Watch(Section):
    """Scores during training."""

    eval_steps: Annotated[Annotated[float, Field(gt=0, lt=1)] | Positive, Shapes.TRAINING] = 0.25
    """Steps between two scorings; below 1, a share of all steps. The first and the last state are scored too."""
    perplexity_tokens: Annotated[int, Field(ge=0), Shapes.TRAINING] = 4096
    """Tokens of eval.perplexity_data. `0`: no perplexity."""
    tasks: Annotated[Names, Shapes.TRAINING] = ()
    """Tasks to score, one or two per ability."""
    limit: Annotated[Positive, Shapes.TRAINING] = 32
    """Items per task: the first ones of eval.limit."""
    metric_for_best_model: Annotated[str | None, Shapes.TRAINING] = None
    """Score that selects the state for distilled/: `perplexity` or a task. Default: the last state."""

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of all that is scored."""
        return (*(["perplexity"] if self.perplexity_tokens else []), *self.tasks)


@dataclass(frozen=True)
class Lora(Section):
    """Train low-rank adapters instead of the weights (LoRA, Hu et al. 2021, arXiv:2106.09685). They are merged into the
    weights at the end, so distilled/ is a plain checkpoint."""

    r: Annotated[Positive, Shapes.TRAINING] = 16
    """Rank of the adapters."""
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False), Shapes.TRAINING] = 32.0
    """Scale of the adapters: their product is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1), Shapes.TRAINING] = 0.0
    """Share of the adapters' inputs set to zero. The random draws depend on the number of ranks."""
    target_modules: Annotated[Annotated[tuple[Text, ...], Field(min_length=1)] | None, Shapes.TRAINING] = None
    """Linear modules with an adapter, by the end of their names (`q_proj`, `mlp.down_proj`). Default: all linear
    modules of the trained layers."""
    load_in_4bit: Annotated[bool, Shapes.TRAINING] = False
    """Hold frozen weights in 4 bits during training (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). Needs
    bitsandbytes. Adapters are merged into the original weights."""

    def chosen(self, possible: Sequence[str]) -> list[str]:
        """Those of the ``possible`` linear modules that get an adapter."""
        chosen = set[str]()
        for target in self.target_modules or [""]:  # as it stands: all
            meant = [name for name in possible if not target or f".{name}".endswith(f".{target}")]
            if not meant:
                known = ", ".join(sorted({name.rpartition(".")[2] for name in possible})) or "none"
                raise UserError(
                    f"distill.lora.target_modules: {target!r} is not a linear module of trained layers; choose from "
                    f"{known}"
                )
            chosen.update(meant)
        return [name for name in possible if name in chosen]

    def require_packages(self) -> None:
        """Refuse 4-bit weights without the package that makes them."""
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "distill.lora.load_in_4bit: needs bitsandbytes; run `pip install 'bitsandbytes>=0.50'`, or set it to "
                "false"
            )


@dataclass(frozen=True)
class OnPolicy(Section):
    """Train a share of the steps on the student's own samples (GKD, arXiv:2306.13649). What follows the second
    copy of a repetition at the end of a sample is not trained on."""

    share: Annotated[float, Field(gt=0, le=1), Shapes.TRAINING] = 0.5
    """Probability that a step uses samples (GKD's lambda). `1`: every step."""
    start: Annotated[float, Field(ge=0, lt=1), Shapes.TRAINING] = 0.3
    """Share of all steps before the first step with samples."""
    prompt_tokens: Annotated[Positive, Shapes.TRAINING] = 24
    """Tokens of text that the student continues, as far as the row has room. Conversations: everything before an
    assistant's turn."""
    max_new_tokens: Annotated[Positive, Shapes.TRAINING] = 128
    """Maximum number of tokens that the student writes."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), Shapes.TRAINING] = 1.0
    """Sampling temperature. `0`: always the most probable token."""


@dataclass(frozen=True)
class Distill(Section):
    """Training of the pruned model with the teacher."""

    data: Annotated[TrainingData, Shapes.ROWS | Shapes.TRAINING] = (TrainingSource(AUTO),)
    """Training text, and images with questions and answers."""
    num_tokens: Annotated[Positive | None, Shapes.TRAINING] = None
    """Training tokens over all ranks. Sets the number of steps, unless trainer.max_steps does. Default: 200,000, or
    without data what this machine trains in about an hour."""
    sequence_length: Annotated[RowLength, Shapes.ROWS | Shapes.TRAINING] = 512
    """Tokens of one row: documents are packed into rows, and a batch counts rows."""
    batch_size: Annotated[Positive | None, Shapes.TRAINING] = None
    """Rows of one optimizer step over all ranks; gradients are accumulated accordingly. Keeps the training equal on any
    number of ranks. Default: trainer.per_device_train_batch_size times the ranks."""
    packing: Annotated[Packing, Shapes.ROWS | Shapes.TRAINING] = "wrapped"
    """Packing of documents into rows. `wrapped`: long documents continue in the next row; `bfd`: documents stay whole,
    longer ones are cut, and rows are padded."""
    losses: Annotated[Losses, Shapes.TRAINING] = (ForwardKL(),)
    """Losses: the sum of these terms, each times its weight. They apply to sources without losses of their own, and to
    the student's samples. p is the teacher's distribution over the vocabulary, q the student's."""
    trainable: Annotated[Trainable, Shapes.TRAINING] = "all"
    """Weights to train. `all`: everything; `layers`: all but embeddings and head; `from_first_cut`: the layers above
    the first dropped one, and the final norm; `near_gaps`: the layers next to dropped ones; `norm_and_head`: final norm
    and head. The frozen layers below run once for both models."""
    lora: Annotated[Lora | None, Shapes.TRAINING] = None
    """LoRA adapters for the trained layers. Default: train the weights themselves."""
    teacher: Annotated[TeacherSource, Shapes.TRAINING] = Live()
    """Teacher that runs during training, or recorded outputs. `live`: run it; `recorded`: read stored outputs."""
    on_policy: Annotated[OnPolicy | None, Shapes.TRAINING] = None
    """Training on the student's own samples. Default: none."""
    watch: Annotated[Watch | None, Shapes.TRAINING] = Watch()
    """Scores during training; they can select the best state. `None`: no scores."""
    stop_on_spike: Annotated[Annotated[float, Field(gt=1, allow_inf_nan=False)] | None, Shapes.NOTHING] = 10.0
    """Stop if the loss exceeds this multiple of the recent median. The batch is saved. `None`: stop only on NaN or
    infinity."""
    precision: Annotated[Precision, Shapes.TRAINING] = "auto"
    """Precision of weights and products in training. `bf16-mixed` and `fp16-mixed`: float32 weights with autocast;
    `bf16-true` (ZeRO 1 to 3) and `fp16-true`: two-byte weights with float32 copies in the optimizer. `auto`: that of
    the DeepSpeed configuration, else float32 weights with the fastest products of the device."""
    profile: Annotated[tuple[Positive, Positive] | None, Shapes.NOTHING] = None
    """First and last step to trace with torch.profiler, counted from 1; files in RUN_DIR/profile. Open the files in
    chrome://tracing or Perfetto. Default: none."""
    trainer: Annotated[dict[str, Any], Shapes.BY_CONTENT, Field(json_schema_extra={"default": DEFAULTS})] = field(
        default_factory=dict
    )
    """Arguments of transformers.TrainingArguments. The defaults shown are shoal's. `use_liger_kernel`: Liger's kernels
    for norms, MLPs and rotary embedding, on GPUs. `torch_compile`: compile the decoder layers and the loss.
    `ddp_timeout`: seconds to wait for a late rank."""
    deepspeed: Annotated[str | dict[str, Any] | None, Shapes.BY_CONTENT] = "zero2"
    """DeepSpeed configuration: a shipped name, a path or a mapping. Names: zero0 to zero3, zero2_offload,
    zero3_offload, zero3_nodes. `None`: ZeRO 0."""

    def __post_init__(self) -> None:
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile: the end is not above the beginning (got {list(self.profile)})")
        if self.on_policy is not None and self.on_policy.max_new_tokens >= self.sequence_length:
            told = f"{self.on_policy.max_new_tokens} tokens have no room in a row of {self.sequence_length}"
            raise ValueError(f"on_policy.max_new_tokens: {told}; lower it, or raise sequence_length")
        if self.watch is not None and not self.watch.scores and self.watch.metric_for_best_model is None:
            object.__setattr__(self, "watch", None)
        # transformers' words for precision: said where nothing else is, or said twice
        said = {word: self.trainer[name] for name, word in HALVES.items() if name in self.trainer}
        words = [word for word, flag in said.items() if flag] or ["float32"]
        is_clear = said and len(words) == 1 and all(isinstance(flag, bool) for flag in said.values())
        if is_clear and self.precision in ("auto", *words):
            object.__setattr__(self, "precision", words[0])
            others = {name: value for name, value in self.trainer.items() if name not in HALVES}
            object.__setattr__(self, "trainer", others)

    @property
    def ddp_timeout(self) -> int:
        """Seconds that a collective may wait for a late rank before the job ends."""
        return self.trainer.get("ddp_timeout", 1800)

    @property
    def budget(self) -> int:
        """Training tokens."""
        return self.num_tokens or NUM_TOKENS

    @property
    def has_images(self) -> bool:
        """Whether a source has images."""
        return any(source.has_images for source in self.data)

    @property
    def recorded_temperature(self) -> float:
        """Temperature at which a recorded teacher speaks: that of the terms that read its distributions."""
        return min(temperatures(self.terms), default=1.0)

    @property
    def terms(self) -> dict[LossTerm, frozenset[int] | None]:
        """All different loss terms of the training, and the numbers of the sources that each learns from, with SAMPLES
        where it learns from the student's own; None = from everything."""
        lists = {n: self.losses if source.losses is None else source.losses for n, source in enumerate(self.data)}
        if self.on_policy is not None:
            lists[SAMPLES] = self.losses
        first = [self.losses] if self.losses in lists.values() else []
        terms = dict.fromkeys(term for own in (*first, *lists.values()) for term in own)
        learners = {term: frozenset(number for number, own in lists.items() if term in own) for term in terms}
        return {term: None if len(numbers) == len(lists) else numbers for term, numbers in learners.items()}

    def with_losses(self, changed: Callable[[tuple[LossTerm, ...]], tuple[Any, ...]]) -> Distill:
        """The same with every list of loss terms ``changed``, those of sources too."""
        own = ((source, source.losses) for source in self.data)
        data = (source if losses is None else replace(source, losses=changed(losses)) for source, losses in own)
        return replace(self, losses=changed(self.losses), data=tuple(data))

    def num_tokens_of(self, source: TrainingSource) -> int:
        """Tokens of the budget that are ``source``'s by weight."""
        return math.ceil(self.budget * source.weight / sum(other.weight for other in self.data))

    @property
    def by_source(self) -> bool:
        """Whether a term does not learn from everything, so that rows have to say what their tokens are from."""
        return any(numbers is not None for numbers in self.terms.values())


NUM_TOKENS = 200_000
"""Tokens of a training that names none."""
SMALL = 500_000_000
"""Parameters below which a model is a demonstration: healed on what is bundled, so that it needs no network."""
SAMPLES = -1
"""Number among those of sources for what the student writes itself."""


def sources_that_ask(distill: Distill) -> frozenset[int] | None:
    """Numbers of the sources of whose tokens a loss term asks the teacher; None = of all."""
    terms = distill.terms
    return asked_sources(tuple(terms), tuple(terms.values()), lambda term: needs_teacher([term]))
