"""The words of the command: its verbs, what each takes, and which of them is the recipe.

Nothing is loaded to read a command, so what a verb does is named and not imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import __version__
from shoal.errors import not_encoded
from shoal.formatting import meant
from shoal.redaction import redacted_arguments

LISTS = ("recipes", "tasks", "metrics", "losses", "data", "suites", "cluster")
"""Lists of shoal.launch.help.names."""


@dataclass(frozen=True)
class Verb:
    """One verb, and the functions of shoal that do its work, as `folder.module.function`."""

    help: str
    function: str
    """Function of the run; of `run`, of the run and of what launches a training. Of a verb without a recipe, of the
    parsed arguments, and it gives what is printed."""
    example: str = "--config my.yaml"
    """Words after the verb that its help shows."""
    dry_run: tuple[str, str] | None = None
    """Function of the run that returns the text of --dry-run, and words for it; None = there is no --dry-run."""
    reads_recipe: bool = True


VERBS = {
    "measure": Verb(
        "measure what every layer is worth: importance.json",
        "launch.verbs.measure.measure",
        "--config my.yaml measure.num_tokens=100_000",
    ),
    "prune": Verb(
        "choose layers and cut them out: plan.json, student/",
        "launch.verbs.prune.prune",
        "--config my.yaml prune.num_drop=6 --dry-run",
        ("launch.verbs.dry_run.prune_dry_run", "sizes, expected speed and targets before and after"),
    ),
    "record": Verb(
        "write down what the teacher says of the training rows, to train from: signals/",
        "launch.verbs.distill.record",
    ),
    "distill": Verb(
        "train the cut model, made first where there is none, on the full one: distilled/; with eval.control the full "
        "one too: control/",
        "launch.verbs.distill.distill",
        "--config my.yaml distill.num_tokens=1e6 --dry-run",
        (
            "launch.verbs.dry_run.distill_dry_run",
            "memory by ZeRO stage, time, disk and the cheapest setting that fits this machine; train nothing",
        ),
    ),
    "eval": Verb(
        "score teacher, pruned, control and distilled: eval/*.json",
        "launch.verbs.evaluate.evaluate",
        "--config my.yaml eval.tasks=quick eval.limit=50",
    ),
    "report": Verb(
        "report.html, report.md, and the Hub push where the recipe asks for it",
        "launch.verbs.report.report",
        "runs/mine",
    ),
    "run": Verb(
        "all of it, skipping what is done and unchanged",
        "launch.verbs.pipeline.run_all",
        "quickstart run_dir=runs/mine --dry-run",
        (
            "launch.verbs.dry_run.run_dry_run",
            "stage by stage what would be done, how long it takes here, how much disk",
        ),
    ),
    "compare": Verb(
        "runs, and any other models, side by side: what each kept, at which size, speed and cost, and where they "
        "differ; needs no recipe",
        "launch.verbs.several.compare",
        "runs/a runs/b --out compare",
        reads_recipe=False,
    ),
    "lab": Verb(
        "what a paper needs and a pruner does not: one part of the lab, on the model of a run",
        "lab.command.command",
        "NAME runs/mine",
        reads_recipe=False,
    ),
    "init": Verb(
        "write a commented recipe for a model and this machine, from the model's configuration alone",
        "launch.help.first_recipe.init",
        "Qwen/Qwen3-8B --out qwen.yaml",
        reads_recipe=False,
    ),
    "list": Verb(
        "names that a recipe can use, and example files for a cluster",
        "launch.help.names.told",
        "tasks",
        reads_recipe=False,
    ),
    "explain": Verb(
        "what a key of a recipe means, its default and what it may be; without KEY all sections",
        "launch.help.explain.told",
        "distill.losses.forward_kl.temperature",
        reads_recipe=False,
    ),
}
OTHER_WORDS = {
    **dict.fromkeys(("train", "finetune", "heal"), "distill"),
    **dict.fromkeys(("evaluate", "test"), "eval"),
    **dict.fromkeys(("cut", "drop"), "prune"),
    **dict.fromkeys(("score", "importance"), "measure"),
    **dict.fromkeys(("sweep", "search"), "run RECIPE --each KEY=A,B"),
}
"""What other programs call a verb -> the words here."""
LOCAL_RANK: dict[str, Any] = {"type": int, "help": argparse.SUPPRESS}
"""The DeepSpeed launcher puts it behind script or module."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's words by name; argparse ends the process where they are wrong."""
    parser = _parser()
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        known = f"there are {', '.join(VERBS)}"
        meant_one = OTHER_WORDS.get(verb)
        hint = f"did you mean `shoal {meant_one}`?" if meant_one else meant(verb, VERBS, known)
        parser.error(f"{redacted_arguments([verb])[0]}: no such verb; {hint}")
    for word in argv:
        if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
            parser.error(not_encoded(repr(os.fsencode(word))))
    # overrides may stand before, between and after options; argparse alone takes them in one block only
    known, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if "--dry-run" in unknown:
        able = " or ".join(f"`shoal {verb} --dry-run`" for verb, row in VERBS.items() if row.dry_run)
        parser.error(f"`shoal {known.verb}` has no --dry-run; there is {able}")
    if unknown or (rest and "words" not in known):
        parser.error(f"unrecognized arguments: {' '.join(redacted_arguments(unknown or rest))}")
    if "words" in known:
        known.words += rest
    if VERBS[known.verb].reads_recipe:
        _name_recipe(parser, known)
    return known


def _name_recipe(parser: argparse.ArgumentParser, known: argparse.Namespace) -> None:
    """Tell the recipe from the overrides: the first word that is none, unless --config names it."""
    if known.config is None:
        known.config = next((word for word in known.words if "=" not in word or Path(word).is_dir()), None)
        if known.config is None:
            parser.error(f"name a recipe or a run directory, such as `shoal {known.verb} runs/mine`")
        known.words.remove(known.config)
    for other in (word for word in redacted_arguments(known.words) if "=" not in word):
        parser.error(f"override {other!r}: must have the form section.key=value")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal", description="Make large language models shallower and get their abilities back."
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    parser.add_argument("--local_rank", **LOCAL_RANK)
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_PrintCompletion,
        help="print a script for a shell",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, row in VERBS.items():
        sub = verbs.add_parser(verb, help=row.help, description=row.help, epilog=f"example: shoal {verb} {row.example}")
        loudness = sub.add_mutually_exclusive_group()
        for option, said in (
            ("quiet", "say results, warnings and errors only"),
            ("verbose", "also say what libraries and all ranks log, and where a refusal comes from"),
        ):
            loudness.add_argument(
                f"--{option}", dest="loudness", action="store_const", const=option, default="usual", help=said
            )
        if row.reads_recipe:
            _add_recipe(sub, row)
        else:
            _add_words(sub, verb)
    return parser


def _add_recipe(sub: argparse.ArgumentParser, row: Verb) -> None:
    """What a verb takes that reads a recipe."""
    sub.add_argument("--config", metavar="RECIPE", help="the same as RECIPE, for a path that holds a `=`")
    sub.add_argument("--local_rank", **LOCAL_RANK)
    sub.set_defaults(dry_run=False, each=None)
    if row.dry_run:
        sub.add_argument("--dry-run", action="store_true", help=f"print {row.dry_run[1]}; write nothing")
    if row is VERBS["run"]:
        told = "a run for every value, in RUN_DIR/KEY=VALUE, and their comparison; may be said of several keys"
        sub.add_argument("--each", metavar="KEY=A,B", action="append", help=told)
    sub.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | section.key=value",
        help="recipe (YAML), by path or by a name of `shoal list recipes`, or a run directory, which knows its own; "
        "and settings to override, see `shoal explain`",
    )


def _add_words(sub: argparse.ArgumentParser, verb: str) -> None:
    """What ``verb`` takes, which reads no recipe."""
    match verb:
        case "compare":
            told = "run directories with evaluations, and checkpoints (folder, Hub id or demo:<name>) that are scored"
            sub.add_argument("words", nargs="+", metavar="RUN_DIR", help=f"{told} as they were; two or more")
            sub.add_argument(
                "--out", metavar="DIR", default="compare", help="where pages and figure go (default: compare)"
            )
            sub.add_argument("--across-teachers", action="store_true", help="compare runs of different models too")
        case "lab":
            told = "none = list the parts"
            sub.add_argument("words", nargs="*", metavar="NAME | RECIPE_OR_RUN_DIR | key=value", help=told)
        case "init":
            sub.add_argument("model", metavar="MODEL", help="Hub id, local path or demo:<name>")
            sub.add_argument("--revision", help="Hub revision of the model")
            sub.add_argument(
                "--out", metavar="FILE", help="where the recipe goes (default: NAME.yaml, after the model)"
            )
        case "list":
            kinds = f"kind of names: {', '.join(LISTS)}; without it these"
            sub.add_argument("what", nargs="?", metavar="WHAT", choices=LISTS, help=kinds)
        case _:
            sub.add_argument("key", nargs="?", metavar="KEY", help="section, section.key, or one below a kind")


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _namespace: Any, values: Any, _option: Any = None) -> None:
        import shtab

        sys.stdout.write(shtab.complete(parser, shell=values))
        parser.exit()
