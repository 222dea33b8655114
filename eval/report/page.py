"""Pages from templates: what a page says is one template, how it looks another, HTML, Markdown or a terminal's text.

A string may hold anything that a model wrote; each layout escapes it where it is written. The HTML page opens from disk
without a request. Its policy lets no script in and exactly one style sheet, by its hash: whatever a model or data set
wrote could not run or load anything even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shoal.figures.style import clean, inline_svg, save_figure
from shoal.formatting import aligned, bytes_text, duration_text, layers_text, listed
from shoal.redaction import redacted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASH = "–"
MOST_STACKED = 12
"""Columns up to which a row stays together on a phone; one of more is for comparing down its columns."""
_BLOCK = "\x1e"
"""Begins a block of Markdown or plain text; no text from data holds it, see clean."""
_ESCAPES = {"://": ":&#47;/"}  # a bare address would become a link on GitHub
Layout = Literal["html", "md", "text"]


@dataclass(frozen=True)
class Table:
    """A captioned table; the first column names its row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells by row; the first one is the row's heading."""
    text_columns: frozenset[int] = frozenset({0})
    """Columns of words; the others hold figures and are set flush right."""
    groups: Sequence[tuple[str, int]] = ()
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
        return headings(self.groups)


def headings(groups: Sequence[tuple[str, int]]) -> dict[int, str]:
    """Headings by the row that they stand above, of headings with their numbers of rows."""
    return {sum(count for _, count in groups[:index]): text for index, (text, _) in enumerate(groups)}


@dataclass(frozen=True)
class Picture:
    """A figure as a file; its title and a description for those who cannot see it stand in the template."""

    file: str
    """Path of the PNG, relative to the run directory."""
    svg: bytes

    @property
    def width(self) -> int:
        """Width in points, as it was drawn."""
        view_box = re.search(rb'viewBox="\S+ \S+ (\d+)', self.svg)
        assert view_box is not None
        return int(view_box[1])

    def inline(self, title: str, description: Markup) -> Markup:
        """The figure as an element of the page."""
        told = {"title": title, "description": description.striptags()}
        return Markup(inline_svg(self.svg, Path(self.file).stem, **told))


def picture(folder: Path, file: str, figure: Figure) -> Picture:
    """The figure for a page, written to ``folder`` as ``file`` with the suffixes .svg and .png."""
    svg, _ = (save_figure(figure, folder / f"{file}.{suffix}") for suffix in ("svg", "png"))
    return Picture(f"{file}.png", svg)


def render(contents: str, layout: Layout, **told: Any) -> str:
    """The page that the template ``contents`` makes of ``told``, in a layout."""
    text = environment(layout).get_template(f"{contents}.jinja").render(layout=f"{layout}.jinja", **told)
    if layout == "html":
        return text.lstrip()
    return "\n\n".join(filter(None, (block.strip() for block in text.split(_BLOCK)))) + "\n"


@cache
def environment(layout: Layout) -> Environment:
    """What the templates of a layout can use."""
    made = Environment(
        loader=PackageLoader("shoal.eval.report"),
        autoescape=layout == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if layout == "html":
        made.finalize = lambda value: clean(value) if type(value) is str else value
        made.globals |= _style_and_policy()
    made.globals |= {"mark": _BLOCK, "percent": lambda share: f"{100 * share:.1f}%"}
    made.filters |= {
        "bytes": bytes_text,
        "duration": duration_text,
        "layers": layers_text,
        "listed": lambda words: listed(map(str, words)),
        "yaml": lambda content: yaml.safe_dump(redacted(content), sort_keys=False, allow_unicode=True, width=100),
        "clean": clean,
        "sentence": lambda text: f"{text[0].upper()}{text[1:]}.",
        "one_line": lambda text: " ".join(text.split()),
        # `like this` set as code; only used for the report's own sentences
        "code": lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", _escaped(text))),
        # with leave to break after an underscore: task names are long and phones narrow
        "breakable": lambda text: Markup(_escaped(text).replace("_", "_<wbr>")),
        "figure": with_interval,
        "verdict": lambda text: {"▲": " good", "▼": " bad"}.get(text[:1], ""),
        "anchor": lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
        # anchor and title of every section of a page's body
        "sections": lambda body: [
            (anchor, Markup(title)) for anchor, title in re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', body)
        ],
        "inline": inline,
        "prose": prose,
        "row": lambda cells: "| " + " | ".join(inline(cell) or " " for cell in cells) + " |",
        # more backticks than the code holds in succession
        "fence": lambda text: "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)),
        "aligned": _aligned,
    }
    return made


def _style_and_policy() -> dict[str, Any]:
    style = Markup((files("shoal.eval.report") / "templates" / "report.css").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # figures carry style attributes and, for heat maps, pictures inside themselves
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; style-src-elem 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    return {"style": style, "policy": policy}


def with_interval(text: str) -> Markup:
    """A cell's figure escaped, with its interval, and what stands behind a comma or in brackets, on lines below."""
    told = re.sub(
        r"(?: (\[[^\]]*\]))?(?:, (.*)| (\(.*\)))?$",
        lambda match: "".join(f' <span class="ci">{part}</span>' for part in _parts(*match.groups(""))),
        _escaped(text),
        count=1,
    )
    return Markup(told)


def _parts(interval: str, others: str, remark: str) -> list[str]:
    return [part for part in (interval, *others.split(", "), remark) if part]


def _escaped(text: str) -> str:
    return str(Markup.escape(text if isinstance(text, Markup) else clean(text)))


def prose(text: str) -> str:
    """inline(), with `like this` left as code where it can be nothing but a command, a key or a file name.

    A span of these characters means nothing to Markdown, so it does no harm if a stray backtick pairs it otherwise.
    """
    parts = re.split(r"(`(?! )[\w ./:=,'-]+(?<! )`)", text)
    return "".join(part if index % 2 else inline(part, strip=False) for index, part in enumerate(parts)).strip()


def inline(text: str, *, strip: bool = True) -> str:
    """Text for one line of Markdown: line breaks become a visible sign, everything that could be markup is escaped."""
    line = clean(text.strip() if strip else text).replace("\r\n", "\n").replace("\n", " ⏎ ")
    line = html.escape(line.replace("\r", " ").replace("\t", " "), quote=False)
    # `_` inside a word is no markup, and task names are full of it
    return re.sub(r"(\\|[`*\[\]|~#]|(?<!\w)_|_(?!\w)|://)", lambda match: _ESCAPES.get(match[0], "\\" + match[0]), line)


def _aligned(table: Table) -> str:
    """The table for a terminal, without columns in which nothing is told."""
    cells = [[" ".join(cell.split()) for cell in row] for row in (table.columns, *table.rows)]
    told = [column for column in zip(*cells, strict=True) if any(cell != DASH for cell in column[1:])]
    return "\n".join(aligned(list(zip(*told, strict=True))))
