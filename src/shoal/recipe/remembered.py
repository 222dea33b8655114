"""recipe.yaml in a run directory: the recipe and every override that the run was made with, so that none is repeated.

It holds what was said and no defaults, as one recipe file with all overrides would. It is signed as checkpoints are
(shoal.trust): a recipe can name code to run and places to send results to, and a run directory may come from anybody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from shoal.atomic_files import write_text
from shoal.errors import UserError
from shoal.model_names import model_within
from shoal.ranks import is_main
from shoal.redaction import HIDDEN, redacted
from shoal.trust import CONSENT, is_signed, is_trusted, signed
from shoal.yaml_text import read_yaml

FILE = "recipe.yaml"
LOCK = ".lock"
RESULTS = (FILE, "run.json", "importance.json", "plan.json", "distill.json", "eval/*.json", "*/config.json")
"""What a run leaves, whichever stages it had."""
FOLDERS = ("checkpoints", "control", "distilled", "eval", "figures", "gguf", "signals", "student", "text")
"""What stages write into or replace."""
IN_FOLDERS = ("lab", "sweep", "wandb", ".ranks", "eval/items", "control/checkpoints", "control/distilled")
FILES = (*RESULTS, "log.jsonl", "results.json", "report.md", "report.html", "wandb_run_id", "wandb_logged")
"""Other folders of a run, and its files."""
_HEAD = "# kept by shoal: the settings of this run, with overrides; `shoal COMMAND RUN_DIR` reads them\n"
_OURS = re.compile(r"# kept by shoal: .*\n(# signature (?P<signature>\w+)\n)?")


def memory_of(said: dict[str, Any]) -> str:
    """The text of recipe.yaml for what a recipe and overrides say."""
    body = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
    signature = signed({"recipe": body}).get("signature")
    return _HEAD + (f"# signature {signature}\n" if signature else "") + body


def memory_in(run_dir: Path) -> str | None:
    """The text of the recipe.yaml that is there now; None where there is none."""
    file = run_dir / FILE
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def recipe_in(run_dir: Path) -> Path:
    """The recipe.yaml of a run directory.

    Raises:
        UserError: there is none, or none that this user's shoal keeps there, which nobody has vouched for.
    """
    file, text = run_dir / FILE, memory_in(run_dir)
    if text is None:
        remedy = model_within(run_dir) or f"a recipe with run_dir={run_dir}"
        raise UserError(
            f"{run_dir}: neither a run directory (it has no {FILE}) nor a model (it has no config.json); name {remedy}"
        )
    if not _is_signed(text) and not is_trusted(run_dir):
        raise UserError(
            f"{file}: is not signed with your key, and somebody else's recipe can run code; read it, then name the "
            f"file itself: {file} run_dir={run_dir}, or set the environment variable {CONSENT}={run_dir}"
        )
    return file


def own_words(run_dir: Path) -> Any:
    """What this user's shoal has kept there; None = nothing."""
    text = memory_in(run_dir)
    return read_yaml(text) if text is not None and _is_signed(text) else None


def is_own(file: Path) -> bool:
    """Whether the user vouches for a recipe file, or shoal has kept it for this user."""
    return is_trusted(file) or (file.is_file() and _is_signed(file.read_text(encoding="utf-8")))


def refuse_other_folder(run_dir: Path) -> None:
    """Refuse a run directory that would replace what no run has made.

    Raises:
        UserError: it is no folder, or holds something under a name of ours and nothing that a run leaves beside it.
    """
    if os.path.lexists(run_dir) and not run_dir.is_dir():
        raise UserError(f"{run_dir}: a file or broken link with this name exists; set run_dir to another folder")
    refuse_misplaced(run_dir)
    if (run_dir / "config.json").exists():
        raise UserError(f"{run_dir}: is the folder of a model; set run_dir to another folder")
    taken = [name for name in (*FOLDERS, *FILES) if any(run_dir.glob(name))]
    if taken and not any(any(run_dir.glob(name)) for name in RESULTS):
        raise UserError(f"{run_dir}: not a run directory, and its {taken[0]} would be replaced; set another run_dir")


def refuse_misplaced(run_dir: Path) -> None:
    """Refuse a run directory with a file in place of one of its folders, or a folder in place of one of its files."""
    folders = (run_dir / name for name in (*FOLDERS, *IN_FOLDERS))
    wrong = [(path, "file or broken link") for path in folders if os.path.lexists(path) and not path.is_dir()]
    wrong += [(path, "folder") for name in FILES for path in run_dir.glob(name) if path.is_dir()]
    for path, kind in wrong[:1]:
        raise UserError(f"{path}: a {kind} with this name exists; delete it, or set run_dir to another folder")


def remember(run_dir: Path, memory: str) -> None:
    """Keep ``memory``, a text of memory_of, as its recipe.yaml. Raises as _is_kept does."""
    if not _is_kept(run_dir, memory):
        write_text(run_dir / FILE, memory)


def _is_kept(run_dir: Path, memory: str) -> bool:
    """Whether its recipe.yaml says ``memory``.

    Raises:
        UserError: a recipe.yaml is there that somebody else has written, and says something else.
    """
    stored = memory_in(run_dir)
    is_own = stored is not None and _OURS.match(stored) is None
    if stored is not None and redacted(_said(stored)) == _said(memory) and (is_own or _is_signed(stored)):
        return True
    if is_own:
        raise UserError(
            f"{run_dir / FILE}: your own recipe is at the place where shoal stores the settings of a run, and they "
            "differ; move it to another folder, or choose another run_dir"
        )
    return False


@contextmanager
def remembering(run_dir: Path, said: dict[str, Any]) -> Iterator[str | None]:
    """The text that ``run_dir`` is to remember of what recipe and overrides have ``said``; None on ranks that write
    nothing.

    It is kept from when the run directory is locked, so that a run that is killed or finds its disk full is remembered,
    too; what was refused in place of another is forgotten again, here and by launched ranks.
    """
    if not is_main():
        yield None
        return
    memory, before, there = memory_of(redacted(said)), memory_in(run_dir), _names(run_dir)
    _is_kept(run_dir, memory)
    try:
        yield memory
    except UserError:
        if memory_in(run_dir) == memory != before:
            if before is not None:
                write_text(run_dir / FILE, before)
            elif _names(run_dir) - there <= {FILE}:  # nothing was made with it
                (run_dir / FILE).unlink()
        raise


def _names(run_dir: Path) -> set[str]:
    return {file.name for file in run_dir.iterdir() if file.name != LOCK} if run_dir.is_dir() else set()


def hidden_settings(said: Any, place: str = "") -> Iterator[str]:
    """The settings of which recipe.yaml keeps no value, because it was a secret."""
    if isinstance(said, dict | list):
        for key, value in said.items() if isinstance(said, dict) else enumerate(said):
            yield from hidden_settings(value, f"{place}.{key}".removeprefix("."))
    elif isinstance(said, str) and HIDDEN in said:
        yield place


def _is_signed(text: str) -> bool:
    ours = _OURS.match(text)
    return ours is not None and is_signed({"recipe": text[ours.end() :], "signature": ours["signature"]})


def _said(text: str) -> Any:
    said = read_yaml(text)
    return {key: value for key, value in said.items() if key != "run_dir"} if isinstance(said, dict) else said
