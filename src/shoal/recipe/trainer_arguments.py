"""What `distill.trainer` and `distill.deepspeed` may say to the libraries that train, without loading them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import UserError
from shoal.formatting import meant
from shoal.installed import names, source
from shoal.ranks import world_size
from shoal.recipe.asked import at, refused
from shoal.recipe.evaluate import CONFIGS_DIR
from shoal.recipe.field_words import TRAINING_ARGUMENTS, field_word
from shoal.recipe.section import AUTO, Shapes, shaping
from shoal.yaml_text import own_yaml

if TYPE_CHECKING:
    from shoal.recipe.distill import Distill

HALVES = {"bf16": "bf16-mixed", "fp16": "fp16-mixed"}
"""Arguments that are distill.precision here."""
OURS = ("use_liger_kernel", "torch_compile")
"""Arguments by which shoal does the work itself: its loss takes the place of a model's forward."""
_REFUSED = own_yaml(__file__, "training_arguments.yaml")
DEFAULTS: dict[str, Any] = _REFUSED["defaults"]
"""What differs from transformers' own defaults, in a recipe and in Python."""
REFUSED_ARGUMENTS: dict[str, str] = {
    name: why for names, why in _REFUSED["refused"].items() for name in names.split()
} | refused("distill.trainer")
"""Training arguments that would be wrong, ignored or leaked here."""
CHOICES: dict[str, list[str]] = _REFUSED["choices"]
"""Training argument -> the file and the class of transformers that names what it may be."""
OPTIMIZERS = ("adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "musgd", "muon")
"""DeepSpeed's own."""
DEEPSPEED_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""What a DeepSpeed configuration says of the batch, which depends on the number of ranks."""
BATCH_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""How ranks and micro-batches share the rows of one optimizer step."""
MOST = 1e12
"""No training argument is as large."""
RANGES: dict[str, list[float]] = {name: ends for words, ends in _REFUSED["ranges"].items() for name in words.split()}
"""Training arguments that are at least the first and below the second number; transformers looks at few of them."""
WHOLE = {"dataloader_num_workers", "ddp_timeout", "save_total_limit", "max_steps", *BATCH_SPLIT}
"""Those of them that are whole numbers."""
NEUTRAL = {*_REFUSED["neutral"].split()}
"""Training arguments that change how the work is done and not its result: a run may go on with others."""
PRECISIONS = ("bf16", "fp16", "torch_autocast")
"""Sections that say what is computed in."""
SECTIONS = ("zero_optimization", *PRECISIONS, "offload_optimizer", "offload_param")
DEEPSPEED: dict[str, str] = {**_REFUSED["deepspeed"], **_REFUSED["deepspeed_only"]}
"""Place in a configuration of DeepSpeed -> the keys that it has there."""
MIXED = {"bfloat16": "bf16-mixed", "float16": "fp16-mixed"}
"""Words of distill.precision for what autocast casts to."""
COMPUTED_IN = {"bf16": "bfloat16", "fp16": "float16"}


def wrong_arguments(trainer: Mapping[str, Any]) -> Iterator[str]:
    """`place: what is wrong`, for what ``trainer`` must not say; the values of most are looked at with transformers.

    bf16 and fp16 are there no more where they say the section's precision.
    """
    if not HALVES.keys().isdisjoint(trainer):
        reason = "contradict distill.precision, or are both true; remove them"
        yield f"distill.trainer: bf16 and fp16 {reason}"
    for name in trainer:
        known = f"here it is {word}" if (word := field_word(name)) else "see transformers.TrainingArguments"
        if name in REFUSED_ARGUMENTS:
            yield f"distill.trainer.{name}: {REFUSED_ARGUMENTS[name]}"
        elif name not in TRAINING_ARGUMENTS:
            hint = meant(name, TRAINING_ARGUMENTS, known, cutoff=0.7)
            yield f"distill.trainer.{name}: no such training argument; {hint}"
        elif name not in RANGES and isinstance(trainer[name], int | float):
            continue  # which transformers knows
        elif (problem := wrong_value(name, trainer[name])) is not None:
            yield f"distill.trainer.{name}: {problem} (got {trainer[name]!r})"
    for row in _REFUSED["refused_values"]:
        name, _, inner = row["place"].partition(".")
        value = trainer.get(name)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if value in row.get("values", ()) or (value and "values" not in row):
            yield f"distill.trainer.{row['place']}: {value} {row['why']}"


def wrong_value(name: str, value: Any) -> str | None:
    """What is wrong with ``value`` of the training argument ``name``, as far as RANGES and its name tell."""
    if name in WHOLE and type(value) is not int and (name, value) != ("save_total_limit", None):
        return "must be a whole number"
    if name in RANGES.keys() - WHOLE and type(value) not in (int, float):
        return "must be a number"
    if name == "gradient_checkpointing" and not isinstance(value, bool | None):
        return "must be a boolean"
    if name.endswith("_kwargs") and isinstance(value, str):  # which transformers would read as JSON
        return "must be a mapping of settings"
    least, end = RANGES.get(name, (-MOST, MOST))
    if isinstance(value, int | float) and not least <= value < end:
        return f"must be from {least:g} to below {end:g}"
    return None


def read_deepspeed(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """A copy of the configuration: a mapping, the JSON file at a path, or that of a name in configs/deepspeed.

    Raises:
        UserError: there is no such file, it holds no JSON mapping, or a section of it is none.
    """
    if source is None:
        return {}
    if isinstance(source, dict):
        return _with_sections(json.loads(json.dumps(source)))
    for file in (Path(source).expanduser(), CONFIGS_DIR / f"deepspeed/{source}.json"):
        if file.is_file():
            try:
                config = json.loads(file.read_bytes())
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}: is not a JSON mapping ({error}); fix it, or name a shipped one") from error
            if not isinstance(config, dict):
                raise UserError(f"{file}: holds {type(config).__name__}, not a mapping; fix it, or name a shipped one")
            return _with_sections(config)
    shipped = ", ".join(sorted(file.stem for file in (CONFIGS_DIR / "deepspeed").glob("*.json")))
    raise UserError(f"distill.deepspeed: no file {source!r}; shipped ones are {shipped}")


def precisions_said(config: Mapping[str, Any]) -> list[str]:
    """What ``config`` says itself, in the words of distill.precision."""
    cast_to = str(config.get("torch_autocast", {}).get("dtype")).removeprefix("torch.")
    words = {"bf16": "bf16-true", "fp16": "fp16-true", "torch_autocast": MIXED.get(cast_to, cast_to)}
    return [words[key] for key in PRECISIONS if config.get(key, {}).get("enabled")]


def computed_in(precision: str) -> str:
    """Name of torch's for what a word of distill.precision multiplies in."""
    return COMPUTED_IN.get(precision[:4], "float32")


def trained_in(config: Mapping[str, Any], fastest: str) -> str:
    """The precision of a training, by its word, on a device that multiplies fast in ``fastest``, where nothing names
    one.

    float16 needs its losses scaled, and the optimizers of ZeRO 1 to 3 clip gradients as if they were not (DeepSpeed
    0.19): there it is float32.
    """
    is_sharded = config.get("zero_optimization", {}).get("stage", 0)
    return "float32" if fastest == "float16" and is_sharded else MIXED.get(fastest, fastest)


def training_settings(settings: Distill) -> dict[str, Any]:
    """What section `distill` says itself of a training, by its names in identities. A default is left out: who writes
    it down asks for the same training."""
    section = shaping(settings, Shapes.TRAINING, "distill.")
    if settings.watch is None or settings.watch.metric_for_best_model is None:
        del section["distill.watch"]  # it only looks on
    neutral = {*NEUTRAL, *(BATCH_SPLIT if settings.batch_size is not None else ())}
    own = {key: value for key, value in settings.trainer.items() if key not in neutral and value != DEFAULTS.get(key)}
    return section | {f"distill.trainer.{key}": value for key, value in own.items()}


def batch_split(settings: Distill, *, ranks: int | None = None) -> tuple[int, int]:
    """Rows of a micro-batch on one rank, and micro-batches of an optimizer step; ``ranks`` None = those of this run.

    Rows are handed out in order, micro-batch by micro-batch and within one rank by rank, so an optimizer step holds the
    same rows however it is split.

    Raises:
        UserError: `distill.batch_size` does not come out even over these ranks.
    """
    micro_batch = settings.trainer.get("per_device_train_batch_size")
    default = int(DEFAULTS["per_device_train_batch_size"])
    if settings.batch_size is None:
        return int(micro_batch or default), int(settings.trainer.get("gradient_accumulation_steps", 1))
    ranks = ranks or world_size()
    per_rank, rest = divmod(settings.batch_size, ranks)
    rows = int(micro_batch or max(n for n in range(1, default + 1) if per_rank % n == 0))
    if rest or per_rank % rows:
        raise UserError(_REFUSED["training"]["rows"].format(said=settings.batch_size, ranks=ranks, rows=rows))
    return rows, per_rank // rows


def refuse_training(settings: Distill, *, ranks: int | None) -> None:
    """Refuse names that transformers does not know, an optimizer whose package is not installed, and numbers that
    contradict each other, as far as the number of ``ranks`` is known."""
    trainer, config, told = settings.trainer, read_deepspeed(settings.deepspeed), _REFUSED["training"]
    if settings.batch_size is not None and "gradient_accumulation_steps" in trainer:
        raise UserError(told["steps"].format(said=settings.batch_size))
    for name, place in CHOICES.items():
        if (known := names("transformers", *place)) and trainer.get(name, known[0]) not in known:
            choices = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise UserError(f"distill.trainer.{name}: must be {choices} (got {trainer[name]!r})")
    optim, more = trainer.get("optim"), trainer.get("lr_scheduler_kwargs")
    for package, those in _REFUSED["optimizer_packages"].items():
        if optim in those.split() and not find_spec(package):
            raise UserError(told["optim"].format(optim=optim, package=package))
    words = re.findall(r"\w+", source("transformers", "optimization.py"))
    for word in more if isinstance(more, dict) and words else ():
        if word not in words:
            raise UserError(told["schedule"].format(**{**DEFAULTS, **trainer}, word=word))
    kind = trainer.get("lr_scheduler_type")
    for kinds, needed in _REFUSED["schedule_needs"].items():
        if kind in kinds.split() and not any(word in (more or ()) for word in needed.split()):
            raise UserError(told["needs"].format(kind=kind, lacking=" or ".join(needed.split())))
    if ranks is not None:
        rows, steps = batch_split(settings, ranks=ranks)
        for key, own in zip(DEEPSPEED_BATCH, (rows * steps * ranks, rows, steps), strict=True):
            if type(config.get(key)) is int and config[key] != own:
                raise UserError(told["batch"].format(key=key, said=config[key], ranks=ranks, own=own))
        is_known = settings.num_tokens or all(source.path != AUTO for source in settings.data)
        last = num_steps(settings, rows * steps * ranks) if is_known else math.inf
        if settings.profile is not None and settings.profile[1] > last:
            raise UserError(told["profile"].format(said=[*settings.profile], last=last))
        refuse_warmup(trainer, last)


def refuse_warmup(trainer: Mapping[str, Any], last: float) -> None:
    """Refuse a warm-up that takes all of the ``last`` steps of a training with the arguments ``trainer``."""
    if 1 < (warmup := trainer.get("warmup_steps", 0)) >= last and trainer.get("lr_scheduler_type") != "constant":
        raise UserError(_REFUSED["training"]["warmup"].format(said=warmup, last=last))


def num_steps(settings: Distill, rows: int) -> int:
    """Optimizer steps, of so many ``rows`` each, counted as the Trainer does: data are trained on more than once, or
    not all of them, where `max_steps` or `num_train_epochs` says so."""
    given = DEFAULTS | settings.trainer
    if (max_steps := given.get("max_steps", -1)) > 0:
        return max_steps
    return math.ceil(given["num_train_epochs"] * math.ceil(settings.budget / (rows * settings.sequence_length)))


def refuse_deepspeed(config: Mapping[str, Any], settings: Distill, precision: str, *, on_cpu: bool) -> None:
    """Refuse what shoal knows to be wrong of a DeepSpeed configuration; ``precision`` is what the training is in, auto
    if that is not known."""
    stage, said = config.get("zero_optimization", {}).get("stage", 0), precisions_said(config)
    asked, optimizer = {*said, *({settings.precision} - {"auto"})}, config.get("optimizer", {"type": "Adam"})
    kind = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    of_torch = re.findall(r"import (\w+) as", source("torch", "optim/__init__.py"))
    wrong = {
        "scheduler": "scheduler" in config,
        "writer": "datastates_ckpt" in config or (config.get("checkpoint") or {}).get("writer"),
        "optimizer": not isinstance(kind, str) or (kind.lower() not in OPTIMIZERS and kind not in of_torch),
        "precisions": len(asked) > 1,
        "late Adam": precision == "bf16-true" and stage == 0,
        "half on a CPU": computed_in(precision) == "float16" and on_cpu,
        "clipping": precision == "fp16-mixed" and stage > 0,
        "compiled": settings.trainer.get("torch_compile") and stage == 3,
        "4 bits": settings.lora is not None and settings.lora.load_in_4bit and stage == 3,
        "offloaded": getattr(settings.teacher, "offload", False) and stage == 3,
    }
    if (name := next(filter(wrong.get, wrong), None)) is not None:
        words = {"kinds": ", ".join(OPTIMIZERS), "kind": kind, "asked": " and ".join(sorted(asked))}
        raise UserError(_REFUSED["deepspeed_wrong"][name].format(**words, precision=precision, stage=stage))


def _with_sections(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without sections that are null, or whose precision is `auto`, which is the recipe's."""
    for place, keys in DEEPSPEED.items():
        section, known = at(config, place) if place else config, keys.split()
        for name in section if isinstance(section, dict) else ():
            hint = meant(name, known, "", cutoff=0.8)
            if name not in known and (hint or place in _REFUSED["deepspeed_only"]):
                where, hint = f"{place}.{name}".lstrip("."), hint or "see its documentation"
                raise UserError(f"distill.deepspeed: {where} is not a key of DeepSpeed; {hint}")
    for parts in (config, config.get("zero_optimization") or {}):
        for name in filter(parts.__contains__, SECTIONS):
            section = parts[name]
            if section is not None and not isinstance(section, dict):
                raise UserError(_REFUSED["deepspeed_wrong"]["section"].format(name=name, section=section))
            if section is None or section.get("enabled") == "auto":
                del parts[name]
    if (stage := config.get("zero_optimization", {}).get("stage", 0)) not in (0, 1, 2, 3):
        raise UserError(f"distill.deepspeed: zero_optimization.stage must be 0, 1, 2 or 3 (got {stage!r})")
    cast = config.get("torch_autocast", {})
    if cast.get("enabled") and str(cast.get("dtype")).removeprefix("torch.") not in MIXED:
        raise UserError(_REFUSED["deepspeed_wrong"]["autocast"].format(known=", ".join(MIXED), said=cast.get("dtype")))
    return config
