"""The words of the command: its verbs, what each takes, and which of them is the recipe.

Nothing is loaded to read a command but the types of a recipe, so what a verb does is named and not imported.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from shoal import __version__
from shoal.errors import not_encoded
from shoal.formatting import meant
from shoal.recipe.asked import ALLOW
from shoal.redaction import printable, redacted_arguments, shortened
from shoal.yaml_text import own_yaml


@dataclass(frozen=True)
class Verb:
    """One verb, and the function of shoal that does its work, as `folder.module.function`."""

    help: str
    function: str
    """Function of the run; of `run`, of the run and of what launches a training. Of a verb without a recipe, of the
    parsed arguments, and it gives what is printed."""
    examples: tuple[str, ...]
    """Words after the verb that its help shows, and after two blanks what they are for."""
    sections: tuple[str, ...] = ()
    """Sections of the recipe whose keys are options without their section, the first one that has the key."""

    @property
    def reads_recipe(self) -> bool:
        """Whether it works on a recipe, a run directory or a model."""
        return bool(self.sections)


_LISTED, _TAKEN = (own_yaml(__file__, name) for name in ("verbs.yaml", "options.yaml"))
VERBS = {
    name: Verb(row["help"], row["function"], tuple(row["examples"]), tuple(row.get("sections", ())))
    for name, row in _LISTED.items()
}
LISTS: tuple[str, ...] = tuple(_TAKEN["list"]["what"]["choices"])
"""Lists of shoal.launch.help.names."""
OTHER_WORDS = {word: verb for verb, words in own_yaml(__file__, "words.yaml").items() for word in words}
"""What other programs call a verb -> the words here."""
LETTERS = {"m": "model", "t": "tasks", "L": "limit", "f": "num_fewshot", "b": "batch_size", "o": "output_path"}
"""Options of one letter that lm_eval has -> their names there."""
OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dry-run", "json", "quiet", "verbose", "allow"), ()),
    "force": ("run", "distill"),
    "each": ("run",),
}
"""Option that is no key -> the verbs with a recipe that have it, none = all of them."""
BEFORE = ("--version", "--local_rank", "--print-completion")
LOCAL_RANK: dict[str, Any] = {"type": int, "help": argparse.SUPPRESS}
"""The DeepSpeed launcher puts it behind script or module."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's words by name; the process ends where they are wrong."""
    completes = any(word.startswith("--print-completion") for word in argv)
    verb = next((word for word in argv if not word.startswith("-") and not completes), None)
    told = completes or bool({"-h", "--help"}.intersection(argv))
    parser = _parser(VERBS if completes else [verb] if told else ())
    for word in argv:
        if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
            parser.error(not_encoded(repr(os.fsencode(word))))
    if sum(word.partition("=")[0] == "--config" for word in argv) > 1:
        parser.error("--config: is given twice; name one recipe")
    first = "".join(argv[:1]).partition("=")[0]
    if first.startswith("--") and first not in BEFORE and not told and not VERBS.keys().isdisjoint(argv):
        own = next(filter(VERBS.__contains__, argv))
        parser.error(f"{redacted_arguments([first])[0]}: stands before the command; write it after `shoal {own}`")
    if verb is not None and verb not in VERBS:
        word = OTHER_WORDS.get(verb)
        hint = f"did you mean `shoal {word}`?" if word else meant(verb, VERBS, f"the commands are {', '.join(VERBS)}")
        parser.error(f"{redacted_arguments([verb])[0]}: no such command; {hint}")
    if verb is not None and VERBS[verb].reads_recipe and not told:
        argv = list(_with_keys_as_words(parser, argv, VERBS[verb].sections))
    # overrides may stand before, between and after options; argparse alone takes them in one block only
    known, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown and VERBS[known.verb].reads_recipe:
        parser.error(_no_option(known.verb, unknown[0]))
    if unknown or (rest and "words" not in known):
        parser.error(f"unrecognized arguments: {' '.join(redacted_arguments(unknown or rest))}")
    if "words" in known:
        known.words += rest
    if VERBS[known.verb].reads_recipe:
        _name_recipe(parser, known)
    return known


def _with_keys_as_words(parser: argparse.ArgumentParser, argv: Sequence[str], sections: Sequence[str]) -> Iterator[str]:
    """The words of a command, every option that is a key of the recipe as `section.key=value`."""
    from shoal.recipe.evaluate import CONFIGS_DIR
    from shoal.recipe.keys import flow_text, may_be, place_of, type_at

    def may_stand_alone(word: str) -> bool:  # as a recipe, a model, an override
        names = word, CONFIGS_DIR / f"{word}.yaml"
        return re.search(r"^-|[=/:]|\.ya?ml$", word) is not None or any(map(os.path.exists, names))

    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        is_option = name.startswith("--")
        place = place_of(name.removeprefix("--").replace("-", "_") if is_option else name, sections)
        if place is None or not (is_option or equals) or os.path.isdir(word):
            yield word
            continue
        kind = type_at(place)
        is_switch = may_be(kind, "true")
        is_value = bool(rest) and not rest[0].startswith("--")
        if not equals and is_value and (not is_switch or may_be(kind, rest[0]) or not may_stand_alone(rest[0])):
            value = rest.pop(0)
        elif not equals and is_switch:
            value = "true"
        if is_option and not value:
            parser.error(f"{redacted_arguments([name])[0]}: needs a value; `shoal explain {place}` shows which")
        yield f"{place}={flow_text(kind, value)}"


def _no_option(verb: str, option: str) -> str:
    """That ``verb`` has no such option, and which one is meant."""
    from shoal.recipe.gone import gone
    from shoal.recipe.keys import short_name
    from shoal.recipe.messages import all_places, meant_key
    from shoal.recipe.recipe import Recipe

    sections, name = VERBS[verb].sections, option.lstrip("-").partition("=")[0]
    word = LETTERS.get(name, name).replace("-", "_")
    for place in (word, *(f"{section}.{word}" for section in sections)):
        if words := gone(place):
            return f"{place}: {words}"
    keys = [short_name(place, sections) for place in all_places(Recipe)]
    own = [each for each, verbs in OPTIONS.items() if verb in (verbs or VERBS)]
    if (other := word.removeprefix("no_")) in keys:
        hint = f"`shoal {verb} --{other} {'VALUE' if other == word else 'false'}`"
    elif name in OPTIONS:
        hint = f"it is one of `shoal {' | '.join(OPTIONS[name])}`"
    elif close := get_close_matches(name.lower().replace("_", "-"), own, n=1, cutoff=0.7):
        hint = f"did you mean --{close[0]}?"
    else:
        hint = meant_key(word.rpartition(".")[2], keys, Recipe)
    return f"{redacted_arguments([option])[0]}: `shoal {verb}` has no such option; {hint}"


def _name_recipe(parser: argparse.ArgumentParser, known: argparse.Namespace) -> None:
    """Tell the recipe from the overrides: the first word that is none, unless --config or `model` names it."""
    if known.config is None:
        named = [word.removeprefix("model=") for word in reversed(known.words) if word.startswith("model=")]
        own = [word for word in known.words if "=" not in word or os.path.isdir(word)]
        if not own + named:
            parser.error(f"name a recipe, a run directory or a model, such as `shoal {known.verb} runs/mine`")
        known.config = (own + named)[0]
        known.words.remove(known.config if own else f"model={known.config}")
    if known.verb == "push":
        known.words = [word if "=" in word else f"export.hub_repo={word}" for word in known.words]
    known.words += [f"{ALLOW}={kinds}" for kinds in known.allow]
    keys = [word.partition("=")[0] for word in dict.fromkeys(known.words) if not word.startswith("run_dir=")]
    if twice := next((key for key in keys if keys.count(key) > 1 and key != ALLOW), None):
        parser.error(f"{redacted_arguments([twice])[0]}: is given twice; give it once")
    for other in (word for word in redacted_arguments(known.words) if "=" not in word):
        is_more = other.lstrip("-").isdecimal() or os.path.exists(other)
        hint = "; a list is one word, such as 13,14,26 or a.jsonl,b.jsonl" if is_more else ""
        parser.error(f"override {other!r}: must have the form section.key=value{hint}")


def _parser(with_keys: Container[str | None] = ()) -> argparse.ArgumentParser:
    """The parser of the command; the help and completion of the verbs ``with_keys`` know the keys of the recipe."""
    parser = _Parser(prog="shoal", description="Make large language models shallower and get their abilities back.")
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    parser.add_argument("--local_rank", **LOCAL_RANK)
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_PrintCompletion,
        help="print a completion script for a shell",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for verb, row in VERBS.items():
        shown = [example.partition("  ")[::2] for example in row.examples]
        width = max(len(words) for words, _ in shown)
        examples = "\n".join(f"  shoal {verb} {words:<{width}}  {what.strip()}" for words, what in shown)
        repository = " [OWNER/NAME]" * (verb == "push")
        sub = verbs.add_parser(
            verb,
            help=row.help,
            description=f"{row.help}\n\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"shoal {verb} RECIPE | RUN_DIR | MODEL{repository} [--option value | section.key=value ...]"
            if row.reads_recipe
            else None,
            allow_abbrev=False,
        )
        loudness = sub.add_mutually_exclusive_group()
        for option, said in _TAKEN["loudness"].items():
            loudness.add_argument(
                f"--{option}", dest="loudness", action="store_const", const=option, default="usual", help=said
            )
        if verb not in ("init", "lab"):
            sub.add_argument("--json", dest="as_json", action="store_true", help="print the result as JSON")
        for name, own in {**(_TAKEN["recipe"] if row.reads_recipe else {}), **_TAKEN.get(verb, {})}.items():
            sub.add_argument(name, **own)
        if row.reads_recipe:
            sub.add_argument("--config", help=argparse.SUPPRESS)  # of launchers, and for a path that holds a `=`
            sub.add_argument("--local_rank", **LOCAL_RANK)
            sub.set_defaults(force=False, each=None)
        if row.reads_recipe and verb in with_keys:
            from .help.options import add_keys

            add_keys(sub, row.sections)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(shortened(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _namespace: Any, values: Any, _option: Any = None) -> None:
        import shtab

        sys.stdout.write(shtab.complete(parser, shell=values))
        parser.exit()
