"""shoal makes large language models shallower and gets their abilities back.

In Python: measure_importance, choose_layers, cut_model, distill, evaluate, compare, run and DistillationTrainer
(docs/api.md).

This folder holds what several stages use; compress/, train/ and eval/ at the top of the repository are the stages' own
code. `stages`, `workflows`, `api`, `help` and `cli` alone know several of them; nothing else here imports compress,
train or eval. tests/system/test_layout.py holds the levels of all folders.

Data flows one way, all in one run directory:
importance.json -> plan.json -> student/ -> distilled/ -> eval/*.json -> report.html

    cli           `shoal measure | prune | record | distill | eval | search | report | run | compare | delta | init
                  | list | explain | completion`
    errors        what a user can fix, and how it is said
    runtime       ranks, logging, seeding, environment stamp
    machine       memory, disk, speed
    numerics      the precision that a device multiplies fast in
    trust         what of a run directory of somebody else is believed
    progress      what takes long says so: bars, lines, time left
    stopping      Ctrl-C, SIGTERM, and the end of all that was started
    atomic_files  files and folders that are whole or absent
    formatting    numbers and tables for a terminal
    lr_schedule   the learning rate of loops of our own
    redaction     secrets stay here
    yaml_text     YAML 1.2 scalars, no key twice
    task_words    words instead of task identifiers

Folders:

    abilities     seeded items for retrieval, knowledge and reasoning, and how written answers are matched
    api           what this module offers, for models in memory
    artifacts     what a stage hands on: typed JSON with provenance
    compress      measure what layers are worth, choose which go, and write the student
    data          text to measure and train on: sources, rows, conversations
    eval          score teacher, pruned and distilled on the same items, and show the differences
    figures       drawings of results, as SVG
    help          the recipe's keys explained, what it can name, a first recipe
    inference     likelihoods and greedy text of many prompts, no token computed twice
    models        load and save causal language models, and know their parts
    recipe        what a run is told: every setting a frozen dataclass
    stages        the verbs of the command, each in its run directory
    stats         intervals and paired tests
    tracking      Weights & Biases
    train         train the cut model on the full one
    workflows     what takes several stages: all in order, dry runs, search
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.api.compressing import choose_layers, cut_model, measure_importance
    from shoal.api.evaluating import compare, evaluate
    from shoal.api.running import run
    from shoal.api.training import distill
    from shoal.errors import UserError
    from shoal.train.distillation_trainer import DistillationTrainer

__version__ = "0.1.0"
__all__ = [
    "DistillationTrainer",
    "UserError",
    "choose_layers",
    "compare",
    "cut_model",
    "distill",
    "evaluate",
    "measure_importance",
    "run",
]
PLACES = {
    "DistillationTrainer": "shoal.train.distillation_trainer",
    "UserError": "shoal.errors",
    "choose_layers": "shoal.api.compressing",
    "compare": "shoal.api.evaluating",
    "cut_model": "shoal.api.compressing",
    "distill": "shoal.api.training",
    "evaluate": "shoal.api.evaluating",
    "measure_importance": "shoal.api.compressing",
    "run": "shoal.api.running",
}
"""Module of every name above, loaded when the name is first used: torch and transformers take seconds."""


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
