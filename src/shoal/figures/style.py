"""How all figures look: colours, text, panels, and how they are written and put into a page.

Colours keep a contrast of 3:1 or more on white and on near-black and differ for every common kind of colour blindness;
marks differ in shape too, so that nothing is said by colour alone. Text stays text in SVG; equal input, equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.atomic_files import written_file
from shoal.yaml_text import own_yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TABLES = own_yaml(__file__)
STYLE: dict[str, Any] = _TABLES["matplotlib"]
"""Settings of matplotlib."""
INK, FAINT = STYLE["text.color"], STYLE["grid.color"]
"""Text and axes, which become the reader's own text colour in inline SVG; lines of the grid."""
ROLE_STYLE: dict[str, tuple[str, str]] = _TABLES["roles"]
"""Role -> colour and marker."""
SERIES_COLOURS = ("#1f86c8", "#d55e00", "#0f9d75", "#b4699a", "#b08900")
SERIES_STYLE = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"))
"""Stroke and marker of each series, in the order of SERIES_COLOURS."""
KEPT, DROPPED = "#1f86c8", "#d55e00"
WIDTH_INCHES = 5.2
"""A phone shows this width nearly unscaled, so that the text below stays readable."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text without the characters that neither XML nor UTF-8 can carry; each becomes the replacement mark."""
    return _CONTROL.sub("\ufffd", text)


def short(text: str, limit: int = 52) -> str:
    """``text`` in one line of at most ``limit`` characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def heading(name: str) -> str:
    """A name from data as a heading: `block_influence` as `Block influence`."""
    text = clean(name).replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write the figure as SVG or PNG (by suffix) on white; readers see the old or the new file, never half.

    Gives what was written, so that nobody has to draw it again for a page.

    Raises:
        UserError: a full or read-only disk.
    """
    buffer, kind = io.BytesIO(), path.suffix[1:]
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": None}
    with figure_style():
        figure.savefig(buffer, format=kind, facecolor="white", metadata=metadata)
    with written_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def inline_svg(svg: bytes, name: str, *, title: str, description: str) -> str:
    """An SVG file of save_figure as an <svg> element for a page: transparent, in the page's text colour, described.

    Matplotlib numbers ids from one in every figure, so all ids get ``name`` in front: several figures share one page.
    """
    markup = svg.decode()
    markup = markup[markup.index("<svg") :]
    markup, num_backgrounds = re.subn(
        r'(<g id="patch_1">\s*<path [^>]*style="fill: )#ffffff', r"\g<1>none", markup, count=1
    )
    assert num_backgrounds == 1
    markup = re.sub(r'\bid="', f'id="{name}-', markup)
    markup = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", markup)
    markup = markup.replace(INK, "currentColor")
    # Matplotlib's style sheet says `*`, which would reach out of the picture into the page.
    markup = re.sub(r"<style.*?</style>", "", markup, flags=re.DOTALL)
    opening, rest = markup.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', opening)
    assert view is not None
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    heading = f'<title id="{name}-title">{escape(clean(title))}</title>'
    body = f'<desc id="{name}-desc">{escape(clean(description))}</desc>{rest}'
    return f'<svg {spaces} {view.group()} stroke-linejoin="round" {label}>{heading}{body}'


def figure_style() -> Any:
    """A context in which figures are made and drawn as all of ours."""
    import matplotlib

    return matplotlib.rc_context(STYLE)  # pyright: ignore[reportArgumentType]


def panels(heights: Sequence[float], *, width: float = WIDTH_INCHES) -> tuple[Figure, list[Axes]]:
    """A figure of panels below each other; ``heights`` and ``width`` in inches."""
    figure, axes = panel_grid((len(heights), 1), (width, sum(heights) + 0.4), height_ratios=heights)
    return figure, [ax for (ax,) in axes]


def panel_grid(shape: tuple[int, int], size: tuple[float, float], **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows times columns of panels, made without pyplot: no display, no global state.

    ``size`` is width and height in inches; ``options`` are those of matplotlib's `subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(*shape, squeeze=False, **options)
    return figure, [list(row) for row in axes]


IN_ONE_LINE = 4
"""Entries of a legend that have room beside each other."""


def legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels, chance last; in two lines where one would be wider than the figure."""
    handles = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if "chance" in handles:
        handles["chance"] = handles.pop("chance")
    ncols = len(handles) if len(handles) <= IN_ONE_LINE else -(-len(handles) // 2)
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=ncols, columnspacing=1.2)
