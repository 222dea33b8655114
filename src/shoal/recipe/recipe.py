"""What a run is: every setting a frozen dataclass, read from YAML and `section.key=value` overrides.

Pydantic validates at the border only; inside, sections are plain frozen dataclasses, and a function is given its own
section or plain arguments, never the whole recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import Field, ValidationError

from shoal.errors import UserError
from shoal.recipe import distill as training
from shoal.recipe import search
from shoal.recipe.distill import Distill
from shoal.recipe.edits import ComponentPart, Edits, contradictions
from shoal.recipe.recording import Record
from shoal.recipe.search import Search
from shoal.recipe.section import (
    LEAST_ITEMS,
    Data,
    DataSource,
    Dtype,
    Positive,
    RowLength,
    Section,
    Shapes,
    Text,
    adapter,
)
from shoal.recipe.suites import SuiteName, with_suite
from shoal.recipe.yaml import YAMLError, read_yaml
from shoal.redaction import redacted, redacted_arguments

Target = Literal["transformers", "vllm", "llama_cpp"]
"""What a student can be asked to load in."""
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Protocol = Literal["loglikelihood", "continuation", "generation"]
Operator = Literal[ComponentPart, "cumulative"]


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
class Sweeps(Tasks):
    """Which variants of the model are scored on which tasks: what importance by ability and protocol is made of.

    Tasks are named in full, or with ``protocols`` without their protocol's ending.
    """

    limit: Annotated[Positive | None, Shapes.SCORES] = 100
    batch_size: Annotated[Positive, Shapes.NOTHING] = 8
    """Prompts or questions per rank at one time, each under all variants."""
    protocols: Annotated[tuple[Protocol, ...], Shapes.SCORES] = ()
    """Every task under each of these, as far as there are tasks called so; none = tasks are named in full."""
    operators: Annotated[tuple[Operator, ...], Shapes.SCORES] = ("layer",)
    """What is done to the intact model, one unit at a time: a layer, a half of one, a query head or a key-value group
    taken out, or a donor's layer put in; cumulative = ever more layers taken out, by ``order``."""
    order: Annotated[tuple[int, ...] | str, Shapes.SCORES] = "block_influence"
    """Layers that cumulative removals go through, the first to go first, or the metric by which they go through all,
    the least important first."""
    max_removed: Annotated[Positive | None, Shapes.SCORES] = None
    """Most layers that cumulative removals take out; None = all but one."""
    greedy: Annotated[Positive | None, Shapes.SCORES] = None
    """Removals of a task-aware order: at every step the layer goes without which the tasks' mean score is best. Made
    beside the operators, as `task_greedy`; every step costs as much as the operator layer on what is left."""
    greedy_weights: Annotated[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], Shapes.SCORES] = field(
        default_factory=dict
    )
    """Weights of tasks in that mean; none = all tasks count the same."""
    donor: Annotated[Text | None, Shapes.SCORES] = None
    """Model of the same shape whose layers are put in, one at a time: Hub id, local path or demo:<name>."""
    donor_revision: Annotated[str | None, Shapes.SCORES] = None


@dataclass(frozen=True)
class ProbeSet(Section):
    """A labelled text set whose concept is looked for at every depth."""

    path: Text
    """A local .jsonl, .json, .csv or .parquet file, a folder of them, or a Hub data set id."""
    text: str = "text"
    """The column that holds the text."""
    label: str = "label"
    """The column that holds the class: a word, a number, or true and false."""
    split: str = "train"
    name: str | None = None
    """Configuration name of a Hub data set."""
    max_items: Positive = 2000
    """Most items; where there are more, so many are drawn by the seed."""
    max_tokens: Positive = 512
    """Tokens of a longer text that are read: its last ones, since the last one's state is probed."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the items that a probe is scored on."""

    @property
    def source(self) -> DataSource:
        """Where the texts come from."""
        return DataSource(self.path, column=self.text, split=self.split, name=self.name)


@dataclass(frozen=True)
class Measure(Section):
    """How layer importance is measured."""

    data: Annotated[Data, Shapes.IMPORTANCE] = (DataSource("python_docs"),)
    num_tokens: Annotated[Positive, Shapes.IMPORTANCE | Shapes.DIAGNOSTICS] = 20_000
    sequence_length: Annotated[RowLength, Shapes.IMPORTANCE | Shapes.DIAGNOSTICS] = 512
    """Tokens of one row."""
    batch_size: Annotated[Positive, Shapes.NOTHING] = 4
    """Sequences per rank and forward."""
    metrics: Annotated[tuple[str, ...], Shapes.IMPORTANCE] = ("block_influence", "angular")
    num_drop: Annotated[Positive | None, Shapes.IMPORTANCE] = None
    """Removals that greedy metrics make; None = a quarter of the layers."""
    sweep: Sweeps | None = None
    """None = no task is scored."""
    diagnostics: Annotated[bool, Shapes.NOTHING] = False
    """Depth diagnostics too: diagnostics.json."""
    gradient_prompts: Annotated[int, Field(ge=0), Shapes.DIAGNOSTICS] = 0
    """Prompts over which diagnostics take integrated gradients, by far their most expensive part; 0 = none."""
    probes: Annotated[tuple[ProbeSet, ...], Shapes.PROBES] = ()
    """Labelled texts whose classes are looked for after every layer: probes.json."""
    memory_gb: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, Shapes.NOTHING] = None
    """GiB of memory for the weights; where they need more, the model is measured layer by layer from its files. None =
    hold it in memory."""


@dataclass(frozen=True)
class Prune(Section):
    """Which layers go: an explicit list, or how many by which metric."""

    drop: Annotated[tuple[int, ...] | None, Shapes.PLAN] = None
    """Explicit 0-based teacher layers to drop; excludes metric, num_drop, ratio and contiguous."""
    metric: Annotated[str | None, Shapes.PLAN] = None
    """Which column of importance.json chooses: a metric, a greedy order, a swept task, or `ability/protocol`; None =
    block_influence, or angular when contiguous."""
    weights: Annotated[dict[str, Weight], Shapes.PLAN] = field(default_factory=dict)
    """Instead of one metric a mix of columns, by name: the weighted mean of each layer's rank under them, since shares,
    nats and cosines have only ranks in common."""
    num_drop: Annotated[Positive | None, Shapes.PLAN] = None
    """Layers to drop; an order of halves (attention, MLP) takes two halves for each."""
    ratio: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, Shapes.PLAN] = None
    """Share of the layers to drop, rounded down; give this or num_drop."""
    contiguous: Annotated[bool, Shapes.PLAN] = False
    """Drop one run of neighbouring layers instead of the least important ones wherever they are."""
    protect: Annotated[tuple[int | Literal["cornerstone"], ...], Shapes.PLAN] = (0, -1)
    """Layers never dropped; negative counts from the end. `cornerstone` = those whose removal alone takes a swept task
    to chance (less than 0.1 of its score above chance is kept)."""
    spare: Annotated[tuple[Text, ...], Shapes.PLAN] = ()
    """Abilities, swept tasks, or `ability/protocol` on which nothing significant may be spent: layers that are critical
    there stay, and so does every layer with which the summed loss would become significant."""
    edits: Annotated[Edits, Shapes.BY_CONTENT] = ()
    """Other changes of the teacher's layers, see shoal.recipe.edits; a list may stand beside or instead of a drop."""
    proof: Annotated[Literal["auto", "run", "files"], Shapes.NOTHING] = "auto"
    """How the written student is proven: by running it against the teacher, or by comparing files and layers only,
    which needs no memory; auto = run wherever the model fits into memory and can run here."""
    targets: Annotated[tuple[Target, ...], Shapes.NOTHING] = ()
    """Where the student must load and be the same model; a plan for which one of them would not is refused. Without
    any, what each of them would do is logged."""


@dataclass(frozen=True)
class Eval(Tasks):
    """What the models are scored on."""

    suite: Annotated[SuiteName | None, Shapes.BY_CONTENT] = None
    """Tasks and limits by name, see configs/suites: quick (minutes, bundled data), standard or full. Tasks named beside
    it are added, and everything else that is set here wins; limit caps the suite's limits of single tasks too."""
    tasks: Annotated[tuple[str, ...], Shapes.SCORES] = (
        "retrieval_continuation",
        "knowledge_continuation",
        "reasoning_continuation",
    )
    limit: Annotated[Positive | None, Shapes.SCORES] = 200
    perplexity_tokens: Annotated[Positive, Shapes.PERPLEXITY | Shapes.SCORES] = 10_000
    speed: Annotated[bool, Shapes.NOTHING] = True
    """Measure prefill and decode tokens per second, time to the first token and memory of teacher, pruned and
    distilled, interleaved."""
    speed_batch_sizes: Annotated[Annotated[tuple[Positive, ...], Field(min_length=1)] | None, Shapes.SPEED] = None
    """Sequences at once that speed is measured with; None = 1 and 4 on a CPU, 1, 8 and 32 on an accelerator."""


@dataclass(frozen=True)
class Track(Section):
    """Where curves, tables, figures and artifacts go: Weights & Biases."""

    wandb: Literal["online", "offline", "off"] | None = None
    """None = online where an API key is found, else off."""
    project: str = "shoal"
    name: str | None = None
    """Name of the W&B run; None = that of the run directory."""
    tags: tuple[str, ...] = ()
    upload_weights: bool = False
    """Upload student/ and distilled/ as artifacts; otherwise artifacts only say where they lie."""


@dataclass(frozen=True)
class Export(Section):
    """Where the result is published."""

    hub_repo: str | None = None
    """`owner/name` on the Hub to push the distilled checkpoint and its model card to."""
    private: bool = True
    gguf: bool = False
    """Write the result as one GGUF file too, for llama.cpp, in the precision it is stored in."""


@dataclass(frozen=True)
class Recipe(Section):
    """Everything one run is made of."""

    model: Annotated[Text, Shapes.BY_CONTENT]
    """Hub id, local path or demo:<name>."""
    run_dir: Annotated[Text, Shapes.NOTHING]
    seed: Annotated[int, Field(ge=0, lt=2**32), Shapes.NUMBERS | Shapes.ROWS] = 0
    """Seed of everything that is drawn: data, text, probes, examples."""
    revision: Annotated[str | None, Shapes.BY_CONTENT] = None
    """Hub revision of the model."""
    dtype: Annotated[Dtype, Shapes.NUMBERS | Shapes.SIGNALS | Shapes.SPEED] = "auto"
    """Precision in which models are measured, evaluated and used as a frozen teacher; auto = what the device multiplies
    fast in, or what this run directory was begun in; stored = that of the checkpoint."""
    full_size_gflops: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, Shapes.BY_CONTENT] = None
    """GFLOP/s of matrix products over all cores that the sizes of this recipe are meant for. On a slower device there
    are fewer tokens (to measure, write, train and score) and fewer items, in proportion but a fifth at least, so that
    the run takes about as long; log, run.json and report say so. None = sizes are what they say, on every device."""
    attention: Annotated[Literal["sdpa", "eager"], Shapes.NUMBERS | Shapes.SIGNALS | Shapes.SPEED] = "sdpa"
    """Attention kernels. flash_attention_2 is refused: with several rows in a batch its kernels let packed documents
    see each other."""
    trust_remote_code: Annotated[bool, Shapes.NOTHING] = False
    measure: Measure = Measure()
    prune: Prune = Prune()
    record: Record = field(default_factory=Record)
    distill: Distill = field(default_factory=Distill)
    search: Search | None = None
    """What `shoal search` compares; no other verb looks at it."""
    eval: Eval = Eval()
    track: Annotated[Track, Shapes.NOTHING] = Track()
    export: Annotated[Export, Shapes.NOTHING] = Export()


CONFIGS_DIR = Path(__file__).parents[1] / "configs"
if not CONFIGS_DIR.exists():  # editable install through a tree without symlinks
    CONFIGS_DIR = Path(__file__).parents[3] / "configs"


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, further: Callable[[Recipe], Iterable[str]] | None = None
) -> Recipe:
    """The validated recipe at ``path`` with ``section.key=value`` overrides applied.

    A name that is no file is looked up among the shipped recipes, so that `quickstart.yaml` works from any folder.
    ``further`` gives `place: what is wrong` of what a recipe alone cannot tell, to be reported with the rest.

    Raises:
        UserError: naming every problem at once as ``file: key.path: message (got value)``, or with the override that
            has set it instead of the file.
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
    return parse_recipe(raw, source=str(file), overrides=overrides, further=further)


def parse_recipe(
    raw: dict[str, Any],
    *,
    source: str = "recipe",
    overrides: Sequence[str] = (),
    further: Callable[[Recipe], Iterable[str]] | None = None,
) -> Recipe:
    """The recipe that a plain mapping describes; problems are reported as in load_recipe. ``overrides`` are already in
    it."""
    try:
        recipe = adapter(Recipe).validate_python(with_suite(raw))
    except ValidationError as error:
        raise UserError(_blamed(_explain(error.errors()), source, overrides)) from error
    problems = [*_contradictions(recipe), *(further(recipe) if further is not None else ())]
    if problems:
        raise UserError(_blamed(problems, source, overrides))
    return recipe


def _blamed(problems: Sequence[str], source: str, overrides: Sequence[str]) -> str:
    """Every problem after what has set its place: the last override of it or of what it is in, else ``source``."""
    lines = []
    for problem in problems:
        place = problem.partition(":")[0]
        setters = [one for one in overrides if f"{place}.".startswith(f"{one.partition('=')[0]}.")]
        lines.append(f"{_told(setters[-1])}: {problem}" if setters else f"{source}: {problem}")
    return "\n".join(lines)


def _told(override: str) -> str:
    return f"override {redacted_arguments([override])[0]!r}"


def _find_recipe(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a recipe file, {path / 'NAME.yaml'}")
    shipped = CONFIGS_DIR / path.name
    if path.parent in (Path(), Path("configs")) and shipped.is_file():
        return shipped
    names = sorted(p.name for p in CONFIGS_DIR.glob("*.yaml"))
    raise UserError(f"{path}: no such recipe file; shipped recipes are {', '.join(names) or 'none'}")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, leaf = key.split(".")
    if not equals or not all([*sections, leaf]):
        raise UserError(f"{_told(override)}: must have the form section.key=value")
    try:
        value = read_yaml(text)
    except YAMLError as error:
        raise UserError(f"{_told(override)}: the value is not valid YAML: {error}") from error
    node: Any = raw
    for name in sections:
        child = _entry(node, name, override)
        if child is None:
            child = {}
            node[int(name) if isinstance(node, list) else name] = child
        if not isinstance(child, dict | list):
            raise UserError(f"{_told(override)}: {name!r} is {redacted({name: child})[name]!r}, not a section")
        node = child
    _entry(node, leaf, override)
    node[int(leaf) if isinstance(node, list) else leaf] = value


def _entry(node: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """What ``node`` holds under ``name``, for a list a position in it; None where a mapping has no such key."""
    if isinstance(node, dict):
        return node.get(name)
    if not name.isdecimal() or int(name) >= len(node):
        raise UserError(
            f"{_told(override)}: {name!r} is no position in a list of {len(node)} (counted from 0); "
            "give the whole list instead"
        )
    return node[int(name)]


def _explain(problems: Sequence[Any]) -> list[str]:
    """One line per place; the branches of a choice between types are joined with `or`."""
    places: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for problem in problems:
        *parents, last = problem["loc"]
        if problem["type"] == "too_short" and any(_is_inside(other["loc"], problem["loc"]) for other in problems):
            continue  # wrong entries are not counted, so that a list of them alone seems to be empty
        if problem["type"] == "unexpected_keyword_argument":
            real, sections = _walk(parents)
            place = ".".join(map(str, [*real, last]))
            known = [f.name for section in sections for f in dataclasses.fields(section)]
            close = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
            message = "unknown key; " + (
                f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
            )
        else:
            place = ".".join(map(str, _walk(problem["loc"])[0]))
            if problem["type"] in ("missing", "missing_argument"):
                message = f"is required; add it to the file, or to the command as {place}=VALUE"
            elif problem["type"] == "union_tag_not_found":
                kinds = [get_args(get_type_hints(section)["kind"])[0] for section in _walk(problem["loc"])[1]]
                message = f"needs a kind: one of {', '.join(kinds)}"
            elif problem["type"] == "union_tag_invalid":
                place += ".kind"
                kinds, tag = problem["ctx"]["expected_tags"], problem["ctx"]["tag"]
                close = difflib.get_close_matches(tag, re.findall(r"'(.*?)'", kinds), n=1, cutoff=0.6)
                message = f"must be one of {kinds}"  # all of them: the closest in spelling may not be what was meant
                got[place] = f" (got {tag!r}" + (f"; did you mean {close[0]!r}?)" if close else ")")
            else:
                message = _in_our_words(problem["msg"])
                got[place] = f" (got {reprlib.repr(redacted({last: problem['input']})[last])})"
        places.setdefault(place, []).append(message)
    return [f"{place}: {' or '.join(messages)}{got.get(place, '')}" for place, messages in places.items()]


def _is_inside(location: Sequence[int | str], outer: Sequence[int | str]) -> bool:
    return len(location) > len(outer) and tuple(location[: len(outer)]) == tuple(outer)


def _in_our_words(message: str) -> str:
    """Pydantic's message in the words of YAML: its user never heard of a tuple or an instance."""
    message = re.sub(r"^(Input|Value|[Tt]uple|String) should ", "must ", message)
    message = re.sub(r"dictionary or an instance of \w+|valid dictionary", "mapping of settings", message)
    message = re.sub(r" after validation, not \d+", "", message)
    message = re.sub(r", unable to (interpret|parse).*", "", message)
    return message.replace("valid tuple", "list").replace("a valid integer", "a whole number").replace("valid ", "")


def _walk(location: Sequence[int | str]) -> tuple[list[int | str], list[Any]]:
    """``location`` without the names of type branches that pydantic puts into it, and the sections it may end in."""
    sections: list[Any] = [Recipe]
    real: list[int | str] = []
    for part in location:
        if isinstance(part, int):
            real.append(part)
            continue
        hints = [get_type_hints(section, include_extras=True) for section in sections]
        tagged = [section for section, hint in zip(sections, hints, strict=True) if part in get_args(hint.get("kind"))]
        if len(sections) > 1 and tagged:
            sections = tagged
        elif found := [hint[part] for hint in hints if part in hint]:
            real.append(part)
            sections = [section for hint in found for section in _dataclasses_in(hint)]
    return real, sections


def _dataclasses_in(hint: Any) -> list[Any]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [section for argument in get_args(hint) for section in _dataclasses_in(argument)]


def _contradictions(recipe: Recipe) -> list[str]:
    """Rules between settings that single fields cannot express."""
    prune, problems = recipe.prune, _sweep_contradictions(recipe.measure)
    if prune.drop is not None:
        for name in ("metric", "weights", "num_drop", "ratio", "contiguous", "spare"):
            if getattr(prune, name) not in (None, False, {}, ()):
                problems.append(f"prune.{name}: has no effect beside prune.drop; give one of them")
        if "cornerstone" in prune.protect:
            problems.append("prune.protect: cornerstone has no effect beside prune.drop; leave it out")
    elif prune.num_drop is not None and prune.ratio is not None:
        problems.append("prune.ratio: prune.num_drop is given too; give one of them")
    if prune.weights and prune.metric is not None:
        problems.append("prune.weights: prune.metric is given too; give one of them")
    if prune.weights and prune.contiguous:
        problems.append("prune.weights: mixes scores of single layers; set prune.contiguous: false, or leave it out")
    problems += [f"prune.edits.{problem}" for problem in contradictions(prune.edits, prune.drop or ())]
    problems += training.contradictions(recipe.distill)
    if recipe.search is not None:
        problems += search.contradictions(recipe.search, recipe.distill.trainer)
    if recipe.export.hub_repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.export.hub_repo):
        problems.append(f"export.hub_repo: must have the form owner/name (got {recipe.export.hub_repo!r})")
    return problems


def _sweep_contradictions(measure: Measure) -> list[str]:
    sweep, problems = measure.sweep, []
    if sweep is None:
        return problems
    for place, limit in {"limit": sweep.limit, **{f"limits.{name}": own for name, own in sweep.limits.items()}}.items():
        if limit is not None and limit < LEAST_ITEMS and sweep.tasks:
            problems.append(
                f"measure.sweep.{place}: with fewer than {LEAST_ITEMS} items no interval and no test can show an "
                f"effect (got {limit})"
            )
    if not sweep.tasks and not sweep.perplexity_tokens:
        problems.append("measure.sweep: scores nothing; name tasks, or set perplexity_tokens")
    if ("donor" in sweep.operators) != (sweep.donor is not None):
        problems.append(
            "measure.sweep.donor: needs the operator donor, and the operator the donor; give both or none of them"
        )
    if not sweep.operators and sweep.greedy is None:
        problems.append("measure.sweep.operators: is empty; name at least one, or set measure.sweep.greedy")
    if sweep.greedy_weights and sweep.greedy is None:
        problems.append("measure.sweep.greedy_weights: have no effect without measure.sweep.greedy; leave them out")
    if sweep.max_removed is not None and "cumulative" not in sweep.operators:
        problems.append("measure.sweep.max_removed: has no effect without the operator cumulative; leave it out")
    if isinstance(sweep.order, tuple) and "cumulative" not in sweep.operators:
        problems.append("measure.sweep.order: has no effect without the operator cumulative; leave it out")
    return problems
