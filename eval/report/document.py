"""What a report or a comparison consists of, apart from how it looks: sections of blocks.

page.py turns them into HTML and this file into Markdown: from one list of blocks, so the two cannot disagree. Every
string is plain text that may hold anything a model wrote; each output escapes it at the one place where it is written.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.figures.style import clean, inline_svg, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ESCAPES = {"://": ":&#47;/"}  # a bare address would become a link on GitHub
MOST_STACKED = 12
"""Columns up to which a row stays together on a phone; one of more is for comparing down its columns."""
CAUTIONS_SHOWN = 3
"""Cautions on a page before the rest is folded."""
FLIPS_IN_MARKDOWN = 8
"""Items per task and direction: a Markdown table cannot be searched or folded."""


@dataclass(frozen=True)
class Table:
    """A captioned table; the first column names its row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells by row; the first one is the row's heading."""
    text_columns: frozenset[int] = frozenset({0})
    """Columns of words; the others hold figures and are set flush right."""
    groups: tuple[tuple[str, int], ...] = ()
    """Headings over runs of rows: text and number of rows; () = no headings."""
    folded: bool = False
    row_titles: tuple[str, ...] = ()
    """Task identifier of each row, shown by pointing at its heading; () = none."""

    @property
    def stacks(self) -> bool:
        """Whether a phone sets a row's cells below its heading, each under its column's name, instead of scrolling."""
        return 4 <= len(self.columns) <= MOST_STACKED

    @property
    def headings(self) -> dict[int, str]:
        """Headings by the row that they stand above."""
        places = [sum(count for _, count in self.groups[:index]) for index in range(len(self.groups))]
        return {place: text for place, (text, _) in zip(places, self.groups, strict=True)}


@dataclass(frozen=True)
class Picture:
    """A figure with its title and a description for those who cannot see it."""

    file: str
    """Path of the PNG, relative to the run directory."""
    svg: str
    """Trusted markup from shoal.figures.style.inline_svg."""
    title: str
    description: str
    folded: bool = False

    @property
    def width(self) -> int:
        """Width in points, as it was drawn."""
        view_box = re.search(r'viewBox="\S+ \S+ (\d+)', self.svg)
        assert view_box is not None
        return int(view_box[1])


def picture(folder: Path, file: str, figure: Figure, title: str, description: str) -> Picture:
    """The figure for a page, written to ``folder`` as ``file`` with the suffixes .svg and .png.

    Raises:
        UserError: a full or read-only disk.
    """
    drawn, _ = (save_figure(figure, folder / f"{file}.{suffix}") for suffix in ("svg", "png"))
    svg = inline_svg(drawn, Path(file).name, title=title, description=description)
    return Picture(f"{file}.png", svg, title, description)


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is, folded under a line that says what it is."""

    text: str
    language: str
    summary: str


@dataclass(frozen=True)
class BoardLine:
    """One way of asking for one ability."""

    task: str
    unit: str
    """Unit of the scores; empty = percent."""
    identifier: str
    scores: tuple[str, ...]
    """Score with its interval, one per role of the board."""
    changes: tuple[str, ...]
    """Change with its interval, one per pair of roles."""
    places: tuple[tuple[str, float, float, float], ...] = ()
    """Role, score and ends of the 95 % interval, from 0 to 1; () = the score is no share."""
    chance: float = 0.0


@dataclass(frozen=True)
class Board:
    """What was lost and what came back, in numbers: a line per ability and way of asking."""

    caption: str
    roles: tuple[str, ...]
    changes: tuple[str, ...]
    """Name of each change: `lost by the cut`."""
    lines: tuple[BoardLine, ...]
    groups: tuple[tuple[str, int], ...] = ()
    """Headings over runs of lines, as those of a table."""

    @property
    def table(self) -> Table:
        """The same without its scale, for readers of plain text."""
        rows = tuple((", ".join(filter(None, (own.task, own.unit))), *own.scores, *own.changes) for own in self.lines)
        heads = ("Ability", *(role.capitalize() for role in self.roles), *self.changes)
        return Table(self.caption, heads, rows, groups=self.groups)


@dataclass(frozen=True)
class Caution:
    """One thing that a reader has to know before a number is believed."""

    about: str
    lead: str
    """Sentence that stands alone."""
    more: tuple[str, ...] = ()
    """Sentences on where, how much and why."""


@dataclass(frozen=True)
class Cautions:
    """All of them, the gravest first; a page shows the first few at once and folds the rest."""

    items: tuple[Caution, ...]

    @property
    def shown(self) -> tuple[Caution, ...]:
        return self.items[:CAUTIONS_SHOWN]

    @property
    def folded(self) -> tuple[Caution, ...]:
        """What is left to say: of those shown without the sentence that is seen already."""
        rest = (Caution(caution.about, "", caution.more) for caution in self.shown if caution.more)
        return (*rest, *self.items[CAUTIONS_SHOWN:])


@dataclass(frozen=True)
class Flip:
    """One item that two roles answered differently."""

    item: str
    question: str
    """Question of the item; empty where it was not kept."""
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Flips:
    """Items of one task that one role has right and another wrong."""

    task: str
    change: str
    """Name of the change: `lost by the cut`."""
    won: bool
    """Whether the role on the right is the one that has them right."""
    before: str
    """Role whose text is on the left."""
    after: str
    count: int
    """Number of all such items, shown or not."""
    items: tuple[Flip, ...]

    @property
    def caption(self) -> str:
        text = f"{self.task}: {self.count:,} {'item' if self.count == 1 else 'items'} {self.change}"
        return text if len(self.items) == self.count else f"{text}, {len(self.items)} shown"


Block = str | tuple[str, ...] | Table | Picture | Code | Cautions | Flips
"""A string is a paragraph, a tuple of strings a list."""


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """The whole page, independent of HTML and Markdown."""

    title: str
    headline: tuple[str, ...]
    sections: tuple[Section, ...]
    board: Board | None = None
    """Table below the first sentence."""
    facts: tuple[tuple[str, str], ...] = ()
    """A few figures to take in at a glance, below the board: value and label of each."""


def to_markdown(document: Document) -> str:
    """The document as GitHub-flavoured Markdown in which no text of a model or data set can act as markup."""
    first, *others = [inline(sentence) for sentence in document.headline] or [""]
    parts = [f"# {inline(document.title)}", first]
    parts += [block_markdown(document.board.table)] if document.board else []
    parts += ["\n".join(f"- **{inline(value)}** {inline(label)}" for value, label in document.facts)]
    for section in document.sections:
        others += [f"## {inline(section.title)}", *map(block_markdown, section.blocks)]
    return "\n\n".join(filter(None, [*parts, *others])) + "\n"


def block_markdown(block: Block) -> str:
    """One block as Markdown."""
    match block:
        case str():
            return prose(block)
        case Cautions():
            told = ((item.about, " ".join(map(prose, (item.lead, *item.more)))) for item in block.items)
            return "\n".join(f"- **{inline(about)}.** {text}" for about, text in told)
        case Table():
            lines = [_row(block.columns), "|" + "|".join(_rules(block)) + "|"]
            for place, row in enumerate(block.rows):
                if place in block.headings:
                    lines.append(f"| **{inline(block.headings[place])}** " + "| " * len(block.columns[1:]) + "|")
                lines.append(_row(row))
            return f"**{inline(block.caption)}**\n\n" + "\n".join(lines)
        case Picture():
            return f"![{inline(block.title)}]({block.file})\n\n{inline(block.description)}"
        case Code():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
            return f"**{inline(block.summary)}**\n\n{fence}{block.language}\n{clean(block.text).rstrip()}\n{fence}"
        case Flips():
            return block_markdown(_as_table(block))
        case _:
            return "\n".join(f"- {prose(item)}" for item in block)


def _rules(table: Table) -> list[str]:
    return [":--" if column in table.text_columns else "--:" for column in range(len(table.columns))]


def _as_table(flips: Flips) -> Table:
    shown = replace(flips, items=flips.items[:FLIPS_IN_MARKDOWN])
    rows = [(own.item, own.question, own.expected, own.before, own.after) for own in shown.items]
    head = ("item", "question", "expected", flips.before, flips.after)
    return Table(shown.caption, head, tuple(rows), frozenset(range(len(head))))


def prose(text: str) -> str:
    """inline(), with `like this` left as code where it can be nothing but a command, a key or a file name.

    A span of these characters means nothing to Markdown, so it does no harm if a stray backtick pairs it otherwise.
    """
    parts = re.split(r"(`(?! )[\w ./:=,'-]+(?<! )`)", text)
    return "".join(part if index % 2 else inline(part, strip=False) for index, part in enumerate(parts)).strip()


def inline(text: str, *, strip: bool = True) -> str:
    """Text for one line of Markdown: line breaks become a visible sign, everything that could be markup is escaped."""
    line = clean(text.strip() if strip else text).replace("\r\n", "\n").replace("\n", " ⏎ ")
    line = line.replace("\r", " ").replace("\t", " ")
    line = html.escape(line, quote=False)
    # `_` inside a word is no markup, and task names are full of it
    return re.sub(r"(\\|[`*\[\]|~#]|(?<!\w)_|_(?!\w)|://)", lambda match: _ESCAPES.get(match[0], "\\" + match[0]), line)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(inline(cell) or " " for cell in cells) + " |"
