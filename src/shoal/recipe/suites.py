"""Evaluation suites: tasks, limits and a stated cost under one name, so that runs of different people ask the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from shoal.recipe.section import Positive, RowLength, Section, Text, adapter
from shoal.yaml_text import read_yaml

SuiteName = Literal["quick", "transfer", "standard", "full"]
CONFIGS_DIR = Path(__file__).parents[1] / "configs"
if not CONFIGS_DIR.exists():  # editable install through a tree without symlinks
    CONFIGS_DIR = Path(__file__).parents[3] / "configs"
SUITES_DIR = CONFIGS_DIR / "suites"


@dataclass(frozen=True)
class Cost(Section):
    """What one model has to do."""

    items: Positive
    requests: Positive
    """Prompts to write after and options to score."""
    tokens: Positive
    """Tokens read and written, three characters each; what items of a question or task have in common counts once."""


@dataclass(frozen=True)
class Suite(Section):
    """One file of configs/suites."""

    about: Text
    needs: Text
    """Data that its tasks read, and where they come from."""
    cost: Cost
    tasks: Annotated[tuple[Text, ...], Field(min_length=1)]
    limit: Positive | None
    perplexity_tokens: Positive
    sequence_length: RowLength
    limits: dict[str, Positive] = field(default_factory=dict)


def read_suite(name: str) -> Suite:
    """The suite of this name."""
    text = (SUITES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    return adapter(Suite).validate_python(read_yaml(text))


def with_suite(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain mapping with the suite it names spelled out; a second time changes nothing.

    Tasks that the recipe names itself are added to the suite's, and everything else that it sets wins; its limit caps
    the suite's limits of single tasks too. A mapping that is wrong in some other way is left for the recipe to refuse.
    """
    section = raw.get("eval")
    if not isinstance(section, Mapping) or section.get("suite") not in get_args(SuiteName):
        return dict(raw)
    suite = read_suite(section["suite"])
    further_tasks, further_limits = section.get("tasks", []), section.get("limits", {})
    if not isinstance(further_tasks, list | tuple) or not isinstance(further_limits, Mapping):
        return dict(raw)
    settings = {name: getattr(suite, name) for name in ("limit", "perplexity_tokens", "sequence_length")}
    tasks = list(dict.fromkeys([*suite.tasks, *further_tasks]))
    limits, cap = dict(suite.limits), section.get("limit")
    if isinstance(cap, int):
        limits = {name: min(limit, cap) for name, limit in limits.items()}
    return {**raw, "eval": {**settings, **section, "tasks": tasks, "limits": {**limits, **further_limits}}}
