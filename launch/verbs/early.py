"""What is looked at before torch and transformers are loaded, which takes seconds: one list for all commands."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from shoal.artifacts.evaluation import CONTROL, ROLES, Scores, Speed
from shoal.artifacts.identity import Identity
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import cache_dir, free_disk, make_folder, refuse_no_lock, write_text
from shoal.components import require_layers
from shoal.compress import free_layers
from shoal.errors import NO_TOKEN, UserError
from shoal.eval.report.run import read_run, read_story
from shoal.eval.tasks import names
from shoal.formatting import bytes_text
from shoal.inference.vllm import check_vllm
from shoal.model_names import DEMO_PREFIX, name_of_model, refuse_no_model
from shoal.models import checkpoint_files as files
from shoal.ranks import NO_GPU, may_have_devices, no_gpu, refuse_crowd, refuse_no_address
from shoal.recipe.distill import SMALL, Live, Recorded, TrainingSource
from shoal.recipe.evaluate import NO_TEMPLATE
from shoal.recipe.losses import NO_GRADIENT, HiddenStates
from shoal.recipe.measure import METRICS, no_metric, not_measured
from shoal.recipe.prune import NO_CORNERSTONE, CutThese, Target, Width
from shoal.recipe.recipe import Recipe
from shoal.recipe.remembered import LOCK
from shoal.recipe.section import AUTO, DataSource, Shapes, plain_path, shaping
from shoal.recipe.trainer_arguments import precisions_said, read_deepspeed, refuse_deepspeed, refuse_training
from shoal.tracking.wandb_run import wandb_mode

MEASURE, SCORE, TRAIN = ("measure", "run"), ("eval", "run"), ("record", "distill", "run")
CUT = ("prune", "distill", "run")
"""Commands that drop layers if there is no student yet."""
LOAD = ("measure", "prune", *TRAIN, "eval", "lab")
FIRST_CHARACTERS, FIRST_DOCUMENTS = 4096, 20
"""Text and documents of a file that are looked at."""
MANY_TOKENS = 10**8
"""Tokens that every machine has room for."""
PLAIN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""Weights of layers that a model has under the names that they are stored by."""
FILES: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    Importance.FILE: (Importance, ("measure", "prune", "run")),
    Plan.FILE: (Plan, (*CUT, "eval")),
    Training.FILE: (Training, ("distill", "run")),
    f"{CONTROL}/{Training.FILE}": (Training, ("run",)),
    **{f"eval/{role}.json": (Scores, SCORE) for role in ROLES},
    Speed.FILE: (Speed, SCORE),
}
"""File of a run directory -> what it is, and the commands that read it."""


@dataclass(frozen=True)
class Asked:
    """A command, and what the model's files say."""

    verb: str
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run_dir).expanduser()

    @cached_property
    def described(self) -> tuple[dict[str, Any], Path | None]:
        from shoal.models.download import config_of  # loads the Hub's library

        return config_of(self.recipe.model, self.recipe.revision)

    @property
    def config(self) -> dict[str, Any]:
        """The part of config.json that describes the text decoder."""
        return files.text_part(self.described[0])

    def number(self, key: str) -> int | None:
        """The number above 0 that config.json gives for ``key``; None if it gives none, or something else."""
        value = self.config.get(key)
        return value if type(value) is int and value > 0 else None

    @cached_property
    def shards(self) -> list[Any]:
        """Headers of the weight files of a local model."""
        return files.read_shards(folder) if (folder := self.described[1]) else []

    @property
    def plain(self) -> Path | None:
        """The model's own folder, with a tokenizer; None of an adapter, a demo model, or one on the Hub."""
        folder = self.described[1]
        return folder if folder == Path(self.recipe.model).expanduser() else None

    @property
    def measures(self) -> bool:
        """Whether text of `measure` is read."""
        prune = self.recipe.prune
        return self.verb in MEASURE or (self.verb in CUT and (not isinstance(prune, CutThese) or bool(prune.changes)))


def refuse_early(verb: str, recipe: Recipe, *, writes: bool = True) -> None:
    """Refuse what ``verb`` would find missing or impossible later on. ``writes``: False for a dry run.

    Raises:
        UserError: as the functions of LOOKS.
    """
    asked, is_rank = Asked(verb, recipe), "LOCAL_RANK" in os.environ
    for look in LOOKS:
        if verb in look.verbs and (writes or not look.if_written) and not (is_rank and look.once):
            look.at(asked)


def require_distilled(recipe: Recipe) -> None:
    """Refuse a push of nothing, or to nowhere."""
    run_dir = Path(recipe.run_dir).expanduser()
    if recipe.export.hub_repo is None:
        raise UserError(f"shoal push {run_dir}: the repository is missing; add its name, owner/name, to the command")
    if not (run_dir / "distilled" / "config.json").is_file():
        raise UserError(f"{run_dir / 'distilled'}: does not exist yet; run `shoal distill` first")


def _push(asked: Asked) -> None:
    """Refuse a push of nothing, to nowhere, or of nobody."""
    from huggingface_hub import get_token

    require_distilled(asked.recipe)
    if get_token() is None:
        raise UserError(f"export to {asked.recipe.export.hub_repo}: {NO_TOKEN}")


def _columns(asked: Asked) -> None:
    """Refuse tasks that are unknown, and to choose by a metric or task that there is not, or that is not measured."""
    prune, settings = asked.recipe.prune, asked.recipe.measure
    if settings.sweep is not None and asked.verb in MEASURE:
        names.refuse_unknown(settings.sweep.tasks, asked.recipe.eval.include_path, setting="measure.sweep.tasks")
    if asked.verb not in CUT or isinstance(prune, CutThese) or (asked.folder / Importance.FILE).exists():
        return
    if prune.metric is None and (name := prune.default_metric) not in settings.metrics:
        place = "prune.contiguous" if prune.contiguous else "prune.metric"
        raise UserError(f"{place}: layers are chosen by {name}, which measure.metrics does not name; add it there")
    if settings.sweep is None:
        for name in sorted(prune.chosen_by - {*settings.metrics}):
            if name not in METRICS:
                raise no_metric(name, f"prune.metric={name}")
            raise UserError(f"prune.metric={name}: this metric is not measured; add it to measure.metrics")
        for name in prune.spare:
            raise not_measured(f"prune.spare: {name}", "it has none.", "measure.sweep.tasks")
        if "cornerstone" in prune.protect:
            raise UserError(NO_CORNERSTONE)


def _training(asked: Asked) -> None:
    recipe, distill = asked.recipe, asked.recipe.distill
    on_cpu, config = not may_have_devices(), read_deepspeed(distill.deepspeed)
    is_here = asked.verb != "record" and "LOCAL_RANK" not in os.environ
    ranks = (recipe.num_processes or (1 if on_cpu else None)) if is_here else None
    refuse_training(distill, ranks=ranks)
    refuse_deepspeed(config, distill, next(iter(precisions_said(config)), distill.precision), on_cpu=on_cpu)
    if distill.lora is not None:
        distill.lora.require_packages()
    if distill.watch is not None:
        names.refuse_unknown(distill.watch.tasks, recipe.eval.include_path, setting="distill.watch.tasks")
    by_vllm = (n for n, source in enumerate(distill.data) if source.generate and source.generate.backend == "vllm")
    if (number := next(by_vllm, None)) is not None and not any((asked.folder / "text").glob("written-*")):
        check_vllm(f"distill.data.{number}.generate.backend")  # what is written is read without it
    teacher = distill.teacher
    if asked.verb == "record" and isinstance(teacher, Live):
        raise UserError("distill.teacher: is live, so there is nothing to record; add distill.teacher=recorded")
    by_vllm = teacher if isinstance(teacher, Recorded) and teacher.backend == "vllm" else None
    if by_vllm and not (by_vllm.folder(recipe.run_dir) / "recording.json").is_file():  # else it may be needless
        check_vllm("distill.teacher.backend")
    size = sum(math.prod(tensor.shape) for shard in asked.shards for tensor in shard.tensors.values())
    if 0 < size < SMALL and "quantization_config" not in asked.config:  # which trains on at most as many tokens
        refuse_training(replace(distill, num_tokens=distill.budget), ranks=ranks)


def _scoring(asked: Asked) -> None:
    from shoal.models.looks import chat_template

    settings = asked.recipe.eval
    if settings.apply_chat_template and asked.plain is not None and chat_template(asked.plain) == "":
        raise UserError(NO_TEMPLATE)
    names.local_data(settings.data_dir)
    names.refuse_unknown(settings.tasks, settings.include_path)
    if settings.data_dir is None:
        names.refuse_offline(settings.tasks, settings.include_path)
    if settings.backend == "vllm":
        check_vllm("eval.backend")
    if (tasks := names.tasks_named(settings.tasks, settings.include_path)) is not None:
        names.refuse_other_limits(settings.limit, tasks)
        names.refuse_many_shots(settings.num_fewshot, tasks, settings.include_path)


def _crowd(asked: Asked) -> None:
    if asked.recipe.num_processes is not None and asked.recipe.eval.backend != "vllm":
        refuse_crowd(asked.recipe.num_processes)


def student_missing(run_dir: Path) -> UserError:
    """The error of a training whose pruned model was removed."""
    return UserError(f"{run_dir / 'student'}: is missing; run `shoal prune` to restore it, or choose another run_dir")


def _files(asked: Asked) -> None:
    """Refuse files that are not what their names say, and models that are damaged or missing."""
    read_story(asked.folder)
    for name, (kind, verbs) in FILES.items():
        if asked.verb in verbs:
            Identity(kind, asked.folder / name, {}, asked.verb).changed()
    models = {name: (asked.folder / name / "config.json").is_file() for name in ("student", "distilled")}
    if asked.verb == "distill" and (asked.folder / Plan.FILE).is_file() and not any(models.values()):
        raise student_missing(asked.folder)
    for name, is_there in models.items():
        if is_there and asked.verb in ("distill", "report", "push", *SCORE):
            try:
                files.check_checkpoint(asked.folder / name)
            except UserError as error:
                again = "prune" if name == "student" else "distill"
                what = str(error).partition(files.DOWNLOAD_AGAIN)[0].removesuffix("correct it, or ").rstrip("; ")
                raise UserError(f"{what}; delete {asked.folder / name} and run `shoal {again}` again") from error


def require_student_of(plan: Plan, run_dir: Path) -> None:
    """Refuse a student/ that ``plan`` did not make."""
    student = run_dir / "student"
    is_there = plan.student and (student / "config.json").is_file()
    if is_there and plan.student != plan.sealed(files.model_fingerprint(student)):
        raise UserError(
            f"{run_dir / Plan.FILE}: describes {plan.in_words()!r}, which does not match {student}: one of them was "
            "changed after pruning. Delete plan.json and run `shoal prune` again; to choose other layers, set "
            "prune.drop"
        )


def require_model_of(model: Path, file: str, checksum: str | None) -> None:
    """Refuse a distilled ``model`` that is not the one of this ``checksum``, which ``file`` stores; "" = any."""
    if checksum is None:
        why = f"cannot be checked: {file} is of an older shoal, which did not store a checksum"
    elif checksum and checksum != files.model_fingerprint(model):
        why = f"is not the model of {file}: its weights, configuration or tokenizer differ"
    else:
        return
    raise UserError(f"{model}: {why}; delete it, and `shoal distill` restores it from the last checkpoint")


def _made(asked: Asked) -> None:
    """Refuse to train, score or report models that others than the teacher and the plan made."""
    file, model, trained = (asked.folder / name for name in (Plan.FILE, "distilled", Training.FILE))
    there = [(folder / "config.json").is_file() for folder in (asked.folder / "student", model)]
    if not file.is_file() and any(there) and asked.verb != "distill":
        raise UserError(f"{file}: is missing, but models made with it are there; run `shoal prune` to restore it")
    if not file.is_file() or not any(there):
        return
    plan = Plan.load(file)
    inputs = plan.provenance.inputs
    if asked.verb != "push" and "model" in inputs:  # not of a plan from Python
        inputs = {key: own for key, own in inputs.items() if not key.startswith("prune.")}
        inputs |= shaping(asked.recipe.prune, Shapes.PLAN, "prune.")
    if asked.plain is not None and "model" in inputs:
        inputs = inputs | {"model": files.model_fingerprint(asked.plain)}
    Identity(Plan, file, inputs, "prune").require()
    require_student_of(plan, asked.folder)
    if there[1] and asked.verb != "distill":  # which restores it
        require_model_of(model, Training.FILE, Training.load(trained).settings.get("distilled"))


def _data(asked: Asked) -> None:
    """Refuse local data whose first documents cannot be used, and a package's that is not installed."""
    from shoal.data.bundled import BUNDLED, NOT_APART
    from shoal.data.chat import Chat
    from shoal.data.sources import documents, load_texts, local_files, nothing_in, opened, to_write

    for source in _sources(asked):
        if source.path in BUNDLED:
            opened(source)
        if source.path in NOT_APART:
            BUNDLED[source.path]()  # from a package that may be missing
        if source.path == AUTO or not local_files(source):  # a folder of this name is none of its text
            continue
        if source not in asked.recipe.distill.data:
            load_texts(source, max_characters=FIRST_CHARACTERS)
        elif isinstance(source, TrainingSource) and not source.has_images:
            to_write(source, sequence_length=asked.recipe.distill.sequence_length)
            read = (each for each in documents(source) if each is not None)
            if not (first := list(islice(read, FIRST_DOCUMENTS))):
                raise nothing_in(opened(source))
            if isinstance(first[0], Chat) and not source.generate:
                _conversations(asked, opened(source), first, read)


def _conversations(asked: Asked, source: DataSource, first: list[Any], others: Iterator[Any]) -> None:
    """Refuse conversations, the ``first`` and ``others``, that the model's chat template does not take, or of which no
    token is learnt."""
    from shoal.data.chat import ASSISTANT, MARKS_ITSELF, check_template, nothing_learnt
    from shoal.models.looks import chat_template

    template = chat_template(asked.plain) if asked.plain is not None else None
    if template is None:
        return
    check_template(template, source.path, first=first[0])
    answers = (turn["role"] == ASSISTANT for chat in chain(first, others) for turn in chat.messages[1:])
    is_learnt = MARKS_ITSELF.search(template) or asked.recipe.distill.on_policy is not None
    if source.assistant_only and not is_learnt and not any(answers):
        raise nothing_learnt(source)


def _sources(asked: Asked) -> Iterator[DataSource]:
    """The data that the command reads."""
    recipe = asked.recipe
    if asked.measures:
        yield from recipe.measure.data
    if asked.verb in TRAIN:
        yield from recipe.distill.data
    if asked.verb in SCORE and recipe.eval.perplexity_tokens:
        yield from recipe.eval.perplexity_data


def _model(asked: Asked) -> None:
    """Refuse files that are no checkpoint, and layers and lengths that the model does not have."""
    num_layers, prune, distill = asked.number("num_hidden_layers"), asked.recipe.prune, asked.recipe.distill
    target = None if isinstance(prune, CutThese) else prune.target
    lengths = {"measure.sequence_length": asked.recipe.measure.sequence_length} if asked.measures else {}
    if asked.verb in CUT and num_layers is not None:
        free_layers.refuse_impossible_layers(prune, num_layers, target and _goals(asked, target, num_layers))
    for change in prune.changes if asked.verb in CUT else ():
        if isinstance(change, Width):
            change.refuse_more(asked.config)
    if asked.verb in CUT and target is not None and target.sequence_length is not None:
        lengths["prune.target.sequence_length"] = target.sequence_length
    if asked.verb in TRAIN:
        lengths["distill.sequence_length"] = distill.sequence_length
        if isinstance(distill.teacher, Recorded):
            distill.teacher.refuse_all(asked.number("vocab_size"))
        written = [(source.path, source.generate) for source in distill.data if source.generate is not None]
        setting = "data {!r}: generate.prompt_tokens and max_new_tokens together"
        lengths |= {setting.format(path): how.prompt_tokens + how.max_new_tokens for path, how in written}
        terms = (term for term in distill.terms if num_layers and isinstance(term, HiddenStates))
        wrong = [layer for term in terms for layer in term.layers or () if not 0 <= layer < (num_layers or 0)]
        require_layers(wrong, num_layers or -1, "distill.losses: hidden_states: layers")
        _frozen(asked)
    for setting, length in lengths.items():
        files.refuse_long_rows(asked.number("max_position_embeddings"), length, setting)


def _frozen(asked: Asked) -> None:
    """Refuse losses on states and adapters of what is frozen or not there, as far as config.json, the recipe and plain
    names of weights tell."""
    prune, distill, num_layers = asked.recipe.prune, asked.recipe.distill, asked.number("num_hidden_layers")
    terms = [term for term in distill.terms if isinstance(term, HiddenStates)]
    is_untied = asked.config.get("tie_word_embeddings") is False
    if distill.trainable == "norm_and_head" and is_untied and any(term.weight for term in terms):
        raise UserError(NO_GRADIENT)
    if distill.trainable in ("from_first_cut", "near_gaps") and isinstance(prune, CutThese) and not prune.changes:
        lowest, stay = min(prune.drop) - (distill.trainable == "near_gaps"), (num_layers or 0) - len({*prune.drop})
        for term in terms if lowest < stay else ():
            term.refuse_frozen(term.layers or (lowest,), lowest, stay)
    stored = (item for shard in asked.shards for item in shard.tensors.items())
    linear = {name.removesuffix(".weight") for name, tensor in stored if ".layers." in name and len(tensor.shape) == 2}
    if distill.lora is not None and linear and {name.rpartition(".")[2] for name in linear} <= PLAIN:
        distill.lora.chosen(sorted(linear))


def _goals(asked: Asked, target: Target, num_layers: int) -> free_layers.Goals | None:
    """What ``target`` asks, as far as the headers of the files tell; None where they do not.

    Of a cache they tell nothing. So memory is that of the weights alone, and a speed-up at most the number of layers to
    those that stay: weights outside of layers lower it, and every layer takes as much time where all are alike.
    """
    sizes = _by_layer(asked, num_layers, lambda tensor: math.prod(tensor.shape))
    if not sizes:
        return None
    goals = [] if target.params is None else [free_layers.goal_of_parameters(target.params, sum(sizes), sizes[1:])]
    if not (target.memory_gb or target.speedup):
        return free_layers.goals_asked(goals)
    if target.memory_gb is not None:
        whole, *layers = _by_layer(asked, num_layers, lambda tensor: tensor.end - tensor.start)
        words = " for the weights alone"
        goals.append(free_layers.goal_of_memory(target.memory_gb, whole + sum(layers), layers, words))
    kinds = asked.config.get("layer_types") or (["sliding"] if any("sliding" in key for key in asked.config) else [])
    if target.speedup is not None and len({*sizes[1:]}) == 1 and {*kinds} <= {"full_attention"}:
        most, text = math.floor(num_layers / target.speedup), lambda stay: f"{num_layers / stay:.4g} x"
        goals.append(
            free_layers.Goal("speedup", target.speedup, num_layers, most, (1,) * num_layers, text, " at the most")
        )
    return free_layers.Goals(tuple(goals))


def _checkpoint(asked: Asked) -> None:
    """Refuse a model of a family that transformers does not know, weights that are not those of config.json, and a
    damaged tokenizer."""
    from shoal.models.looks import chat_template, refuse_config, refuse_tokenizer, refuse_weights

    config, folder = asked.described
    if asked.recipe.model.startswith(DEMO_PREFIX):
        return
    refuse_config(str(folder or asked.recipe.model), config, trust_remote_code=asked.recipe.trust_remote_code)
    if folder is not None:
        tensors = (item for shard in asked.shards for item in shard.tensors.items())
        refuse_weights(folder, config, {name: tensor.shape for name, tensor in tensors})
        chat_template(folder)
    if asked.plain is not None and (asked.measures or asked.verb in (*TRAIN, *SCORE)):
        refuse_tokenizer(asked.plain)


def refuse_model(verb: str, recipe: Recipe, name: str, revision: str | None = None) -> None:
    """Refuse a model ``name`` that ``verb`` takes beside that of ``recipe``."""
    _checkpoint(Asked(verb, replace(recipe, model=name, revision=revision)))


def _by_layer(asked: Asked, num_layers: int, amount: Callable[[Any], int]) -> list[int]:
    """Sums of ``amount`` over the stored tensors outside the layers, then over those of each layer; empty if names and
    shapes do not tell, or not for certain."""
    stored = [name for shard in asked.shards for name in shard.tensors]
    is_odd = "quantization_config" in asked.config or not all(name.endswith((".weight", ".bias")) for name in stored)
    is_tied = "lm_head.weight" in stored and asked.config.get("tie_word_embeddings") is not False
    return [] if is_odd or is_tied else files.by_layer(asked.shards, num_layers, amount)


def _place(asked: Asked) -> None:
    """Refuse a run directory that cannot be made or written to, or has less room than the weights that will be written
    take, as far as the teacher's files tell."""
    folder, prune, num_layers = asked.folder, asked.recipe.prune, asked.number("num_hidden_layers")
    name = asked.recipe.model
    if name.startswith(DEMO_PREFIX) and not (cache_dir() / name.removeprefix(DEMO_PREFIX) / "config.json").is_file():
        require_folder(cache_dir(), setting="SHOAL_CACHE")
    require_folder(folder)
    refuse_no_lock(folder / LOCK)
    student, home = folder / "student", asked.described[1]
    if asked.verb in CUT and home is not None and home.resolve().is_relative_to(student.resolve()):
        raise UserError(f"{student}: {files.OWN_FOLDER}")
    written = {"student": CUT, "distilled": ("distill", "run")}
    due = [name for name, verbs in written.items() if asked.verb in verbs and not (folder / name).is_dir()]
    if not due or num_layers is None or prune.changes or getattr(prune, "target", None) is not None:
        return
    count = len({*prune.drop}) if isinstance(prune, CutThese) else free_layers.count_of(prune, num_layers)
    outside, *layers = _by_layer(asked, num_layers, lambda tensor: tensor.end - tensor.start) or [0]
    needed, free = len(due) * (outside + sum(sorted(layers)[: num_layers - count])), free_disk(folder)
    if needed > free:
        raise UserError(
            f"run_dir {folder}: at least {bytes_text(needed)} are to be written there and {bytes_text(free)} are free; "
            "free some space, or set run_dir to another disk"
        )


def require_folder(folder: Path, *, setting: str = "run_dir") -> None:
    """Refuse a folder that cannot be made or written to; nothing stays of one that was not there."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder, setting=setting)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{folder}: cannot be written (Permission denied); set {setting} to a folder you may write to")
    with contextlib.suppress(OSError):  # another process may be writing into it by now
        for made in new:
            made.rmdir()


def _machine(asked: Asked) -> None:
    """Refuse a GPU that is not here, and tokens that have no room. Torch is loaded for what is seldom said."""
    if asked.recipe.device == "cuda" and not may_have_devices():
        raise no_gpu(NO_GPU)
    if asked.measures and asked.recipe.measure.num_tokens > MANY_TOKENS:
        from shoal.data.packing import require_room

        require_room(asked.recipe.measure.num_tokens, "measure.num_tokens")


class Look(NamedTuple):
    """One thing that is looked at."""

    at: Callable[[Asked], Any]
    verbs: tuple[str, ...]
    """Commands that need it."""
    once: bool = True
    """Not again in ranks, whose launcher has looked."""
    if_written: bool = False
    """Not in a dry run."""


LOOKS = (
    Look(lambda _: refuse_no_address(), LOAD, once=False),
    Look(lambda asked: read_run(asked.folder), ("report",)),
    Look(_push, ("push",), once=False),
    Look(lambda asked: refuse_no_model(asked.recipe.model, asked.recipe.revision), (*LOAD, "push"), once=False),
    Look(_columns, (*MEASURE, *CUT), once=False),
    Look(_crowd, ("measure", "distill", "eval", "run")),
    Look(_training, TRAIN, once=False),
    Look(_scoring, SCORE, once=False),
    Look(_data, LOAD),
    Look(_model, LOAD),
    Look(_checkpoint, LOAD),
    Look(_files, (*LOAD, "report", "push")),
    Look(_made, ("distill", "eval", "report", "push")),
    Look(_place, (*LOAD, "report"), if_written=True),
    Look(lambda asked: wandb_mode(asked.recipe.track), (*LOAD, "report", "push"), if_written=True),
    Look(_machine, LOAD),
)
"""In this order."""


def out_path(text: str) -> Path:
    """The place that --out names."""
    try:
        return Path(plain_path(text)).expanduser()
    except ValueError as error:
        raise UserError(f"--out: {error}; correct it, or leave it out") from None


def init_file(asked: argparse.Namespace) -> Path:
    """The file that `shoal init` writes.

    Raises:
        UserError: it is there or cannot be, or there is no such model.
    """
    refuse_no_model(asked.model, asked.revision)
    file = out_path(f"{name_of_model(asked.model)}.yaml" if asked.out is None else asked.out)
    if file.exists():
        raise UserError(f"{file}: exists already; name another file with --out, or remove it")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent}: no such folder; create it, or name another file with --out")
    from shoal.models.download import config_of

    write_text(file, "", setting="--out")  # whether it can be
    file.unlink()
    config_of(asked.model, asked.revision, with_weights=False)  # refuses what is no model
    return file
