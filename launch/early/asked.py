"""The command that was given: its recipe, the model that this names, and where --out is to be written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shoal.atomic_files import write_text
from shoal.errors import UserError
from shoal.model_names import name_of_model, refuse_no_model
from shoal.models import checkpoint_files as files
from shoal.recipe.prune import CutThese
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import plain_path

MEASURE, SCORE, TRAIN = ("measure", "run"), ("eval", "run"), ("record", "distill", "run")
CUT = ("prune", "distill", "run")
"""Commands that drop layers if there is no student yet."""
LOAD = ("measure", "prune", *TRAIN, "eval", "lab")


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
