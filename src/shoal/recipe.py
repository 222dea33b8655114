"""What a run is: every setting a frozen dataclass, read from YAML and `section.key=value` overrides.

Pydantic validates at the border only; inside, sections are plain frozen dataclasses, and a function is given its own
section or plain arguments, never the whole recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from shoal.errors import UserError
from shoal.strict_yaml import YAMLError, read_yaml

Protocol = Literal["loglikelihood", "continuation", "generation"]
Positive = Annotated[int, Field(gt=0)]
RowLength = Annotated[int, Field(ge=2)]
"""Tokens of one row; a row of one token holds nothing to predict."""
Text = Annotated[str, Field(min_length=1)]


class Section:
    """Refuses unknown keys: without this TypeAdapter would ignore a misspelt one and train with the default."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=False)


@dataclass(frozen=True)
class DataSource(Section):
    """Where text comes from, and how much of it."""

    path: Text
    """A bundled name (see shoal.data.BUNDLED), a local .jsonl, .json, .txt, .csv or .parquet file, a folder of them, or
    a Hub data set id. A .txt file is one document. Of a folder those files are read that are named after ``split``,
    else all."""
    column: str = "text"
    """The column that holds the text."""
    split: str = "train"
    name: str | None = None
    """Configuration name of a Hub data set."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the token budget, relative to the other sources."""


def _as_sources(value: Any) -> Any:
    listed = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in listed]


Data = Annotated[tuple[DataSource, ...], BeforeValidator(_as_sources), Field(min_length=1)]
"""One source or a list of them; a plain string is short for {path: string}."""


@dataclass(frozen=True)
class Measure(Section):
    """How layer importance is measured."""

    data: Data = (DataSource("python_docs"),)
    num_tokens: Positive = 20_000
    sequence_length: RowLength = 512
    batch_size: Positive = 4
    """Sequences per rank and forward."""
    metrics: tuple[str, ...] = ("block_influence", "angular")


@dataclass(frozen=True)
class Prune(Section):
    """Which layers go: an explicit list, or how many by which metric."""

    drop: tuple[int, ...] | None = None
    """Explicit 0-based teacher layers to drop; excludes metric, num_drop, ratio and contiguous."""
    metric: str | None = None
    """Which column of importance.json chooses; None = block_influence, or angular when contiguous."""
    num_drop: Positive | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the layers to drop, rounded down; give this or num_drop."""
    contiguous: bool = False
    """Drop one run of neighbouring layers instead of the least important ones wherever they are."""
    protect: tuple[int, ...] = (0, -1)
    """Layers never dropped; negative counts from the end."""


@dataclass(frozen=True)
class LossTerm(Section):
    """One term of the distillation loss."""

    kind: Literal["forward_kl", "cross_entropy"]
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Softens teacher and student alike; the term is scaled by its square. Must stay 1 for cross_entropy."""


@dataclass(frozen=True)
class Distill(Section):
    """How the cut model is trained on the full one."""

    data: Data = (DataSource("python_docs"),)
    num_tokens: Positive = 200_000
    """Training budget over all ranks, in tokens; sets the number of steps unless trainer.max_steps does."""
    sequence_length: RowLength = 512
    losses: tuple[LossTerm, ...] = (LossTerm("forward_kl"),)
    trainable: Literal["all", "layers", "from_first_cut"] = "all"
    """What is trained: everything; all but embeddings and head; or only the layers from the first cut up, with the
    final norm. What lies below the first cut is still the teacher, so there it is computed once for both and needs
    neither a backward pass nor optimizer state."""
    precision: Literal["float32", "bfloat16"] | None = None
    """bfloat16 = fp32 weights under bf16 autocast. None = what the DeepSpeed configuration says, else bfloat16."""
    head_chunk: Positive = 256
    """Tokens whose full-vocabulary logits exist at one time."""
    teacher_text_tokens: Positive = 10_000
    """How many tokens the teacher writes where data names the source `teacher_text`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Handed to transformers.TrainingArguments untouched."""
    deepspeed: str | dict[str, Any] | None = "deepspeed/zero2.json"
    """DeepSpeed configuration: a path, a name under configs/, or the mapping itself."""
    num_ranks: Positive | None = None
    """Processes that `shoal run` and `shoal distill` start on this machine; None = one per GPU, one on CPU."""
    timeout_s: Positive = 1800
    """Seconds a collective may wait for a late rank before the job ends."""


@dataclass(frozen=True)
class Eval(Section):
    """What the models are scored on."""

    tasks: tuple[str, ...] = ("retrieval_continuation", "knowledge_continuation", "reasoning_continuation")
    """lm-eval task or group names: shoal's own (configs/tasks) and every task lm-eval ships."""
    limit: Positive | None = 200
    """Items per task; None = all."""
    limits: dict[str, Positive] = field(default_factory=dict)
    """Items of single tasks that get another number, by task name."""
    batch_size: Positive = 16
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """None = each task's own default."""
    include_path: str | None = None
    """A further folder of task YAMLs."""
    perplexity_data: Data = (DataSource("python_docs_heldout"),)
    perplexity_tokens: Positive = 10_000
    sequence_length: RowLength = 512
    """Window of the perplexity measurement, in tokens."""
    speed: bool = True
    """Measure prefill and decode tokens per second of teacher, pruned and distilled, interleaved."""


@dataclass(frozen=True)
class Track(Section):
    """Where training curves go: Weights & Biases."""

    wandb: Literal["online", "offline", "off"] | None = None
    """None = online where an API key is found, else offline."""
    project: str = "shoal"
    name: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Export(Section):
    """Where the result is published."""

    hub_repo: str | None = None
    """`owner/name` on the Hub to push the distilled checkpoint and its model card to."""
    private: bool = True
    gguf: bool = False
    """Not available yet: true is refused."""


@dataclass(frozen=True)
class Recipe(Section):
    """Everything one run is made of."""

    model: Text
    """Hub id, local path or demo:<name>."""
    run_dir: Text
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    revision: str | None = None
    """Hub revision of the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision in which models are measured, evaluated and used as a frozen teacher; auto = as stored."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """flash_attention_2 is refused: with several rows in a batch its kernels let packed documents see each other."""
    trust_remote_code: bool = False
    measure: Measure = Measure()
    prune: Prune = Prune()
    distill: Distill = Distill()
    eval: Eval = Eval()
    track: Track = Track()
    export: Export = Export()


CONFIGS_DIR = Path(__file__).parent / "configs"
if not CONFIGS_DIR.exists():  # editable install through a tree without symlinks
    CONFIGS_DIR = Path(__file__).parents[2] / "configs"


REFUSED_TRAINER_KEYS = {
    "bf16": "is set by distill.precision; use that",
    "fp16": "is set by distill.precision or the DeepSpeed configuration; use those",
    "average_tokens_across_devices": "the loss is always averaged over the tokens of all ranks; leave it out",
    "label_smoothing_factor": "would have no effect, the loss is distill.losses; leave it out",
    "ignore_data_skip": "would train the same text again after a resume; leave it out",
    "auto_find_batch_size": "would change the batch, and with it the curve, in the middle of a run; leave it out",
    "save_only_model": "would make checkpoints that cannot be resumed; leave it out",
    "load_best_model_at_end": "there is no evaluation during training yet; leave it out",
    "eval_strategy": "there is no evaluation during training yet; use `shoal eval`",
    "do_eval": "there is no evaluation during training yet; use `shoal eval`",
    "push_to_hub": "is done by export.hub_repo; use that",
    "hub_token": "secrets do not belong in a recipe; run `hf auth login`",
    "use_liger_kernel": "would replace the forward that holds the distillation loss; leave it out",
}
"""Training arguments that would be wrong, ignored or leaked here."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe at ``path`` with ``section.key=value`` overrides applied.

    A name that is no file is looked up among the shipped recipes, so that `quickstart.yaml` works from any folder.

    Raises:
        UserError: naming every problem at once as ``file: key.path: message (got value)``.
    """
    file = _find_recipe(Path(path))
    try:
        raw = read_yaml(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); choose a file you may read") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: must be a mapping of settings, got {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(file))


def parse_recipe(raw: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """The recipe that a plain mapping describes; problems are reported as in load_recipe."""
    try:
        recipe = TypeAdapter(Recipe).validate_python(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {line}" for line in _explain(error.errors()))) from error
    problems = _contradictions(recipe)
    if problems:
        raise UserError("\n".join(f"{source}: {line}" for line in problems))
    return recipe


def as_dict(section: Any) -> dict[str, Any]:
    """A section (or the recipe) as plain JSON-ready values."""
    return TypeAdapter(type(section)).dump_python(section, mode="json")


def _find_recipe(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = CONFIGS_DIR / path.name
    if path.parent in (Path(), Path("configs")) and shipped.is_file():
        return shipped
    names = sorted(p.name for p in CONFIGS_DIR.glob("*.yaml"))
    raise UserError(f"{path}: no such recipe file; shipped recipes are {', '.join(names) or 'none'}")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, leaf = key.split(".")
    if not equals or not all([*sections, leaf]):
        raise UserError(f"override {override!r}: must have the form section.key=value")
    try:
        value = read_yaml(text)
    except YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = raw
    for name in sections:
        child = _entry(node, name, override)
        if child is None:
            child = {}
            node[int(name) if isinstance(node, list) else name] = child
        if not isinstance(child, dict | list):
            raise UserError(f"override {override!r}: {name!r} is {child!r}, not a section")
        node = child
    _entry(node, leaf, override)
    node[int(leaf) if isinstance(node, list) else leaf] = value


def _entry(node: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """What ``node`` holds under ``name``, for a list a position in it; None where a mapping has no such key."""
    if isinstance(node, dict):
        return node.get(name)
    if not name.isdecimal() or int(name) >= len(node):
        raise UserError(
            f"override {override!r}: {name!r} is no position in a list of {len(node)} (counted from 0); "
            "give the whole list instead"
        )
    return node[int(name)]


def _explain(problems: Sequence[Any]) -> list[str]:
    """One line per place; the branches of a choice between types are joined with `or`."""
    places: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for problem in problems:
        location, unknown = problem["loc"], problem["type"] == "unexpected_keyword_argument"
        if not unknown:
            location = _real_location(location)
        place = ".".join(map(str, location))
        if unknown:
            known = _known_keys(location[:-1])
            close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            message = "unknown key; " + (
                f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
            )
        elif problem["type"] in ("missing", "missing_argument"):
            message = f"is required; add it to the file, or to the command as {place}=VALUE"
        else:
            message = _in_our_words(problem["msg"])
            got[place] = f" (got {reprlib.repr(problem['input'])})"
        places.setdefault(place, []).append(message)
    return [f"{place}: {' or '.join(messages)}{got.get(place, '')}" for place, messages in places.items()]


def _in_our_words(message: str) -> str:
    """Pydantic's message in the words of YAML: its user never heard of a tuple or an instance."""
    message = re.sub(r"^(Input|Value|[Tt]uple|String) should ", "must ", message)
    message = re.sub(r"dictionary or an instance of \w+|valid dictionary", "mapping of settings", message)
    message = re.sub(r" after validation, not 0", "", message)
    message = re.sub(r", unable to (interpret|parse).*", "", message)
    return message.replace("valid tuple", "list").replace("a valid integer", "a whole number").replace("valid ", "")


def _real_location(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """``location`` without the names of type branches that pydantic puts into it."""
    section: Any = Recipe
    real: list[int | str] = []
    for part in location:
        if isinstance(part, str):
            hint = get_type_hints(section).get(part) if section is not None else None
            if hint is None:
                continue
            section = _dataclass_in(hint)
        real.append(part)
    return tuple(real)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at ``location``, by walking the dataclasses along it."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, str):
            section = _dataclass_in(get_type_hints(section)[part])
    return [f.name for f in dataclasses.fields(section)]


def _dataclass_in(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return hint
    for argument in getattr(hint, "__args__", ()):
        if (found := _dataclass_in(argument)) is not None:
            return found
    return None


def _contradictions(recipe: Recipe) -> list[str]:
    """Rules between settings that single fields cannot express."""
    prune, problems = recipe.prune, []
    if prune.drop is not None:
        for name in ("metric", "num_drop", "ratio"):
            if getattr(prune, name) is not None:
                problems.append(f"prune.{name}: has no effect beside prune.drop; give one of them")
        if prune.contiguous:
            problems.append("prune.contiguous: has no effect beside prune.drop; give one of them")
    elif prune.num_drop is not None and prune.ratio is not None:
        problems.append("prune.ratio: prune.num_drop is given too; give one of them")
    for index, term in enumerate(recipe.distill.losses):
        if term.kind == "cross_entropy" and term.temperature != 1.0:
            problems.append(
                f"distill.losses.{index}.temperature: cross_entropy has none; leave it at 1 (got {term.temperature})"
            )
    if not any(term.weight > 0 for term in recipe.distill.losses):
        problems.append("distill.losses: every weight is 0, nothing would be trained; give one a weight above 0")
    for key, reason in REFUSED_TRAINER_KEYS.items():
        if key in recipe.distill.trainer:
            problems.append(f"distill.trainer.{key}: {reason}")
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (recipe.distill.trainer.get(key) or {}).get("use_reentrant"):
            problems.append(
                f"distill.trainer.{key}: use_reentrant: true loses gradients above frozen layers; set it to false"
            )
    for key in ("output_dir", "deepspeed", "seed", "run_name", "resume_from_checkpoint"):
        if key in recipe.distill.trainer:
            where = {
                "output_dir": "run_dir",
                "deepspeed": "distill.deepspeed",
                "seed": "seed",
                "run_name": "track.name",
            }
            problems.append(
                f"distill.trainer.{key}: is set by shoal; use {where.get(key, 'the same command again')} instead"
            )
    if recipe.export.gguf:
        problems.append(
            "export.gguf: is not available yet; set it to false and convert distilled/ with llama.cpp's tools"
        )
    if recipe.export.hub_repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.export.hub_repo):
        problems.append(f"export.hub_repo: must have the form owner/name (got {recipe.export.hub_repo!r})")
    return problems
