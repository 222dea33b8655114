"""What a report consists of, apart from how it looks: sections of blocks.

page.py turns them into HTML and this file into Markdown: from one list of blocks, so the two cannot disagree. Every
string is plain text that may hold anything a model wrote; each output escapes it at the one place where it is written.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from shoal.figures import clean


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """An unordered list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """A few figures to take in at a glance."""

    items: tuple[tuple[str, str], ...]
    """Value and what it is."""


@dataclass(frozen=True)
class Terms:
    """A list of terms with their explanations."""

    items: tuple[tuple[str, str], ...]
    """Word and its meaning."""


@dataclass(frozen=True)
class Table:
    """A captioned table; the first column names its row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """First cell = the row's heading."""
    text_columns: frozenset[int] = frozenset({0})
    """Columns of words; the others hold figures and are set flush right."""
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure with its title and a description for those who cannot see it."""

    file: str
    """Path of the PNG, relative to the run directory."""
    svg: str
    """Trusted markup from shoal.figures.inline_svg."""
    title: str
    description: str


@dataclass(frozen=True)
class Code:
    """Text to be copied as it is."""

    text: str
    language: str
    summary: str | None = None
    """Folded under this line; None = open."""


@dataclass(frozen=True)
class Flip:
    """One item that two roles answered differently."""

    item: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Flips:
    """Items that one role has right and another wrong."""

    caption: str
    before: str
    """Role whose text stands on the left."""
    after: str
    items: tuple[Flip, ...]


Block = Paragraph | Bullets | Facts | Terms | Table | Picture | Code | Flips


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
    """The whole report, independent of HTML and Markdown."""

    title: str
    headline: tuple[str, ...]
    sections: tuple[Section, ...]


def to_markdown(document: Document) -> str:
    """The document as GitHub-flavoured Markdown in which no text of a model or data set can act as markup."""
    parts = [f"# {inline(document.title)}", *(inline(sentence) for sentence in document.headline)]
    for section in document.sections:
        parts.append(f"## {inline(section.title)}")
        parts += [block_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def block_markdown(block: Block) -> str:
    """One block as Markdown."""
    match block:
        case Paragraph():
            return ("> **Note.** " if block.warning else "") + inline(block.text)
        case Bullets():
            return "\n".join(f"- {inline(item)}" for item in block.items)
        case Facts():
            return "\n".join(f"- **{inline(value)}** {inline(label)}" for value, label in block.items)
        case Terms():
            return "\n".join(f"- **{inline(term)}**: {inline(meaning)}" for term, meaning in block.items)
        case Table():
            rule = tuple(":--" if column in block.text_columns else "--:" for column in range(len(block.columns)))
            lines = [_row(block.columns), "|" + "|".join(rule) + "|", *(_row(row) for row in block.rows)]
            return f"**{inline(block.caption)}**\n\n" + "\n".join(lines)
        case Picture():
            return f"![{inline(block.title)}]({block.file})\n\n{inline(block.description)}"
        case Code():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
            heading = f"**{inline(block.summary)}**\n\n" if block.summary else ""
            return f"{heading}{fence}{block.language}\n{clean(block.text).rstrip()}\n{fence}"
        case Flips():
            head = ("item", "expected", block.before, block.after)
            rows = tuple((flip.item, flip.expected, flip.before, flip.after) for flip in block.items)
            return block_markdown(Table(block.caption, head, rows, frozenset(range(4))))


def inline(text: str) -> str:
    """Text for one line of Markdown: line breaks become a visible sign, everything that could be markup is escaped."""
    line = clean(text).strip().replace("\r\n", "\n").replace("\n", " ⏎ ").replace("\r", " ").replace("\t", " ")
    line = html.escape(line, quote=False)
    # `_` inside a word is no markup, and task names are full of it
    return re.sub(r"(\\|[`*\[\]|~#]|(?<!\w)_|_(?!\w)|://)", lambda found: _escaped(found[0]), line)


def _escaped(markup: str) -> str:
    # a bare address would become a link on GitHub
    return ":&#47;/" if markup == "://" else "\\" + markup


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(inline(cell) or " " for cell in cells) + " |"
