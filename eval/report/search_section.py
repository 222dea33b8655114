"""What `shoal search` found, where the run directory holds its result."""

from __future__ import annotations

from pathlib import Path

from shoal.artifacts.search import SearchResult

from .document import Block, Bullets, Code, Paragraph, Section, Table
from .search_table import NOTE, ranked_by, recipe_lines, standings, verdicts


def read_search(folder: Path) -> SearchResult | None:
    """search.json of the run directory; None where no search was made.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / SearchResult.FILE
    return SearchResult.read(path) if path.is_file() else None


def search_section(result: SearchResult | None) -> Section | None:
    """The plans as they rank before and after the heal, what may be concluded, and the recipe of the first."""
    if result is None:
        return None
    header, *rows = standings(result)
    caption = f"{len(result.ranking.plans)} plans, each healed for {result.num_tokens:,} tokens, best first"
    table = Table(
        caption,
        ("Plan", *(column.capitalize() for column in (*header[:2], *header[3:]))),
        tuple((row[2], *row[:2], *row[3:]) for row in rows),
        frozenset({0, 3}),
    )
    blocks: list[Block] = [
        Paragraph(ranked_by(result.ranking).replace("\n", " ")),
        table,
        Bullets(tuple(verdicts(result))),
        Paragraph(NOTE),
        Code(recipe_lines(result.winner), "yaml", f"The recipe of {result.winner.name}"),
    ]
    return Section("What the search over plans found", tuple(blocks))
