"""One recipe in its run directory, and what every stage asks of it.

Every stage does the same three things: works out the inputs that identify its result, returns at once when that result
is there already, and otherwise makes it, after making sure of what it needs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from shoal.artifacts.importance import Importance
from shoal.artifacts.training import Training
from shoal.atomic_files import make_folder, only_process, write_json
from shoal.compress.surgery.quantised import without_quantization
from shoal.data.default_text import PUBLIC_TASKS, TRAINING, DefaultText, default_text
from shoal.errors import UserError
from shoal.eval.report.run import read_story
from shoal.formatting import duration_text
from shoal.machine import DTYPES, device_name, fast_dtype, ranks_to_start
from shoal.model_names import refuse_no_model
from shoal.models.anatomy import image_layers, require_positions, text_config
from shoal.models.attention import DENSE, Chosen, choose_attention
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_config, load_tokenizer, loaded_dtype, num_parameters, reads_images, without_data
from shoal.models.resolve import find_config, resolve_model
from shoal.progress import doing
from shoal.ranks import is_main, world_size
from shoal.recipe.distill import Live, Precision
from shoal.recipe.evaluate import Eval
from shoal.recipe.measure import num_removals, scored_by
from shoal.recipe.prune import CutByScore, Prune
from shoal.recipe.recipe import Recipe
from shoal.recipe.remembered import FILE as RECIPE
from shoal.recipe.remembered import LOCK, memory_in, remember
from shoal.recipe.section import AUTO, as_dict
from shoal.recipe.trainer_arguments import computed_in, precisions_said, read_deepspeed, trained_in
from shoal.redaction import redacted
from shoal.runtime import agreed, barrier, check_device, device, environment, loaded_kernels, warn_of_versions

from ..early.run_directory import FILES, inputs_of
from .launch import STARTED

log = logging.getLogger(__name__)

ATTENTION = ("flash", "sdpa", "eager")

STORY = "run.json"
OFFLOADED = "offloaded-"
"""First letters of folders of weights that wait on disk while a rank measures."""
LOCK_WAIT_S = 30
SHARES = 10
"""Steps in which a recipe's sizes follow the machine: two are the smallest share, with less there would be nothing
to see, and a time that is worked out again comes to the same."""
ITEMS = 60
"""Items of a task that max_minutes leaves, if the recipe asks for as many."""


@dataclass(frozen=True)
class Numerics:
    """What a run computes in and with."""

    dtype: str
    """Precision in which models are measured, evaluated and used as a teacher."""
    precision: str
    """Precision in which the student is trained, a word of distill.precision and never auto."""
    reason: str
    """Reason for these precisions, in a sentence."""
    device: str
    """Name that the manufacturer gives the device."""
    max_minutes: float | None = None
    """Minutes that the recipe gives the run, and that ``size`` follows; None too where results are only read."""
    size: float = 1.0
    """Share of the recipe's sizes that is left."""
    size_reason: str = ""
    """Reason for a share below 1, in a sentence."""
    attention: str = "sdpa"
    """Kernels of attention, never auto."""
    attention_reason: str = ""
    """Reason for these kernels, in a sentence."""
    text: str | None = None
    """Which text the recipe's `auto` stands for; None = it names its text."""
    text_reason: str = ""
    """Reason for this text, in a sentence."""
    num_tokens: int | None = None
    """Tokens of this text that train the model in about an hour here; None = the recipe names its text."""


@dataclass(frozen=True)
class Run:
    """One recipe in its run directory. `open_run` settles what the recipe leaves to the machine."""

    recipe: Recipe
    numerics: Numerics | None = None
    """None = the recipe leaves nothing open, and nobody has asked why."""
    memory: str | None = None
    """Text of recipe.yaml that the run directory keeps from now on (shoal.recipe.remembered); None = nothing is."""
    force: bool = False
    """Go on although the estimate says that memory or disk will not do."""

    @property
    def dir(self) -> Path:
        """The run directory."""
        return Path(self.recipe.run_dir).expanduser()

    @cached_property
    def teacher(self) -> Path:
        """The teacher's local folder."""
        return resolved(self.recipe.model, self.recipe.revision)

    @cached_property
    def teacher_fingerprint(self) -> str:
        return model_fingerprint(self.teacher)

    @property
    def prune(self) -> Prune:
        """What is cut: an automatic choice never takes a layer that reads the image, of which text says nothing."""
        prune, config = self.recipe.prune, self.config()
        fed = image_layers(config) if reads_images(config) else ()
        return replace(prune, protect=(*prune.protect, *fed)) if isinstance(prune, CutByScore) else prune

    @property
    def swept(self) -> Eval | None:
        """How variants of the teacher are scored; None where no task is swept."""
        sweep = self.recipe.measure.sweep
        return sweep and scored_by(sweep, self.recipe.eval)

    @property
    def num_removals(self) -> int:
        """Layers that greedy metrics remove."""
        return num_removals(self.recipe.prune, self.num_layers)

    @property
    def num_layers(self) -> int:
        """Layers of the teacher."""
        return text_config(self.config()).num_hidden_layers

    def config(self) -> PreTrainedConfig:
        """The teacher's configuration, a new one every time."""
        return load_config(self.teacher, trust_remote_code=self.recipe.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, a new one every time."""
        return load_tokenizer(self.teacher, trust_remote_code=self.recipe.trust_remote_code)

    def load_args(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "dtype": recipe.dtype,
            "attention": recipe.attn_implementation,
            "trust_remote_code": recipe.trust_remote_code,
            "hub_kernels": recipe.hub_kernels,
        }


def open_run(recipe: Recipe, *, memory: str | None = None, computes: bool = True) -> Run:
    """The run of ``recipe`` in which no precision is `fast` or `auto` any more, nor its attention. In a process group
    every rank calls this, and all compute in what rank 0 finds. ``memory``: as in Run. ``computes``: False = results
    are read and no model runs, wherever that may be.

    A run directory goes on in what it was begun in, so that a run may move to another machine. Otherwise the device is
    asked. A precision that the recipe names is kept; one that is much slower here than another is warned of.

    Raises:
        UserError: a device or attention that is not possible here, or as find_config.
    """
    if computes:
        check_device(recipe.device)
    numerics = agreed(lambda: _numerics(recipe, computes=computes))
    log.info("precision: %s, training in %s (%s)", numerics.dtype, numerics.precision, numerics.reason)
    if numerics.attention != recipe.attn_implementation:
        log.info("attention: %s (%s)", numerics.attention, numerics.attention_reason)
    if computes and numerics.attention != "flash" and device().type == "cuda" and STARTED not in os.environ:
        told = "attention: %s uses masks for packed rows; a training step takes about %s times that with flash (%s)"
        log.warning(told, numerics.attention, DENSE, numerics.attention_reason)
    teacher = recipe.distill.teacher
    if isinstance(teacher, Live) and teacher.dtype == "fast":
        teacher = replace(teacher, dtype=numerics.dtype)
    distill = replace(recipe.distill, precision=numerics.precision, teacher=teacher)
    settled = replace(
        recipe, dtype=numerics.dtype, attn_implementation=numerics.attention, distill=distill, max_minutes=None
    )
    story = agreed(lambda: read_story(Path(recipe.run_dir).expanduser()))  # refuses a damaged one, whoever asks
    begun = story.get("numerics") or {}
    if computes and is_main():
        warn_of_versions(recipe.run_dir, story.get("environment") or {})
    is_open = any(source.path == AUTO for source in (*recipe.measure.data, *recipe.distill.data))
    is_begun = any((Path(recipe.run_dir).expanduser() / name).is_file() for name in (Importance.FILE, Training.FILE))
    if is_open and (computes or is_begun or begun.get("text")):  # a report that is made of nothing decides nothing
        text, num_tokens = agreed(lambda: _text(recipe, begun))
        numerics = replace(numerics, text=text.kind, text_reason=text.reason, num_tokens=num_tokens)
        log.info("text: %s (%s)", ", ".join(source.path for source in text.of(recipe.distill.data)), text.reason)
        settled = _with_text(settled, text, num_tokens)
    settled = replace(settled, distill=replace(settled.distill, num_tokens=settled.distill.budget))
    if (minutes := recipe.max_minutes) is not None and (computes or begun.get("max_minutes") == minutes):
        size, reason = _size(Run(settled), minutes, begun)
        numerics = replace(numerics, max_minutes=minutes, size=size, size_reason=reason)
        if reason:
            log.info("sizes: %s", reason)
        settled = scaled(settled, size)
    return Run(settled, numerics, memory)


def _text(recipe: Recipe, begun: dict[str, Any]) -> tuple[DefaultText, int | None]:
    """Which text stands for `auto`, and how many tokens of it are an hour's training, here or where the run directory
    was begun."""
    from shoal.train.preflight.throughput import machine_rate

    if begun.get("text") in TRAINING:
        return DefaultText(begun["text"], "as stored in this run directory"), begun.get("num_tokens")
    with doing("checking whether the Hub has text"):
        config = find_config(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        text = default_text(parameters := num_parameters(without_data(without_quantization(config)[0])))
    rate = machine_rate(world_size() if "LOCAL_RANK" in os.environ else ranks_to_start(recipe.num_processes))
    is_doubled = text.kind == "public" and recipe.eval.control is not False
    return text, text.num_tokens(parameters, rate, control=is_doubled)


def _with_text(recipe: Recipe, text: DefaultText, num_tokens: int | None) -> Recipe:
    """``recipe`` with ``text`` in place of `auto`. What it leaves out, if all its training text is `auto`, is as
    `shoal init` proposes: ``num_tokens``, and with public text tasks and a control."""
    measure, distill, scores = recipe.measure, recipe.distill, recipe.eval
    if all(source.path == AUTO for source in distill.data):
        distill = replace(distill, num_tokens=distill.num_tokens or num_tokens)
        if text.kind == "public":
            tasks = PUBLIC_TASKS if scores.tasks is Eval.tasks else scores.tasks  # the default, and no equal list
            scores = replace(scores, tasks=tasks, control=True if scores.control is None else scores.control)
        twice = ", once more for the control; eval.control=false trains none" if scores.control else ""
        log.info("training: %s tokens%s", f"{distill.budget:,}", twice)
    measure, distill = (replace(part, data=text.of(part.data)) for part in (measure, distill))
    return replace(recipe, measure=measure, distill=distill, eval=scores)


def scaled(recipe: Recipe, share: float) -> Recipe:
    """``recipe`` with ``share`` of its tokens and of the items of each task, rounded up. Of items at least ITEMS stay,
    since a task of fewer shows no change that is worth a table's row."""

    def fewer(count: int) -> int:
        return math.ceil(share * count)

    def fewer_items(count: int) -> int:
        return max(fewer(count), min(ITEMS, count))

    measure, distill, scores, watch = recipe.measure, recipe.distill, recipe.eval, recipe.distill.watch
    watch = watch and replace(watch, perplexity_tokens=fewer(watch.perplexity_tokens))
    if isinstance(limit := scores.limit, dict):
        limit = {task: number and fewer_items(number) for task, number in limit.items()}
    elif limit:
        limit = fewer_items(limit)
    return replace(
        recipe,
        measure=replace(measure, num_tokens=fewer(measure.num_tokens)),
        distill=replace(distill, num_tokens=fewer(distill.budget), watch=watch),
        eval=replace(scores, limit=limit, perplexity_tokens=fewer(scores.perplexity_tokens)),
    )


def _size(run: Run, max_minutes: float, begun: dict[str, Any]) -> tuple[float, str]:
    """The share of the recipe's sizes for which there is time on this machine, or was on the one that began the run
    directory, and why. Every rank calls this, as stages ask each other what is there."""
    if begun.get("max_minutes") == max_minutes and "size" in begun:
        return float(begun["size"]), str(begun.get("size_reason", ""))
    from shoal.train.preflight.memory import NotEstimated

    from .pace import run_seconds

    limit, least = 60 * max_minutes, 2 / SHARES
    try:
        with doing("estimating how long the run takes"):
            own = run_seconds(run, Run(scaled(run.recipe, least)))
        seconds, fewest = agreed(lambda: own)
    except NotEstimated as error:
        return 1.0, f"max_minutes has no effect: {error}"
    if seconds <= 1.05 * limit:
        return 1.0, ""
    # a line between both ends lies above the time, which stops falling with the items
    share = least + (1 - least) * max(0.0, limit - fewest) / max(seconds - fewest, 1e-9)
    share = math.floor(SHARES * share + 1e-9) / SHARES
    taken = fewest + (seconds - fewest) * (share - least) / (1 - least)
    return share, (
        f"{share:.0%} of this recipe's tokens and at least {ITEMS} items of each task, about {duration_text(taken)} if "
        f"nothing else runs; all of them would take {duration_text(seconds)} on {device_name(device())}, more than "
        f"max_minutes = {max_minutes:g}; max_minutes=null runs the whole recipe"
    )


def _numerics(recipe: Recipe, *, computes: bool) -> Numerics:
    own_device, folder = device(), Path(recipe.run_dir).expanduser()
    choice, name = fast_dtype(own_device), device_name(own_device)
    dtype, precision = recipe.dtype, recipe.distill.precision
    reasons = []
    if dtype == "fast":
        dtype, source = _begun_in(folder, "dtype") or (choice.dtype, None)
        reasons.append(source or choice.reason)
    config = read_deepspeed(recipe.distill.deepspeed)
    if precision == "auto" and (said := precisions_said(config)):
        precision = said[0]
        reasons.append("set by distill.deepspeed")
    elif precision == "auto":
        fastest, why = trained_in(config, choice.dtype), choice.reason
        if computed_in(fastest) != choice.dtype:
            why = f"{why}; {choice.dtype} works only under ZeRO 0, distill.deepspeed=zero0"
        precision, source = _begun_in(folder, "distill.precision", get_args(Precision)) or (fastest, None)
        reasons.append(source or why)
    slow = [
        value
        for value in (recipe.dtype, recipe.distill.precision)
        if value in DTYPES[1:] or computed_in(value) in DTYPES[1:]
    ]
    if slow and choice.dtype == "float32":
        log.warning("%s: %s; remove dtype and distill.precision from the recipe", " and ".join(slow), choice.reason)
    reason = "; ".join(dict.fromkeys(reasons)) or "set by the recipe"
    chosen = _attention(recipe, dtype, precision, computes=computes)
    return Numerics(dtype, precision, reason, name, attention=chosen.attention, attention_reason=chosen.reason)


def _attention(recipe: Recipe, dtype: str, precision: str, *, computes: bool) -> Chosen:
    """The kernels of attention, for models that are run in ``dtype`` and trained in ``precision``."""
    wanted, begun = recipe.attn_implementation, None
    if wanted == "auto" and (begun := _begun_in(Path(recipe.run_dir).expanduser(), "attention", ATTENTION)):
        wanted = begun[0]
    if wanted in ("sdpa", "eager") or (wanted != "auto" and not computes):
        chosen = Chosen(wanted, "set by the recipe")
    else:
        config = find_config(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        halves = _halves(recipe, config, dtype, precision)
        chosen = choose_attention(wanted, config, device(), halves, hub_kernels=recipe.hub_kernels)
    return chosen if begun is None else replace(chosen, reason=begun[1])


def _halves(recipe: Recipe, config: PreTrainedConfig, dtype: str, precision: str) -> dict[str, str]:
    """By setting, the precision that attention is computed in: of trained models that of autocast."""
    teacher = recipe.distill.teacher
    own = teacher.dtype if isinstance(teacher, Live) and teacher.dtype not in (None, "fast") else dtype
    named = {"dtype": dtype, "distill.precision": computed_in(precision), "distill.teacher.dtype": own}
    stored = str(loaded_dtype(config)).removeprefix("torch.")
    return {key: stored if name == "stored" else name for key, name in named.items()}


def _begun_in(folder: Path, key: str, values: Sequence[str] = DTYPES) -> tuple[str, str] | None:
    """Which of ``values`` the results in a run directory were computed in or with under ``key``, and which of them says
    so."""
    checkpoints = folder.glob("checkpoints/checkpoint-*/manifest.json")
    results = [folder / name for name in ("distill.json", "importance.json", "eval/teacher.json")]
    for file in (*sorted(checkpoints, reverse=True), *results):
        value = inputs_of(file).get(key)
        if value in values:
            how = "with" if values is ATTENTION else "in"
            return str(value), f"{file.relative_to(folder)} of this run directory was made {how} {value}"
    return None


def resolved(model: str, revision: str | None) -> Path:
    """The model's local folder. Rank 0 resolves it first: a download or conversion happens once per machine.

    Raises:
        UserError: as resolve_model, and a revision of what has none.
    """
    refuse_no_model(model, revision)
    if not is_main():
        barrier()
    folder = resolve_model(model, revision=revision)
    if is_main():
        barrier()
    return folder


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Keep every other process out of the run directory; the operating system lets go when this one dies.

    What the run is made with is remembered there.

    Raises:
        UserError: another living process holds it, it cannot be created, or as remember does.
    """
    new = [folder for folder in (run.dir, *run.dir.parents) if not folder.exists()]
    make_folder(run.dir)
    with only_process(run.dir / LOCK, f"run_dir {run.dir}", wait_s=LOCK_WAIT_S):
        try:
            for folder in run.dir.glob(f"{OFFLOADED}*"):
                shutil.rmtree(folder)  # of a process that was killed
            if run.memory is not None:
                remember(run.dir, run.memory)
            if run.numerics is not None and (run.numerics.max_minutes is not None or run.numerics.text is not None):
                write_story(run)  # this stage and others go on with these sizes and this text
            yield
        except BaseException as error:
            # sizes of what was refused are nobody's
            _leave_nothing(run, {LOCK, RECIPE, *([STORY] if isinstance(error, UserError) else [])}, new)
            raise


def _leave_nothing(run: Run, traces: set[str], new: Sequence[Path]) -> None:
    """Remove our ``traces`` where nothing was made, such as the ``new`` folders, innermost first, of a refused run with
    a misspelt run_dir."""
    folder = run.dir
    if not folder.is_dir():
        return
    if memory_in(folder) != run.memory:
        traces = traces - {RECIPE}
    if {file.name for file in folder.iterdir()} <= traces:
        for name in traces:
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody may be writing into it by now
            for made in new:
                made.rmdir()


def check_length(run: Run, sequence_length: int, setting: str, *, remedy: str = "lower it") -> None:
    """Refuse rows longer than the model's positions, before any weight is loaded."""
    require_positions(run.config(), sequence_length, setting, remedy=remedy)


def write_story(run: Run) -> None:
    """run.json: the resolved recipe without secrets, versions, and the fingerprint of every stage that is there."""
    if not is_main():
        return
    stages, kernels = dict[str, Any](), loaded_kernels()
    for name, (kind, _) in FILES.items():
        if (file := run.dir / name).is_file():
            provenance = kind.load(file).provenance
            stages[name] = {"fingerprint": provenance.fingerprint, "created": provenance.created}
            kernels |= provenance.environment.get("hub_kernels", {})  # of processes that ended
    story = {
        "schema": "shoal/run/1",
        "recipe": redacted(as_dict(run.recipe)),
        "numerics": None if run.numerics is None else asdict(run.numerics),
        "environment": environment() | ({"hub_kernels": kernels} if kernels else {}),
        "stages": stages,
    }
    write_json(run.dir / STORY, story)
