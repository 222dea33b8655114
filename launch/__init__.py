"""The roof: the command, its verbs, and what starts them. It alone knows several rooms; no room and no ground module
imports it.

distill.py, measure.py, eval.py and record.py are scripts as well: `deepspeed launch/distill.py --config RECIPE`.

    arguments  the words of the command: its verbs, what each takes
    cli        `shoal VERB RECIPE_OR_RUN_DIR [key=value ...]`
    distill    script: the distill verb on every rank
    eval       script: the eval verb on every rank
    measure    script: the measure verb on every rank
    record     script: the record verb on every rank

Folders:

    api        what `import shoal` offers, for models in memory
    early      what is refused before libraries are loaded
    help       the recipe's keys explained, what it can name, a first recipe
    verbs      the verbs of the command, each in its run directory
"""

from __future__ import annotations

import signal
import sys


def main(argv: list[str] | None = None) -> None:
    """Entry point of `shoal` and of the scripts of this folder."""
    _end_without_traceback()
    from .cli import main

    main(argv)


def _end_without_traceback() -> None:
    """Let Ctrl-C end the process in silence until its modules are loaded."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if sys.argv[:1] == ["-m"] and f"{__name__}.cli" in sys.orig_argv:
    _end_without_traceback()  # Python imports this folder before the module that it was told to run
