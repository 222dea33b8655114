"""shoal makes large language models shallower and gets their abilities back.

In Python: measure_importance, choose_layers, cut_model, distill, evaluate, compare, push_to_hub, run and
DistillationTrainer (docs/tutorials/python.md).

This folder is the ground: what several rooms stand on. compress/, train/ and eval/ at the top of the repository are the
rooms; launch/ is the roof, which alone knows several of them; lab/ holds what papers need. Nothing imports what stands
above it; tests/system/test_layout.py holds the levels of all folders.

Data flows one way, all in one run directory:
importance.json -> plan.json -> student/ -> distilled/ -> eval/*.json -> report.html

    errors        what a user can fix, and how it is said
    ranks         which process this is, and what it tells
    runtime       devices, process groups, seeding, environment stamp
    machine       memory, disk, what multiplies fast, and in which precision
    trust         what of a run directory of somebody else is believed
    progress      what takes long says so: bars, lines, time left
    stopping      Ctrl-C, SIGTERM, and the end of all that was started
    atomic_files  files and folders that are whole or absent
    formatting    numbers and tables for a terminal
    model_names   what names a model: a folder, a Hub id, a demo model
    redaction     secrets stay here
    yaml_text     YAML 1.2 scalars, no key twice
    installed     what libraries know by name, and their versions, without importing them
    components    what can be taken out of a model's layers
    task_words    words instead of task identifiers

Folders:

    abilities     seeded items for retrieval, knowledge and reasoning, and how written answers are matched
    artifacts     what a stage hands on: typed JSON with provenance
    compress      measure what layers are worth, choose which go, and write the student
    data          text to measure and train on: sources, rows, conversations
    eval          score teacher, pruned and distilled on the same items, and show the differences
    figures       drawings of results, as SVG
    inference     likelihoods and greedy text of many prompts, no token computed twice
    lab           what a paper needs and a pruner does not
    launch        the command, its verbs, and what starts them
    models        load and save causal language models, and know their parts
    recipe        what a run is told: every setting a frozen dataclass
    stats         intervals and paired tests
    tracking      Weights & Biases
    train         train the cut model on the full one
"""

# pyright: reportUnsupportedDunderAll=false

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
PLACES = {name: module for module, name in re.findall(r"^from (\S+) import (\w+) as", _STUB, re.MULTILINE)}
"""Module of every public name, loaded when the name is first used: torch and transformers take seconds."""
__all__ = sorted(PLACES)


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    if name != "UserError":
        from shoal.installed import refuse_untested

        refuse_untested()
    value = globals()[name] = getattr(importlib.import_module(PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
