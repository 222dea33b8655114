"""`shoal measure | prune | record | distill | eval | report | run RECIPE_OR_RUN_DIR [key=value ...]`,
`shoal compare RUN_DIR RUN_OR_MODEL ...`, `shoal lab NAME RECIPE_OR_RUN_DIR`, and `shoal init | list | explain`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal import __version__, ranks
from shoal.errors import EXIT_USER_ERROR, UserError, explained_paths, not_encoded
from shoal.progress import doing
from shoal.ranks import Loudness
from shoal.redaction import redacted, redacted_arguments
from shoal.stopping import on_stop, stop_at_once, watch_launcher

from .help.verbs import Text, add_help_verbs, add_verb
from .verbs.launch import STARTED, LaunchEnded, launch_distill

if TYPE_CHECKING:
    from shoal.recipe.recipe import Recipe

    from .verbs.run import Run

log = logging.getLogger("shoal")

STOPPED = "shoal: stopped; what is answered or finished is kept, and the same command goes on from there"


@dataclass(frozen=True)
class Verb:
    """A verb that reads a recipe, and the functions of shoal that do its work, as `folder.module.function`."""

    help: str
    stage: str
    """Function of the run; of a verb that ``launches``, of the run and of what launches a training."""
    dry_run: tuple[str, str] | None = None
    """Function of the run that returns the text of --dry-run, and words for it; None = there is no --dry-run."""
    example: str = "--config my.yaml"
    """Words after the verb that its help shows."""
    check: str | None = None
    """Function of the run that refuses it before anything is written there."""
    needs_group: bool = False
    """Whether a process that no launcher started joins a process group, too."""
    launches: bool = False
    """Whether it locks the run directory and starts a launcher itself."""


VERBS = {
    "measure": Verb(
        "measure what every layer is worth: importance.json",
        "verbs.measure.measure",
        example="--config my.yaml measure.num_tokens=100_000",
    ),
    "prune": Verb(
        "choose layers and cut them out: plan.json, student/",
        "verbs.prune.prune",
        dry_run=("verbs.prune.prune_dry_run", "sizes, expected speed and targets before and after"),
        example="--config my.yaml prune.num_drop=6 --dry-run",
    ),
    "record": Verb(
        "write down what the teacher says of the training rows, to train from: signals/",
        "verbs.distill.record",
        needs_group=True,
    ),
    "distill": Verb(
        "train the cut model, made first where there is none, on the full one: distilled/; with eval.control the full "
        "one too: control/",
        "verbs.distill.distill",
        dry_run=(
            "verbs.distill.distill_dry_run",
            "memory by ZeRO stage, time, disk and the cheapest setting that fits this machine; train nothing",
        ),
        example="--config my.yaml distill.num_tokens=1e6 --dry-run",
    ),
    "eval": Verb(
        "score teacher, pruned, control and distilled: eval/*.json",
        "verbs.evaluate.evaluate",
        example="--config my.yaml eval.suite=quick eval.limit=50",
    ),
    "report": Verb(
        "report.html, report.md, and the Hub push where the recipe asks for it",
        "verbs.report.report",
        example="runs/mine",
        check="verbs.report.require_results",
    ),
    "run": Verb(
        "all of it, skipping what is done and unchanged",
        "verbs.pipeline.run_all",
        dry_run=(
            "verbs.dry_run.run_dry_run",
            "stage by stage what would be done, how long it takes here, how much disk",
        ),
        example="quickstart run_dir=runs/mine --dry-run",
        launches=True,
    ),
}
COMPARE = (
    "runs, and any other models, side by side: what each kept, at which size, speed and cost, and where they differ; "
    "needs no recipe"
)
LAB = "what a paper needs and a pruner does not: one part of the lab, on the model of a run"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `shoal` and of the scripts under launch/. Exits with 2 on wrong input, 130 on Ctrl-C, 143 on
    SIGTERM."""
    _accept_streams()
    watch_launcher()
    with on_stop(lambda number: stop_at_once(number, "shoal: stopped")):
        sys.exit(_main(sys.argv[1:] if argv is None else list(argv)))


def _accept_streams() -> None:
    """Say what can be said: a stream that is closed takes all, and one that lacks a character shows its number."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _main(argv: list[str]) -> int:
    # idle OpenMP threads that spin make every other process on the machine several times slower; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _parse(argv)
    if "work" in arguments:  # of a verb without a recipe
        return _exit_code(lambda: arguments.work(arguments), arguments.loudness)
    if getattr(arguments, "each", None):
        return _exit_code(lambda: _run_each(arguments), arguments.loudness)
    return run_verb(
        arguments.verb,
        arguments.config,
        arguments.overrides,
        dry_run=getattr(arguments, "dry_run", False),
        loudness=arguments.loudness,
    )


def run_verb(
    verb: str,
    config: str,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    loudness: Loudness = "usual",
) -> int:
    """Run one verb of a recipe or run directory, or only say what it would do; returns the exit code."""
    from shoal.recipe.recipe import read_settings, settled  # not for --help and --version

    def work() -> None:
        said, file = read_settings(config, overrides)
        recipe = settled(said, file, overrides)
        _refuse_early(verb, recipe)
        if dry_run:
            with doing(f"{verb} --dry-run"):
                text = _dry_run(verb, recipe)
            _print(text)
            return
        from .verbs.memory import remembering

        label = f"{verb}, in the ranks" if STARTED in os.environ else verb
        # training and its launcher listen themselves
        run_dir = Path(recipe.run_dir).expanduser()
        with (
            on_stop(lambda number: stop_at_once(number, STOPPED)),
            doing(label),
            remembering(run_dir, said) as memory,
        ):
            _dispatch(verb, recipe, config, overrides, memory=memory)
        if STARTED not in os.environ and ranks.is_main():
            from shoal.tracking.wandb_run import tell_unsent

            tell_unsent(recipe.track, run_dir)

    return _exit_code(work, loudness)


def _refuse_early(verb: str, recipe: Recipe) -> None:
    """Refuse what ``verb`` would find missing later on, before torch and transformers are loaded, which takes seconds.

    Raises:
        UserError: no such model, metric, task or DeepSpeed file, or a package that a format or an engine needs.
    """
    from shoal.eval.tasks.names import refuse_unknown
    from shoal.inference.vllm import check_vllm
    from shoal.models.checkpoint_files import refuse_no_model
    from shoal.recipe.deepspeed_file import read_deepspeed
    from shoal.recipe.measure import refuse_unknown_metrics
    from shoal.recipe.section import TEACHER_TEXT

    sweep, distill = recipe.measure.sweep, recipe.distill
    if verb != "report":
        refuse_no_model(recipe.model)
    if verb in ("measure", "run"):
        refuse_unknown_metrics(recipe.measure.metrics)
        if sweep is not None and not sweep.protocols:  # with which names lack their ending
            refuse_unknown(sweep.tasks, sweep.include_path, setting="measure.sweep.tasks")
    if verb in ("record", "distill", "run"):
        read_deepspeed(distill.deepspeed)
        if distill.watch is not None:
            refuse_unknown(distill.watch.tasks, recipe.eval.include_path, setting="distill.watch.tasks")
        if distill.writing.backend == "vllm" and any(source.path == TEACHER_TEXT for source in distill.data):
            texts = Path(distill.writing.folder or f"{recipe.run_dir}/text").expanduser()
            if not any(texts.glob("written-*")):  # which are read without it, if they are the recipe's
                check_vllm("distill.writing.backend")
    if verb == "record" and recipe.record.backend == "vllm":
        check_vllm("record.backend")
    if verb in ("eval", "run"):
        refuse_unknown(recipe.eval.tasks, recipe.eval.include_path)
        if recipe.eval.backend == "vllm":
            check_vllm("eval.backend")


def _exit_code(work: Callable[[], None], loudness: Loudness = "usual") -> int:
    """Do ``work``; the exit code, after the message of what a user can fix."""
    ranks.set_up_logging(loudness)
    try:
        with explained_paths():
            work()
    except UserError as error:
        log.debug("refused here:", exc_info=error)
        if not ranks.is_main():
            time.sleep(3)  # rank 0 most likely says the same, and the launcher then ends this one
        with contextlib.suppress(OSError):  # a full disk, where that is what is wrong
            print(f"shoal: error: {redacted(str(error))}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except LaunchEnded as ended:
        if ended.text:
            print(f"\nshoal: {ended.text}", file=sys.stderr, flush=True)
        return ended.code
    return 0


def _compare(arguments: argparse.Namespace) -> None:
    """Print the table of several runs, and write it with its figure."""
    from shoal.eval.compare.compare import compare_runs
    from shoal.eval.compare.page import comparison_text, write_comparison
    from shoal.models.checkpoint_files import names_model

    out, folders = Path(arguments.out).expanduser(), [Path(run) for run in arguments.runs]
    if any(map(names_model, arguments.runs)):
        with doing("loading the libraries"):
            from shoal import runtime

            runtime.turn_down_libraries()
            from .verbs.evaluate import scored_beside_runs
        folders = scored_beside_runs(arguments.runs, out, across_teachers=arguments.across_teachers)
    comparison = compare_runs(folders, across_teachers=arguments.across_teachers)
    _print(comparison_text(comparison))
    write_comparison(comparison, out)


def _run_each(arguments: argparse.Namespace) -> None:
    """A run for every combination of the values of --each, then their comparison."""
    from shoal.eval.compare.compare import compare_runs
    from shoal.eval.compare.page import comparison_text, write_comparison
    from shoal.recipe.recipe import load_recipe

    from .verbs.each import combinations, run_each

    def run_one(more: Sequence[str]) -> int:
        overrides = [*arguments.overrides, *more]
        return run_verb("run", arguments.config, overrides, dry_run=arguments.dry_run, loudness=arguments.loudness)

    run_dir = Path(load_recipe(arguments.config, arguments.overrides).run_dir).expanduser()
    runs = combinations(run_dir, arguments.each)
    if code := run_each(runs, run_one):
        sys.exit(code)
    if not arguments.dry_run:
        comparison = compare_runs([run.dir for run in runs])
        _print(comparison_text(comparison))
        write_comparison(comparison, run_dir / "compare")


def _dry_run(verb: str, recipe: Recipe) -> str:
    table = VERBS[verb].dry_run
    assert table is not None
    with doing("loading the libraries"):
        from shoal import runtime

        runtime.turn_down_libraries()
        from .verbs.run import open_run

        text_of = _stage(table[0])
    return text_of(open_run(recipe))


def _stage(name: str) -> Callable[..., Any]:
    """The function of shoal that a row of VERBS names; its module is loaded now."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"shoal.launch.{module}"), function)


def _print(text: str) -> None:
    """Print a result. Whoever reads it may leave before its end, as `head` does; what is written to files goes on.

    Raises:
        UserError: what is printed to takes no more.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more as it ends
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"standard output: takes no more ({error.strerror}); print to another place") from error


def _printing(text: Text) -> Callable[[argparse.Namespace], None]:
    """The work of a verb that only says something."""
    return lambda arguments: _print(text(arguments))


def _dispatch(
    verb: str,
    recipe: Recipe,
    config: str,
    overrides: Sequence[str],
    *,
    memory: str | None = None,
) -> None:
    if STARTED in os.environ and ranks.is_main():
        Path(os.environ[STARTED]).touch()
    with doing("loading the libraries"):
        from shoal import runtime

        runtime.turn_down_libraries()
        from shoal.tracking.wandb_run import wandb_mode

        from .verbs import distill, pipeline
        from .verbs.run import Run, locked, open_run

        row = VERBS[verb]
        stage: Callable[..., Any] = _distill if verb == "distill" else _stage(row.stage)
    launched = "LOCAL_RANK" in os.environ
    run = Run(recipe)  # its precision is settled where all ranks have joined
    wandb_mode(recipe.track)  # refuses now, not after hours
    if row.launches and launched:
        raise UserError(f"`shoal {verb}` starts its own launcher for distill; under one, call distill, measure or eval")

    def launch(own: Run, file: Path | None = None) -> None:
        launch_distill(own, *((config, overrides) if file is None else (str(file), ())))

    if verb == "distill" and not launched:
        run = open_run(recipe, memory=memory)
        distill.check_distill(run)
        distill.refuse_other_checkpoints(run)
        launch(run)
        return
    if launched or row.needs_group:
        with doing("joining the other ranks"):
            runtime.set_up_distributed(recipe.distill.timeout_s)
    run = open_run(recipe, memory=memory, computes=verb != "report")
    if row.launches:
        if text := stage(run, launch):
            _print(text)
        return
    if row.check:
        _stage(row.check)(run)
    with locked(run) if ranks.is_main() else contextlib.nullcontext():
        stage(run)
        runtime.leave_distributed()  # before an upload that the other ranks need not wait for
        pipeline.track(run)


def _distill(run: Run) -> None:
    with doing("loading DeepSpeed"):
        from shoal.train.distill import Stopped

        from .verbs import distill

    try:
        distill.distill(run)
    except Stopped as stopped:
        log.warning("%s; the same command goes on from there", stopped)
        sys.exit(128 + stopped.number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal", description="Make large language models shallower and get their abilities back."
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    local_rank = {"type": int, "help": argparse.SUPPRESS}  # the DeepSpeed launcher puts it behind script or module
    parser.add_argument("--local_rank", **local_rank)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, row in VERBS.items():
        sub = add_verb(verbs, verb, row.help, row.example)
        sub.add_argument("--config", metavar="RECIPE", help="the same as RECIPE, for a path that holds a `=`")
        sub.add_argument("--local_rank", **local_rank)
        if row.dry_run:
            sub.add_argument("--dry-run", action="store_true", help=f"print {row.dry_run[1]}; write nothing")
        if verb == "run":
            told = "a run for every value, in RUN_DIR/KEY=VALUE, and their comparison; may be said of several keys"
            sub.add_argument("--each", metavar="KEY=A,B", action="append", help=told)
        sub.add_argument(
            "recipe",
            nargs="?",
            metavar="RECIPE",
            help="recipe (YAML), by path or by a name of `shoal list recipes`; or a run directory, which knows its own",
        )
        sub.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="override a setting, see `shoal explain`"
        )
    compare = add_verb(verbs, "compare", COMPARE, "runs/a runs/b --out compare")
    compare.set_defaults(work=_compare)
    told = (
        "run directories with evaluations, and checkpoints (folder, Hub id or demo:<name>) that are scored as they were"
    )
    compare.add_argument("runs", nargs="+", metavar="RUN_DIR", help=f"{told}; two or more")
    compare.add_argument("--out", metavar="DIR", default="compare", help="where pages and figure go (default: compare)")
    compare.add_argument("--across-teachers", action="store_true", help="compare runs of different models too")
    lab = add_verb(verbs, "lab", LAB, "NAME runs/mine")
    lab.set_defaults(work=_printing(lambda known: importlib.import_module("shoal.lab.command").lab(known.words)))
    lab.add_argument("words", nargs="*", metavar="NAME | RECIPE_OR_RUN_DIR | key=value", help="none = list the parts")
    add_help_verbs(verbs, parser, _printing)
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    for word in argv:
        if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
            parser.error(not_encoded(repr(os.fsencode(word))))
    # overrides may stand before, between and after options; argparse alone takes them in one block only
    known, rest = parser.parse_known_args(argv)
    words = {"compare": "runs", "lab": "words"}.get(known.verb)  # which take words of their own there instead
    unknown = [word for word in rest if word.startswith("-")]
    if "--dry-run" in unknown:
        able = " or ".join(f"`shoal {verb} --dry-run`" for verb, row in VERBS.items() if row.dry_run)
        parser.error(f"`shoal {known.verb}` has no --dry-run; there is {able}")
    if unknown or (rest and "work" in known and words is None):
        parser.error(f"unrecognized arguments: {' '.join(redacted_arguments(unknown or rest))}")
    if words is not None:
        setattr(known, words, [*getattr(known, words), *rest])
        return known
    if "work" not in known:
        _name_recipe(parser, known, rest)
    return known


def _name_recipe(parser: argparse.ArgumentParser, known: argparse.Namespace, rest: Sequence[str]) -> None:
    """Tell the recipe from the overrides: the first word that is none, unless --config names it."""
    words = [*([] if known.recipe is None else [known.recipe]), *known.overrides, *rest]
    if known.config is None:
        known.config = next((word for word in words if "=" not in word or Path(word).is_dir()), None)
        if known.config is None:
            parser.error(f"name a recipe or a run directory, such as `shoal {known.verb} runs/mine`")
        words.remove(known.config)
    for other in (word for word in redacted_arguments(words) if "=" not in word):
        parser.error(f"override {other!r}: must have the form section.key=value")
    known.overrides = words


if __name__ == "__main__":
    main()
