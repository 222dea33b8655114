"""How a pruned model is distilled from its teacher: the section `distill`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from shoal.errors import UserError
from shoal.recipe.evaluate import Names
from shoal.recipe.losses import ForwardKL, Losses, LossTerm, asked_sources, needs_teacher, temperatures
from shoal.recipe.section import AUTO, DataSource, Dtype, Packing, Positive, RowLength, Section, Shapes, Text, listed_as
from shoal.recipe.trainer_arguments import DEFAULTS, HALVES

Trainable = Literal["all", "layers", "from_first_cut", "near_gaps", "norm_and_head"]
Precision = Literal["auto", "float32", "bf16-mixed", "bf16-true", "fp16-mixed", "fp16-true"]


@dataclass(frozen=True, kw_only=True)
class Generate(Section):
    """How the teacher writes a source: it goes on from openings of its texts, or writes the last assistant's turn of
    its conversations anew."""

    prompt_tokens: Positive = 24
    """Tokens of an opening; of a conversation all before the turn."""
    max_new_tokens: Positive = 232
    """Most tokens that the teacher writes; conversations that leave a row no room for so many are left out."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Temperature of sampling: 1 = the teacher's own distribution; 0 = always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability whose likeliest tokens are drawn from; 1 = all tokens."""
    keep: Literal["all", "correct"] = "all"
    """correct = only turns whose final answer is that of the turn in the data."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Library that runs the teacher; vllm has to be installed, and writes on one rank."""


@dataclass(frozen=True)
class TrainingSource(DataSource):
    """Where training text comes from, and which loss terms learn from it."""

    losses: Annotated[Losses | None, Field(exclude_if=lambda terms: terms is None)] = None
    """What is learnt from the tokens of this source; None = distill.losses. A term's sum is divided by all supervised
    tokens of the step, whichever source it is of: one that learns from few tokens adds little. Sources whose terms ask
    no teacher have rows of their own, which it does not read."""
    generate: Annotated[Generate | None, Field(exclude_if=lambda generate: generate is None)] = None
    """The teacher writes the text before training, as many tokens as the source's share by weight; None = the text as
    it is."""


TrainingData = Annotated[tuple[TrainingSource, ...], listed_as("path"), Field(min_length=1)]
"""One source or a list of them."""


@dataclass(frozen=True)
class Live(Section):
    """The teacher runs in training, beside the student."""

    kind: Annotated[Literal["live"], Shapes.TRAINING] = "live"
    dtype: Annotated[Dtype | None, Shapes.TRAINING] = None
    """Precision of the teacher; None = the recipe's dtype."""
    offload: Annotated[bool, Shapes.NOTHING] = False
    """Keep the teacher's weights in CPU memory and bring them over layer by layer: slower, and a large model less on
    the device. ZeRO 3 shards it instead."""


@dataclass(frozen=True)
class Recorded(Section):
    """What the teacher says of the training rows is written down before training, by `shoal record` or by the training
    itself, and read in training. It is what the loss terms ask: the teacher's distributions at their temperature, which
    has to be one, and the states of layers that hidden_states terms compare with, two bytes per hidden dimension, token
    and layer."""

    kind: Annotated[Literal["recorded"], Shapes.TRAINING] = "recorded"
    path: Annotated[Text | None, Shapes.NOTHING] = None
    """Folder of the files, which several runs can share: never overwritten, and refused where it holds something else.
    None = RUN_DIR/signals, which is made again when it is out of date."""
    top_k: Annotated[Positive, Shapes.SIGNALS | Shapes.TRAINING] = 32
    """Most probable next tokens kept per position, with their log-probabilities; the rest is kept as one sum."""
    prefix: Annotated[bool, Shapes.TRAINING] = False
    """Record the teacher's state below the lowest trained layer too, so that neither model runs what lies under it: a
    number per hidden dimension and token, in the teacher's precision. It serves runs whose plan and trainable leave as
    many layers untouched."""
    backend: Annotated[Literal["transformers", "vllm"], Shapes.SIGNALS | Shapes.TRAINING] = "transformers"
    """Library that runs the teacher; vllm has to be installed, records on one rank, and is refused where it does not
    say what transformers computes."""

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
    """What is scored while the student trains."""

    eval_steps: Annotated[Annotated[float, Field(gt=0, lt=1)] | Positive, Shapes.TRAINING] = 0.25
    """Steps from one scoring to the next, or below 1 their share of all steps; the student is scored before the first
    step and after the last one too."""
    perplexity_tokens: Annotated[int, Field(ge=0), Shapes.TRAINING] = 4096
    """Tokens of eval.perplexity_data; 0 = none."""
    tasks: Annotated[Names, Shapes.TRAINING] = ()
    """lm-eval tasks, one or two per ability; few items, since every scoring costs what they cost."""
    limit: Annotated[Positive, Shapes.TRAINING] = 32
    """Items per task: the first ones that eval.limit would take."""
    metric_for_best_model: Annotated[str | None, Shapes.TRAINING] = None
    """Score, `perplexity` or a task, whose best state becomes distilled/; None = the last state."""

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of all that is scored."""
        return (*(["perplexity"] if self.perplexity_tokens else []), *self.tasks)


@dataclass(frozen=True)
class Lora(Section):
    """Train two small matrices beside each weight instead of the weight (LoRA, Hu et al. 2021, arXiv:2106.09685).

    Their product is merged into the weights when the student is written, so that distilled/ is a plain checkpoint.
    """

    r: Annotated[Positive, Shapes.TRAINING] = 16
    """Rows of the one matrix and columns of the other."""
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False), Shapes.TRAINING] = 32.0
    """The adapters' product is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1), Shapes.TRAINING] = 0.0
    """Share of the adapters' inputs set to zero. The draws differ with the number of ranks, so the curve does too."""
    target_modules: Annotated[Annotated[tuple[Text, ...], Field(min_length=1)] | None, Shapes.TRAINING] = None
    """Linear modules that get an adapter, by the end of their names (`q_proj`, `mlp.down_proj`), in those layers that
    distill.trainable trains; None = all of them there."""
    load_in_4bit: Annotated[bool, Shapes.TRAINING] = False
    """Hold frozen weights of the layers in 4 bits (nf4) while training (QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314); needs bitsandbytes. Adapters are merged into the weights as they were before that."""

    def require_packages(self) -> None:
        """Refuse 4-bit weights without the package that makes them."""
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "distill.lora.load_in_4bit: needs bitsandbytes; run `pip install 'bitsandbytes>=0.50'`, or set it to "
                "false"
            )


@dataclass(frozen=True)
class OnPolicy(Section):
    """In a share of the steps the student's own samples stand in for the data (GKD, arXiv 2306.13649).

    Where a text ends in three or more copies of at most 64 tokens, what stands behind the second copy is not learnt, if
    the teacher goes along: its mean log-probability of these tokens is above log 0.5.
    """

    share: Annotated[float, Field(gt=0, le=1), Shapes.TRAINING] = 0.5
    """Probability that a step trains on samples, GKD's lambda; 1 = in every step."""
    start: Annotated[float, Field(ge=0, lt=1), Shapes.TRAINING] = 0.3
    """Share of all steps that come before the first on-policy one: a student that cannot write yet wastes its time."""
    prompt_tokens: Annotated[Positive, Shapes.TRAINING] = 24
    """Tokens of running text that the student goes on from, or as many as max_new_tokens leave of a row; of a
    conversation it gets all up to an assistant's turn."""
    max_new_tokens: Annotated[Positive, Shapes.TRAINING] = 128
    """Most tokens that the student writes after a prompt."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), Shapes.TRAINING] = 1.0
    """Temperature of sampling, not of the loss; 0 = always the likeliest token."""


@dataclass(frozen=True)
class Distill(Section):
    """How the pruned model is distilled from its teacher."""

    data: Annotated[TrainingData, Shapes.ROWS | Shapes.TRAINING] = (TrainingSource(AUTO),)
    """Text that the student is trained on, and images with questions and answers."""
    num_tokens: Annotated[Positive, Shapes.TRAINING] = 200_000
    """Training budget over all ranks, in tokens; sets the number of steps unless trainer.max_steps does."""
    sequence_length: Annotated[RowLength, Shapes.ROWS | Shapes.TRAINING] = 512
    """Tokens of one row."""
    batch_size: Annotated[Positive | None, Shapes.TRAINING] = None
    """Rows of one optimizer step over all ranks, so that a run means the same, and goes on, on any number of ranks;
    gradients are accumulated accordingly. None = what one step of trainer.per_device_train_batch_size comes to."""
    packing: Annotated[Packing, Shapes.ROWS | Shapes.TRAINING] = "wrapped"
    """wrapped: what does not fit a row goes on in the next as a document of its own. bfd: documents stay whole, what
    is longer than a row is cut, and rows are padded."""
    losses: Annotated[Losses, Shapes.TRAINING] = (ForwardKL(),)
    """What the student is to match: the sum of these terms, each times its weight; learnt from all sources without
    losses of their own, and from the student's own samples."""
    trainable: Annotated[Trainable, Shapes.TRAINING] = "all"
    """Weights that are trained: everything; all but embeddings and head; the layers from the first cut up, with the
    final norm (an edited layer counts as a cut); those next to a gap; or final norm and head. What lies below is still
    the teacher, so there it is computed once for both and needs neither a backward pass nor optimizer state."""
    lora: Annotated[Lora | None, Shapes.TRAINING] = None
    """Adapters beside the weights of the trained layers instead of these weights; None = train the weights."""
    teacher: Annotated[TeacherSource, Shapes.TRAINING] = Live()
    """Where the teacher's signals come from: `live`, it runs in training; or `recorded`, it has spoken before."""
    on_policy: Annotated[OnPolicy | None, Shapes.TRAINING] = None
    """Steps in which the student learns from what it writes itself; None = none."""
    watch: Annotated[Watch | None, Shapes.TRAINING] = Watch()
    """Scoring while training, which shapes the result where it chooses the best state; None, or one that scores
    nothing = none."""
    stop_on_spike: Annotated[Annotated[float, Field(gt=1, allow_inf_nan=False)] | None, Shapes.NOTHING] = 10.0
    """A step whose loss is more than so many times the median of the steps before ends the training, its batch kept for
    a look; None = only a loss that is no number does."""
    precision: Annotated[Precision, Shapes.TRAINING] = "auto"
    """float32; float32 weights under autocast to bfloat16 (bf16-mixed) or float16 (fp16-mixed, with loss scaling, on
    accelerators); or weights of two bytes, of which the optimizer steps float32 copies and to which residual stream and
    norms are rounded too: bf16-true, whose gradients add up in float32, under ZeRO 1 to 3, and fp16-true. auto = what
    the DeepSpeed configuration says, else float32 weights and what the device multiplies fast in, or what this training
    was begun in."""
    profile: Annotated[tuple[Positive, Positive] | None, Shapes.NOTHING] = None
    """First and last optimizer step that torch.profiler traces, counted from 1, into RUN_DIR/profile: a file of every
    rank, for chrome://tracing or Perfetto. The first steps of a run are slower than others. None = none."""
    trainer: Annotated[dict[str, Any], Shapes.BY_CONTENT, Field(json_schema_extra={"default": DEFAULTS})] = field(
        default_factory=dict
    )
    """Arguments of transformers.TrainingArguments; these defaults are shoal's, what is not said stays as they are. All
    but those of saving, logging and loading data shape the training. use_liger_kernel runs RMS norms, gated MLPs and
    rotary embedding of both models by Liger's kernels, on GPUs. torch_compile compiles the decoder layers of both
    models, the loss at the head and, on a GPU, the step that writes on-policy samples; what cannot be compiled runs as
    it is, after a warning. ddp_timeout is how long a collective waits for a late rank. bf16 and fp16 are precision's
    bf16-mixed and fp16-mixed."""
    deepspeed: Annotated[str | dict[str, Any] | None, Shapes.BY_CONTENT] = "zero2"
    """DeepSpeed configuration: a name in configs/deepspeed (zero0 to zero3, zero2_offload, zero3_offload,
    zero3_nodes), a path, or
    the mapping itself; None = ZeRO 0."""

    def __post_init__(self) -> None:
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile ends before it begins (got {list(self.profile)})")
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
        return math.ceil(self.num_tokens * source.weight / sum(other.weight for other in self.data))

    @property
    def by_source(self) -> bool:
        """Whether a term does not learn from everything, so that rows have to say what their tokens are from."""
        return any(numbers is not None for numbers in self.terms.values())


SAMPLES = -1
"""Number among those of sources for what the student writes itself."""


def sources_that_ask(distill: Distill) -> frozenset[int] | None:
    """Numbers of the sources of whose tokens a loss term asks the teacher; None = of all."""
    terms = distill.terms
    return asked_sources(tuple(terms), tuple(terms.values()), lambda term: needs_teacher([term]))
