"""The verbs that say something of shoal itself: their arguments, and the text that each prints.

Nothing is loaded to parse a command, so every import is where it is used.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.progress import doing

INIT = "write a commented recipe for a model and this machine, from the model's configuration alone"
LIST = "names that a recipe can use, and example files for a cluster"
EXPLAIN = "what a key of a recipe means, its default and what it may be; without KEY all sections"
LISTS = ("recipes", "tasks", "metrics", "losses", "data", "suites", "cluster")
"""Lists of shoal.launch.help.names."""

Text = Callable[[argparse.Namespace], str]


def add_verb(verbs: Any, name: str, about: str, example: str) -> argparse.ArgumentParser:
    """The parser of one more verb of ``verbs``; ``example`` is what its help shows after the verb."""
    parser = verbs.add_parser(name, help=about, description=about, epilog=f"example: shoal {name} {example}")
    loudness = parser.add_mutually_exclusive_group()
    for option, said in (
        ("quiet", "say results, warnings and errors only"),
        ("verbose", "also say what libraries and all ranks log, and where a refusal comes from"),
    ):
        loudness.add_argument(
            f"--{option}", dest="loudness", action="store_const", const=option, default="usual", help=said
        )
    return parser


def add_help_verbs(verbs: Any, parser: argparse.ArgumentParser, run: Callable[[Text], Any]) -> None:
    """Add them to ``verbs``, the subparsers of ``parser``. What ``run`` makes of a text is each one's `work`."""
    init = add_verb(verbs, "init", INIT, "Qwen/Qwen3-8B --out qwen.yaml")
    init.add_argument("model", metavar="MODEL", help="Hub id, local path or demo:<name>")
    init.add_argument("--revision", help="Hub revision of the model")
    init.add_argument("--out", metavar="FILE", help="where the recipe goes (default: NAME.yaml, after the model)")
    init.set_defaults(work=run(_init))
    names = add_verb(verbs, "list", LIST, "tasks --json")
    kinds = f"kind of names: {', '.join(LISTS)}; without it these"
    names.add_argument("what", nargs="?", metavar="WHAT", choices=LISTS, help=kinds)
    names.set_defaults(work=run(_list))
    explain = add_verb(verbs, "explain", EXPLAIN, "distill.losses.forward_kl.temperature")
    explain.add_argument("key", nargs="?", metavar="KEY", help="section, section.key, or one below a kind")
    explain.set_defaults(work=run(_explain))
    for sub in (names, explain):
        sub.add_argument("--json", action="store_true", help="print JSON, for a script")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_PrintCompletion,
        help="print a script for a shell",
    )


def _init(arguments: argparse.Namespace) -> str:
    """Write a first recipe, and say where."""
    from shoal.atomic_files import write_text
    from shoal.recipe.recipe import name_of_model

    file = Path(arguments.out or f"{name_of_model(arguments.model)}.yaml").expanduser()
    if file.exists():
        raise UserError(f"{file}: is there already; name another file with --out, or remove it")
    with doing("loading the libraries"):
        from shoal import runtime

        runtime.turn_down_libraries()
        from .first_recipe import Machine, first_recipe
    with doing(f"looking at {arguments.model}"):
        text = first_recipe(arguments.model, Machine.here(), revision=arguments.revision)
    write_text(file, text, setting="--out")
    return f"{file} is written; read it, then: shoal run --config {shlex.quote(str(file))}"


def _list(arguments: argparse.Namespace) -> str:
    from . import names

    if arguments.what is None:
        return _json(LISTS) if arguments.json else "\n".join(f"shoal list {what}" for what in LISTS)
    if arguments.what == "metrics":
        from shoal import runtime

        runtime.turn_down_libraries()  # which their classes load
    return _json(names.LISTS[arguments.what]()) if arguments.json else names.listing(arguments.what)


def _explain(arguments: argparse.Namespace) -> str:
    from .explain import explained, explanation

    return _json(explanation(arguments.key)) if arguments.json else explained(arguments.key)


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _namespace: Any, values: Any, _option: Any = None) -> None:
        import shtab

        sys.stdout.write(shtab.complete(parser, shell=values))
        parser.exit()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
