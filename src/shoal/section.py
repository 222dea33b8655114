"""What every section of a recipe is made of: strict keys, bounded numbers, data sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
RowLength = Annotated[int, Field(ge=2)]
"""Tokens of one row; a row of one token holds nothing to predict."""
Text = Annotated[str, Field(min_length=1)]


class Section:
    """Refuses unknown keys: without this TypeAdapter would ignore a misspelt one and train with the default."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=False)


@dataclass(frozen=True)
class DataSource(Section):
    """Where text comes from, and how much of it."""

    path: Text
    """A bundled name (see shoal.data.BUNDLED), a local .jsonl, .json, .txt, .csv or .parquet file, a folder of them, or
    a Hub data set id. A .txt file is one document. Of a folder those files are read that are named after ``split``,
    else all."""
    column: str = "text"
    """The column that holds the text."""
    split: str = "train"
    name: str | None = None
    """Configuration name of a Hub data set."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the token budget, relative to the other sources."""


def _as_sources(value: Any) -> Any:
    listed = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in listed]


Data = Annotated[tuple[DataSource, ...], BeforeValidator(_as_sources), Field(min_length=1)]
"""One source or a list of them; a plain string is short for {path: string}."""
