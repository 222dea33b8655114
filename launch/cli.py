"""`shoal run | measure | prune | record | distill | eval | report | push RECIPE_OR_RUN_DIR_OR_MODEL [--key value ...]`,
`shoal compare RUN_DIR RUN_OR_MODEL ...`, `shoal lab NAME RECIPE_OR_RUN_DIR`, and `shoal init | list | explain`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal import ranks
from shoal.errors import EXIT_USER_ERROR, UserError, explained_paths
from shoal.installed import refuse_untested
from shoal.progress import doing, loading
from shoal.ranks import Loudness, refuse_variables
from shoal.redaction import printable, redacted, shortened
from shoal.stopping import Stopped, on_stop, stop_at_once, watch_launcher

from .arguments import VERBS, parse
from .verbs.launch import DONE, STARTED, LaunchEnded, LaunchRefused, launch_ranks, ranks_of, see_devices, seeing

if TYPE_CHECKING:
    from shoal.recipe.recipe import Recipe

    from .verbs.run import Run

log = logging.getLogger("shoal")

RANKED = ("measure", "record", "distill", "eval")
"""Verbs whose work several ranks share."""
STOPPED = "shoal: stopped; answered and finished work is kept, and the same command resumes from there"

PEER_IS_GONE = ("closed by peer", "reset by peer", "remote process exited", "Connection was likely closed")
"""What gloo, NCCL and the store that ranks meet at call the end of another rank."""


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
    for name, value in ranks.VARIABLES["unless_set"].items():
        os.environ.setdefault(name, value)
    see_devices()
    asked = parse(argv)
    if not VERBS[asked.verb].reads_recipe:
        code = _exit_code(lambda: _print(_told(asked)), asked.loudness)
        return code or getattr(asked, "exit_code", 0)
    how = {name: getattr(asked, name) for name in ("dry_run", "force", "as_json", "loudness")}
    run = partial(run_verb, asked.verb, asked.config, **how)
    if asked.each:
        run = partial(run, as_json=asked.as_json and asked.dry_run)
        return _exit_code(lambda: _print(_function("launch.verbs.several.each")(asked, run)), asked.loudness)
    return run(asked.words)


def run_verb(
    verb: str,
    config: str,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    force: bool = False,
    as_json: bool = False,
    loudness: Loudness = "usual",
) -> int:
    """Run one verb of a recipe, run directory or model, or only say what it would do; returns the exit code.

    ``force``: it goes on although memory or disk will not do; ``as_json``: what it prints is for a program.
    """
    from shoal.recipe.recipe import read_settings, settled  # not for --help and --version
    from shoal.recipe.remembered import remembering

    from .early import refuse_early

    ranks.VOICE.events = as_json

    def work() -> None:
        refuse_untested()
        said, file = read_settings(config, overrides)
        recipe = settled(said, file, overrides)
        with seeing(recipe.device):
            done(recipe, said)

    def done(recipe: Recipe, said: dict[str, Any]) -> None:
        refuse_early(verb, recipe, writes=not dry_run)
        if dry_run:
            with doing(f"{verb} --dry-run"):
                told = _dry_run(verb, recipe, as_json=as_json)
            _print(told)
            return
        run_dir = Path(recipe.run_dir).expanduser()
        # training and its launcher listen themselves
        with (
            on_stop(lambda number: stop_at_once(number, STOPPED)),
            doing(f"{verb}, in the ranks" if STARTED in os.environ else verb),
            # a push is an act, and no setting of the run
            contextlib.nullcontext() if verb == "push" else remembering(run_dir, said) as memory,
        ):
            launch = partial(launch_ranks, config=config, overrides=overrides)
            run = _dispatch(verb, recipe, memory, launch, force=force)
        if ranks.is_main() and STARTED not in os.environ:
            from .verbs.results import result, scores_text

            _print(result(verb, run) if as_json else scores_text(run) if verb == "eval" else "")

    return _exit_code(work, loudness)


def _told(asked: argparse.Namespace) -> Any:
    """What a verb says that reads no recipe: text, or what is to be JSON."""
    if asked.verb != "doctor":  # which tells more of it
        refuse_untested()
    if asked.verb == "init":
        from .early.asked import init_file

        asked.out = init_file(asked)
    elif asked.verb == "doctor" and Path(asked.run_dir).expanduser().is_file():
        raise UserError(f"--run-dir: {asked.run_dir} is a file; name a folder")
    with loading() if asked.verb == "init" else contextlib.nullcontext():
        tell = _function(VERBS[asked.verb].function)
    return tell(asked)


def _exit_code(work: Callable[[], None], loudness: Loudness = "usual") -> int:
    """Do ``work``; the exit code, after the message of what a user can fix."""
    follows = False
    try:
        follows = not ranks.is_main()
        ranks.set_up_logging(loudness)
        refuse_variables()
        with explained_paths():
            work()
    except LaunchRefused:
        return EXIT_USER_ERROR
    except UserError as error:
        log.debug("error raised here:", exc_info=error)
        if follows:
            time.sleep(3)  # rank 0 most likely says the same, and the launcher then ends this one
        with contextlib.suppress(OSError):  # a full disk, where that is what is wrong
            print(f"shoal: error: {printable(shortened(redacted(str(error))))}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except MemoryError as error:
        log.debug("error raised here:", exc_info=error)
        print("shoal: error: this process may take no more memory; raise its limit (`ulimit -v`)", file=sys.stderr)
        return EXIT_USER_ERROR
    except RuntimeError as error:
        if not any(words in str(error) for words in PEER_IS_GONE):
            raise
        log.debug("another rank was lost here:", exc_info=error)
        time.sleep(3)  # it says why, and the launcher then ends this one
        print(f"shoal: rank {ranks.rank()}: another rank has ended, so this one does", file=sys.stderr, flush=True)
        return 1
    except Stopped as stopped:
        log.warning("%s; the same command resumes from there", stopped)
        return 128 + stopped.number
    except LaunchEnded as ended:
        if ended.text:
            print(f"\nshoal: {ended.text}", file=sys.stderr, flush=True)
        return ended.code
    if STARTED in os.environ and ranks.is_main():
        Path(os.environ[STARTED]).write_text(DONE)
    return 0


def _function(name: str) -> Callable[..., Any]:
    """The function that a row of VERBS names; its module is loaded now."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"shoal.{module}"), function)


def _print(told: Any) -> None:
    """Print a result, as JSON what is no text.

    Whoever reads it may leave before its end, as `head` does; what is written to files goes on.

    Raises:
        UserError: what is printed to takes no more.
    """
    text = printable(told) if isinstance(told, str) else json.dumps(told, ensure_ascii=False, default=str)
    try:
        if text:
            print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more as it ends
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"standard output: cannot be written ({error.strerror}); redirect it to a file") from error


def _dry_run(verb: str, recipe: Recipe, *, as_json: bool) -> Any:
    with loading():
        from .verbs.dry_run import dry_run, dry_run_text
        from .verbs.run import open_run
    run = open_run(recipe)
    stages = dry_run(verb, run)
    if as_json:
        return {"run_dir": str(run.dir), "dry_run": True, "stages": list(map(asdict, stages))}
    return dry_run_text(stages, run.dir)


def _dispatch(verb: str, recipe: Recipe, memory: str | None, launch: Callable[..., None], *, force: bool) -> Run:
    """Do what ``verb`` does; the run it was done in."""
    if STARTED in os.environ and ranks.is_main():
        Path(os.environ[STARTED]).touch()
    # a process that had torch before may have computed, and one that computes cannot be forked
    launched, forks = "LOCAL_RANK" in os.environ, verb in ("run", "distill") and "torch" not in sys.modules
    with loading():
        from shoal import runtime

        from .verbs import distill, pipeline
        from .verbs.run import locked, open_run

        stage = _function(VERBS[verb].function)
        if forks and not launched:
            import shoal.eval.evaluate
            import shoal.train.distill  # noqa: F401  # the rank has both then, as this process will

            from .verbs.launch import forked_rank

            launch = partial(launch, forked=forked_rank(recipe, main))
    if verb == "run" and launched:
        raise UserError("`shoal run` starts its own launchers; under a launcher, call measure, prune, distill and eval")
    if launched or (verb == "record" and ranks_of(verb, recipe) == 1):
        with doing("joining the other ranks"):
            runtime.set_up_distributed(recipe.distill.ddp_timeout)
    run = replace(open_run(recipe, memory=memory, computes=verb not in ("report", "push")), force=force)
    if launched:
        log.debug("teacher: %s", run.teacher)  # every rank meets the others here, and none within a decision of rank 0
    if verb == "run":
        pipeline.run_all(run, launch)
        return run
    if not launched and (verb == "distill" or (verb in RANKED and ranks_of(verb, recipe) > 1)):
        with locked(run):  # where its sizes are kept for the ranks
            if verb == "distill":
                distill.check_distill(run)
                distill.refuse_other_checkpoints(run)
        launch(verb, run)
        return run
    with locked(run) if ranks.is_main() else contextlib.nullcontext():
        with _alive(run) if launched and verb != "distill" else contextlib.nullcontext():
            stage(run)
            runtime.leave_distributed()  # before an upload that the other ranks need not wait for
        pipeline.track(run)
    return run


@contextlib.contextmanager
def _alive(run: Run) -> Iterator[None]:
    """End this rank while the block runs if another one does not respond; `distill` looks at their progress too."""
    with loading():
        from shoal.train.engine.stop import Heartbeat
    heartbeat = Heartbeat(run.dir, timeout_s=run.recipe.distill.ddp_timeout)
    heartbeat.start()
    yield
    heartbeat.stop()


if __name__ == "__main__":
    main()
