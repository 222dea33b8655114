"""`shoal completion`: a static script for bash and zsh, made of the parser and the recipe's keys."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from .settings import all_settings

ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
"""What lets zsh read a script for bash."""
SCRIPT = """\
_shoal() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words
    case "${{COMP_WORDS[1]}} $before" in
        {files}) COMPREPLY=($(compgen -f -- "$word")); return ;;
    esac
    case ${{COMP_WORDS[1]}} in
{cases}
        *) words={verbs} ;;
    esac
    [ "$COMP_CWORD" = 1 ] && words={verbs}
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _shoal shoal
"""


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for ``shell``, bash or zsh: verbs, their options and choices, and the keys that `explain` knows."""
    words_of = {verb: _words(verb, own) for verb, own in _verbs(parser)}
    cases = [f"        {verb}) words={shlex.quote(' '.join(words))} ;;" for verb, words in words_of.items()]
    files = "|".join(f'"{verb} {option}"' for verb, own in _verbs(parser) for option in _options(own, valued=True))
    script = SCRIPT.format(cases="\n".join(cases), verbs=shlex.quote(" ".join(words_of)), files=files)
    return script if shell == "bash" else ZSH + script


def _verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Every verb with its arguments."""
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for verb, own in subparsers.choices.items():
        yield verb, [action for action in own._actions if action.help != argparse.SUPPRESS]


def _words(verb: str, arguments: list[argparse.Action]) -> list[str]:
    """The words that may follow a verb."""
    choices = [str(choice) for argument in arguments for choice in argument.choices or ()]
    keys = dict.fromkeys(setting.place for setting in all_settings()) if verb == "explain" else ()
    return [*_options(arguments), *choices, *keys]


def _options(arguments: list[argparse.Action], *, valued: bool = False) -> list[str]:
    """Options; only those that a text follows where ``valued``, which nearly all name a file."""
    own = (each for each in arguments if not valued or (each.nargs != 0 and each.type is not int))
    return [name for argument in own for name in argument.option_strings]
