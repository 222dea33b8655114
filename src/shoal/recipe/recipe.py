"""What a run is: every setting a frozen dataclass, read from YAML and `section.key=value` overrides.

Pydantic validates at the border only; inside, sections are plain frozen dataclasses, and a function is given its own
section or plain arguments, never the whole recipe.
"""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from yaml import YAMLError

from shoal.errors import UserError
from shoal.formatting import meant
from shoal.model_names import name_of_model, names_model
from shoal.recipe import remembered
from shoal.recipe.asked import ALLOW, allowed, asked, at
from shoal.recipe.distill import Distill
from shoal.recipe.evaluate import CONFIGS_DIR, Eval
from shoal.recipe.measure import METRICS, Measure
from shoal.recipe.messages import blamed, checked, quoted
from shoal.recipe.prune import CutByScore, CutThese, Prune
from shoal.recipe.section import Dtype, Place, Positive, Section, Seed, Shapes, Text, types_of
from shoal.recipe.trainer_arguments import read_deepspeed
from shoal.redaction import redacted
from shoal.yaml_text import read_yaml

REPO = r"^[A-Za-z0-9_]+([-.][A-Za-z0-9_]+)*/[A-Za-z0-9_]+([-.][A-Za-z0-9_]+)*$"
"""What the Hub takes for the name of a repository."""
log = logging.getLogger(__name__)


def _no_mark(project: str) -> str:
    if marks := [letter for letter in project if letter in r"/\#?%:"]:
        raise ValueError(f"contains {marks[0]}, which W&B does not allow in names; remove it")
    return project


@dataclass(frozen=True)
class Track(Section):
    """Tracking of curves, scores, figures and reports with Weights & Biases. The W&B run has the name of the run
    directory, or WANDB_NAME."""

    wandb: Literal["online", "offline", "off"] | None = None
    """Mode of W&B. Default: off, unless WANDB_PROJECT is set or WANDB_MODE is online or offline."""
    project: Annotated[Text, AfterValidator(_no_mark)] = "shoal"
    """W&B project, unless WANDB_PROJECT names one."""
    tags: tuple[str, ...] = ()
    """Tags of the W&B run."""


@dataclass(frozen=True)
class Export(Section):
    """Publication of the result: Hub and GGUF."""

    hub_repo: Annotated[str, Field(pattern=REPO)] | None = None
    """Hub repository, `owner/name`, for the distilled checkpoint and its card. Default: no push."""
    private: bool = True
    """Create the repository as private. An existing public repository is an error."""
    gguf: bool = False
    """Also write the result as one GGUF file for llama.cpp, in its stored precision. The card goes into distilled/."""


@dataclass(frozen=True)
class Recipe(Section):
    """All settings of one run."""

    model: Annotated[Place, Shapes.BY_CONTENT]
    """Model to prune: Hub id, local folder or demo:<name>."""
    run_dir: Annotated[Place, Shapes.NOTHING] = ""
    """Folder for all results of the run. Default: runs/NAME, after the model: runs/Qwen3-8B for Qwen/Qwen3-8B."""
    seed: Annotated[Seed, Shapes.NUMBERS | Shapes.ROWS] = 0
    """Seed of every random choice: data, text, examples."""
    revision: Annotated[str | None, Shapes.BY_CONTENT] = None
    """Hub revision of the model. Default: the newest."""
    dtype: Annotated[Dtype, Shapes.NUMBERS | Shapes.SIGNALS | Shapes.SPEED] = "fast"
    """Precision for measuring, evaluation and the frozen teacher. `fast`: the fastest one of the device, or the one
    that this run directory started with; `stored`: that of the checkpoint (other libraries call it auto)."""
    max_minutes: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, Shapes.BY_CONTENT] = None
    """Maximum minutes of the run; shoal uses less data if needed. It then measures, trains and scores on fewer tokens
    (at least a fifth) and fewer items (at least 60 per task), so a slow machine can take longer. Log, run.json and
    report state the share. A run directory keeps it. Default: no limit."""
    attn_implementation: Annotated[
        Literal["auto", "flash", "sdpa", "eager"], Shapes.NUMBERS | Shapes.SIGNALS | Shapes.SPEED
    ] = "auto"
    """Attention kernels. `flash`: FlashAttention, from a package or from torch; `sdpa`: torch's kernels with masks;
    `eager`: plain products. `auto`: flash if GPU, family and precision allow it, else sdpa, else eager. Documents of a
    row never see each other."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Shapes.NOTHING] = "auto"
    """Device for the models. `auto`: a GPU if there is one; `cuda`: a GPU of NVIDIA or AMD, or an error; `cpu`: no
    GPU."""
    num_processes: Annotated[Positive | None, Shapes.NOTHING] = None
    """Processes per stage on this machine. Default: one per visible GPU, or one on a CPU."""
    trust_remote_code: Annotated[bool, Shapes.NOTHING] = False
    """Run code that comes with the checkpoint; read it first."""
    hub_kernels: Annotated[
        bool, Shapes.NUMBERS | Shapes.SIGNALS | Shapes.SPEED, Field(exclude_if=lambda wanted: not wanted)
    ] = False
    """Run all models with kernels from the Hub. They are downloaded code, exist mainly for GPUs, and give other last
    digits. run.json records their names and revisions. Cuts are proved without them."""
    measure: Measure = field(default_factory=Measure)
    prune: Prune = field(default_factory=CutByScore)
    """Layers to drop, by number (`drop`) or by a score, and other changes."""
    distill: Distill = field(default_factory=Distill)
    eval: Eval = field(default_factory=Eval)
    track: Annotated[Track, Shapes.NOTHING] = field(default_factory=Track)
    export: Annotated[Export, Shapes.NOTHING] = field(default_factory=Export)

    def __post_init__(self) -> None:
        if isinstance(self.prune, CutByScore):
            chosen_by = self.prune.chosen_by or {self.prune.default_metric}
            if missing := sorted(chosen_by & {*METRICS} - {*self.measure.metrics}):
                metrics: Any = (*self.measure.metrics, *missing)
                object.__setattr__(self, "measure", replace(self.measure, metrics=metrics))
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{name_of_model(self.model)}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe at ``path`` with ``section.key=value`` overrides applied.

    A name that is no file is looked up among the shipped recipes, so that `quickstart` works from any folder; a run
    directory holds the recipe that it is made with, and is then the run_dir; a model alone is the recipe {model: path}.

    Raises:
        UserError: naming every problem at once as ``file: key.path: message (got value)``, or with the override that
            has set it instead of the file.
    """
    said, source = read_settings(path, overrides)
    return settled(said, source, overrides)


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Path]:
    """What the recipe, the run directory or the model at ``path`` says with ``overrides`` applied; and the file that
    says it, of a model its name.

    Raises:
        UserError: there is none, it is no mapping, or an override is none.
    """
    path = os.path.expanduser(path)  # Path would write ./model as model
    if (file := _find_recipe(path)) is None:
        raw, file = {"model": path}, Path(path)
    else:
        raw = _read_mapping(file)
        if file == Path(path) / remembered.FILE:
            raw["run_dir"] = path
    for override in overrides:
        if not override.startswith(f"{ALLOW}="):
            apply_override(raw, override)
    _drop_rivals(raw, {override.partition("=")[0] for override in overrides}, file)
    return raw, file


def _drop_rivals(raw: dict[str, Any], own: Collection[str], file: Path) -> None:
    """Take out what ``file`` says of how many layers are dropped, where the user, whose ``own`` places these are, says
    it in another way: a recipe of `shoal init` names a number, and `--ratio` is meant to replace it."""
    section = raw.get("prune")
    if not isinstance(section, dict):
        return
    users = {place.split(".")[1] for place in own if place.startswith("prune.")}
    said = [key for key in ("drop", "num_drop", "ratio", "target") if key in users and section.get(key) is not None]
    if not said:
        return
    rivals = {"drop", "num_drop", "ratio", "target"}
    if "drop" in said:
        rivals |= types_of(CutByScore).keys() - types_of(CutThese).keys()
    for key in sorted(rivals - users & section.keys()):
        if section[key] is not None and "LOCAL_RANK" not in os.environ:
            log.info("prune.%s replaces prune.%s: %s of %s", said[0], key, section[key], file)
        del section[key]


def _read_mapping(file: Path) -> dict[str, Any]:
    if kind := {".html": "a page", ".md": "a page", ".safetensors": "weights", ".bin": "weights"}.get(file.suffix):
        raise UserError(f"{file}: is {kind}, not a recipe; name a recipe, a run directory or a model's folder")
    try:
        raw = read_yaml(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); choose a file you may read") from error
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"{file}: must be a mapping of settings, got {kind}")
    if {"schema", "made"} <= raw.keys() or {"model_type", "architectures"} & raw.keys():
        kind = "result of shoal" if "made" in raw else "model's configuration"
        raise UserError(f"{file}: is a {kind}, not a recipe; name a recipe, a run directory or a model's folder")
    return raw


def settled(said: dict[str, Any], file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of what read_settings gives.

    Raises:
        UserError: as load_recipe; a secret that a run directory has not kept; what acts beyond the run directory and is
            not the user's own word; a run directory that is somebody else's folder.
    """
    if hidden := list(remembered.hidden_settings(said)):
        raise UserError(
            f"{file}: shoal does not store secrets in a run directory; add {hidden[0]}=VALUE to the command"
        )
    recipe = parse_recipe(said, source=str(file), overrides=overrides)
    run_dir = Path(recipe.run_dir).expanduser()
    remembered.refuse_other_folder(run_dir)
    if isinstance(config := recipe.distill.deepspeed, str):  # what a file says that a recipe names, the recipe says
        said = {**said, "distill": {**said.get("distill", {}), "deepspeed": read_deepspeed(config)}}
    rows = list(asked(said, [override.partition("=")[0] for override in overrides]))
    kinds, kept, is_own = allowed(overrides), remembered.own_words(run_dir), remembered.is_own(file)
    problems = [
        f"{row.place}: {row.why} (got {reprlib.repr(at(said, row.place))}), which a recipe file may do only with "
        f"your consent; add --allow {row.can} to the command, or remove the key"
        for row in rows
        if not (is_own or row.can in kinds or at(kept, row.place) == at(said, row.place))
    ]
    if problems:
        raise UserError(blamed(problems, str(file), overrides))
    for row in rows if "LOCAL_RANK" not in os.environ else ():
        log.info("%s: %s (%s)", row.place, row.why, at(said, row.place))
    return recipe


def parse_recipe(raw: dict[str, Any], *, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a plain mapping describes; problems are reported as in load_recipe. ``overrides`` are already in
    it."""
    return checked(Recipe, raw, source=source, overrides=overrides)


def of_arguments(
    section: str, given: Mapping[str, Any], *, source: str, taken: Collection[str] | None = None, seed: Any = 0
) -> Any:
    """The ``section`` of a recipe that says what the arguments ``given`` of the function ``source`` say, and is refused
    in the same words; the function has a use for the keys ``taken``, None = for all.

    Raises:
        UserError: as parse_recipe does; a key that only a run directory has a use for.
    """
    known = types_of(types_of(Recipe)[section]) if taken is not None else ()
    if useless := [name for name in given if name in known and name not in (taken or ())]:
        raise UserError(
            f"{source}: {useless[0]}: only works with a run directory; remove it, or call shoal.run with a full recipe"
        )
    return getattr(parse_recipe({"model": "in memory", "seed": seed, section: given}, source=source), section)


def _find_recipe(name: str) -> Path | None:
    """The recipe file that ``name`` stands for; None = it is a model."""
    path = Path(name)
    if path.is_file():
        return path
    if (path / remembered.FILE).is_file():
        return remembered.recipe_in(path)
    for shipped in (CONFIGS_DIR / path.name, CONFIGS_DIR / f"{path.name}.yaml"):
        if path.parent in (Path(), Path("configs")) and shipped.is_file():
            return shipped
    if names_model(name):
        return None
    if path.is_dir():
        return remembered.recipe_in(path)
    names = sorted(p.name for p in CONFIGS_DIR.glob("*.yaml"))
    otherwise = "to create a recipe for a model (a folder, a Hub id or demo:NAME), run `shoal init MODEL`"
    hint = meant(path.stem, (Path(name).stem for name in names), otherwise, cutoff=0.7)
    what = "recipe file" if path.suffix in (".yaml", ".yml") else "recipe, run directory or model"
    raise UserError(f"{name}: no {what} with this name; shipped recipes are {', '.join(names) or 'none'}; {hint}")


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set in a recipe's plain mapping what `section.key=value` says.

    Raises:
        UserError: another form, no YAML, or a place that is within a plain value.
    """
    key, equals, text = override.partition("=")
    *sections, leaf = key.split(".")
    if not equals or not all([*sections, leaf]):
        raise UserError(f"{quoted(override)}: must have the form section.key=value, without blanks around the =")
    try:
        value = read_yaml(text)
    except YAMLError as error:
        raise UserError(f"{quoted(override)}: the value is not valid YAML: {error}") from error
    node: Any = raw
    for name in sections:
        child = _entry(node, name, override)
        if child is None:
            child = {}
            node[int(name) if isinstance(node, list) else name] = child
        if isinstance(child, str) and isinstance(node, dict):  # a kind by its name alone
            child = node[name] = {"kind": child}
        if not isinstance(child, dict | list):
            raise UserError(f"{quoted(override)}: {name!r} is {redacted({name: child})[name]!r}, not a section")
        node = child
    _entry(node, leaf, override)
    node[int(leaf) if isinstance(node, list) else leaf] = value


def _entry(node: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """What ``node`` holds under ``name``, for a list a position in it; None where a mapping has no such key."""
    if isinstance(node, dict):
        return node.get(name)
    if not name.isdecimal() or int(name) >= len(node):
        raise UserError(
            f"{quoted(override)}: index {name} is out of range (the list has {len(node)} entries, counted from 0); "
            "set the whole list instead"
        )
    return node[int(name)]
