"""Results as tables: a pandas frame, and what a notebook shows."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from shoal.errors import UserError

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

    def _repr_html_(self) -> str:
        rows = self.rows()
        names = dict.fromkeys(name for row in rows for name in row)
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(_text(row.get(name)))}</td>' for name in names)}</tr>" for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
