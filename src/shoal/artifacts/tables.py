"""Results as tables: a pandas frame, and what a notebook shows."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from shoal.errors import UserError
from shoal.formatting import aligned

if TYPE_CHECKING:
    from pandas import DataFrame


class Tabular:
    """A result that is a table."""

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows, by column."""
        raise NotImplementedError

    def to_pandas(self) -> DataFrame:
        """The same as a pandas frame.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise UserError("to_pandas: needs pandas, which is not installed; pip install pandas") from error
        return DataFrame(self.rows())

    def __str__(self) -> str:
        return "\n".join(aligned(self._cells()))

    def _repr_html_(self) -> str:
        names, *rows = self._cells()
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _cells(self) -> list[list[str]]:
        """The table's head and its rows, as text."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        return [names, *([_text(row.get(name)) for name in names] for row in rows)]


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
