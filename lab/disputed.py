"""Questions that people answer in different ways: how often a model chooses what people chose, and how far its
likelihoods of the options are from people's shares.

A majority's vote would punish a model for being as undecided as people are (arXiv 2410.13776), so an answer scores the
share of people who gave it, and the most there is to reach is the share of the most frequent answer. O options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.special import log_softmax, rel_entr

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.atomic_files import fingerprint, read_text
from shoal.errors import UserError
from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.item_cache import ItemCache, identity_of
from shoal.formatting import aligned, interval_text
from shoal.launch.verbs.evaluate import roles
from shoal.launch.verbs.run import Run
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.section import Positive, Section, Text
from shoal.runtime import device, free_memory
from shoal.stats.paired import mean_limits

from .part import identity, made, told

AGREED = 0.6
"""Share of the people asked who give the most frequent answer, from which on an item counts as agreed upon."""


@dataclass(frozen=True)
class Settings(Section):
    """Rows of questions with the number, or share, of people who chose each option."""

    data: Text
    """File of JSON lines."""
    question: Text = "question"
    """Column of the question."""
    options: Text = "options"
    """Column of the list of options."""
    counts: Text = "counts"
    """Column of how many people, or which share of them, chose each option."""
    limit: Positive | None = None
    """Rows, the first ones; None = all."""


@dataclass(frozen=True)
class Asked:
    """One question to one model."""

    agreement: float
    """Share of the people who chose the option that is likeliest per character."""
    ceiling: float
    """Share of the most frequent answer."""
    divergence: float
    """KL(people || model) over the options in nats: 0 where both are alike."""


@dataclass(frozen=True)
class Disputed(Artifact):
    """lab/disputed.json: every question, by role."""

    FILE: ClassVar[str] = "disputed.json"

    roles: dict[str, tuple[Asked, ...]]

    def in_words(self) -> str:
        """A row per model and kind of items: agreed upon, and disputed."""
        lines = [["model", "items", "n", "agreement", "people agree", "divergence, nats"]]
        for role, asked in self.roles.items():
            for kind, agreed in (("agreed", True), ("disputed", False)):
                if own := [item for item in asked if (item.ceiling >= AGREED) == agreed]:
                    most = math.fsum(item.ceiling for item in own) / len(own)
                    shown = [_mean(own, lambda item: item.agreement), _mean(own, lambda item: item.divergence)]
                    lines.append([role, kind, str(len(own)), shown[0], f"{most:.3f}", shown[1]])
        return "\n".join(aligned(lines))


def work(run: Run, settings: Settings) -> str:
    """lab/disputed.json of every model of the run that is there; its table as text.

    Raises:
        UserError: rows that are missing or cannot be read.
    """
    rows = _rows(settings)
    folders, load = roles(run), LoadSettings(**run.load_args())
    models = {role: model_fingerprint(folder) for role, folder in folders.items()}

    def answered(provenance: Provenance) -> Disputed:
        found = {}
        for role, folder in folders.items():  # one at a time is in memory
            checkpoint = Checkpoint.read(folder, load)
            model = checkpoint.model(device=device())
            kept, size = ItemCache(run.dir / "eval/items", identity_of(models[role], model)), run.recipe.eval.at_once()
            lm = CausalLM(model, checkpoint.tokenizer(), size, items=kept, called=f"disputed {role}")
            found[role] = tuple(_asked(lm, rows))
            del model, lm
            free_memory()
        return Disputed(provenance, found)

    return told(run, made(run, Disputed, identity(run, settings, rows=fingerprint(rows), **models), answered))


def _rows(settings: Settings) -> list[tuple[str, list[str], list[float]]]:
    """Question, options and people's shares of every row."""
    rows = []
    lines = [line for line in read_text(Path(settings.data).expanduser()).split("\n") if line.strip()]
    for number, line in enumerate(lines[: settings.limit], 1):
        try:
            row = json.loads(line)
            options, counts = [str(option) for option in row[settings.options]], list(row[settings.counts])
            shares = [count / math.fsum(counts) for count in counts]
            if len(options) != len(shares) or min(shares) < 0:
                raise ValueError(f"{len(shares)} counts of {len(options)} options")
            rows.append((str(row[settings.question]), options, shares))
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise UserError(f"{settings.data}:{number}: cannot be read ({error}); name its columns") from error
    if not rows:
        raise UserError(f"{settings.data}: holds no rows; name another file")
    return rows


def _asked(lm: CausalLM, rows: Sequence[tuple[str, list[str], list[float]]]) -> list[Asked]:
    pairs = [
        lm._encode_pair(f"Question: {question}\nAnswer:", f" {option}")
        for question, options, _ in rows
        for option in options
    ]
    scores = iter(lm.log_likelihoods(pairs))
    asked = []
    for _, options, shares in rows:
        log_probs_O = np.array([next(scores)[0] for _ in options])
        chosen = int(np.argmax(log_probs_O / [max(1, len(option)) for option in options]))
        divergence = float(rel_entr(np.array(shares), np.exp(log_softmax(log_probs_O))).sum())
        asked.append(Asked(shares[chosen], max(shares), divergence))
    return asked


def _mean(items: Sequence[Asked], of: Callable[[Asked], float]) -> str:
    values = [of(item) for item in items]
    return interval_text((math.fsum(values) / len(values), *mean_limits(values)), ".3f")
