"""A data set that is in memory, as the libraries of the field hand them about: texts, or rows with columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.data.chat import Chat, chat_of, column_of
from shoal.errors import UserError
from shoal.recipe.section import DataSource

Dataset = Iterable[Any]
"""Texts; or rows (mappings, such as those of `datasets.Dataset`) with a column `messages`, the columns `prompt` and
`completion`, or a column `text`. It is gone through more than once, so it is no generator."""


@dataclass(frozen=True)
class Documents:
    """The texts or conversations of a data set, in order, anew in every pass; None for an empty one."""

    rows: Dataset
    source: DataSource
    """Columns that are read, and tokens that are learnt."""

    def __iter__(self) -> Iterator[str | Chat | None]:
        for number, row in enumerate(self.rows):
            where = f"{self.source.path!r} row {number}"
            if self.source.is_chat:
                yield chat_of(_mapping(row, where), self.source, where)
                continue
            text = row if isinstance(row, str) else column_of(_mapping(row, where), self.source.column, where)
            if text is not None and not isinstance(text, str):
                raise UserError(f"data {where}: holds {type(text).__name__}, not text; give strings")
            yield text if text and text.strip() else None


def documents_of(
    dataset: Dataset, *, name: str = "dataset", loss_on: Literal["assistant", "all"] | None = None
) -> Documents:
    """The documents of ``dataset``, which is called ``name`` in messages; its first row tells the columns.

    Of conversations the assistant's tokens are learnt, or all of them with ``loss_on="all"``.

    Raises:
        UserError: it is empty, can be gone through only once, or its rows have none of the known columns.
    """
    if isinstance(dataset, str | Mapping) or not isinstance(dataset, Iterable):
        raise UserError(f"data {name!r}: is {type(dataset).__name__}; give a list of texts, or a data set of rows")
    if isinstance(dataset, Iterator):
        raise UserError(f"data {name!r}: can be gone through only once; make a list of it")
    first = next(iter(dataset), None)
    if first is None:
        raise UserError(f"data {name!r}: is empty; give texts, or rows that hold some")
    columns = ("text",) if isinstance(first, str) else tuple(_mapping(first, f"{name!r} row 0"))
    rows = dataset if isinstance(dataset, list | tuple) else ()  # of a table the first row has all columns
    some_have_tools = "tools" in columns or any(isinstance(row, Mapping) and "tools" in row for row in rows)
    tools = {"tools": "tools"} if some_have_tools else {}
    if "messages" in columns:
        chosen: dict[str, Any] = {"messages": "messages", **tools}
    elif "prompt" in columns and "completion" in columns:
        chosen = {"prompt": "prompt", "completion": "completion", **tools}
    elif "text" in columns:
        chosen = {}
    else:
        raise UserError(
            f"data {name!r}: has the columns {', '.join(map(str, columns)) or 'none'}; it needs `messages`, `prompt` "
            "and `completion`, or `text`: rename_column gives a column another name"
        )
    try:
        source = DataSource(name, **chosen, loss_on=loss_on)
    except ValueError as error:
        raise UserError(f"data {name!r}: {error}") from error
    return Documents(dataset, source)


def _mapping(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise UserError(
            f"data {where}: is {type(row).__name__}, neither a text nor a row with columns; give one of them"
        )
    return row
