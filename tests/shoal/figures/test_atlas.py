"""The figures of a sweep show what they promise, say nothing by colour alone, and repeat byte by byte."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from sweep_results import importance as swept_importance
from sweep_results import right, task

from shoal.artifacts.importance import Importance
from shoal.components import Component
from shoal.compress.sweeps.atlas import build_atlas
from shoal.compress.sweeps.table import table_of
from shoal.figures.atlas import agreement_figure, atlas_figure, curves_figure, draw_column
from shoal.figures.style import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DROP = (1, 5)


@functools.cache
def swept() -> Importance:
    return swept_importance()


def cells(ax: Axes) -> dict[tuple[int, int], Any]:
    """(column, row) -> the text that stands there."""
    found = {}
    for text in ax.texts:
        x, y = text.get_position()
        found[round(x), round(y)] = text
    return found


def saved_texts(figure: Figure, path: Path) -> list[str]:
    save_figure(figure, path)
    return [node.text or "" for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.slow
def test_every_cell_of_the_map_holds_its_number() -> None:
    heat = atlas_figure(swept(), DROP).axes[0]
    names = [label.get_text() for label in heat.get_xticklabels()]
    assert names == [
        "block influence",
        "angular",
        "",
        "retrieval\ncontinuation",
        "retrieval\ngeneration",
        "knowledge\ncontinuation",
        "language\nrolling",
    ]
    texts = {place: text.get_text() for place, text in cells(heat).items()}
    assert texts[0, 0] == "0.900"
    assert texts[3, 2] == "32"  # (34/80 - 1/4) / (64/80 - 1/4)
    assert texts[3, 0] == "−36"
    assert texts[4, 3] == "100"
    assert texts[6, 5].startswith("+0.30")


def test_critical_layers_have_a_frame_and_bold_numbers() -> None:
    heat = atlas_figure(swept()).axes[0]
    frames = {(round(box.get_x() + 0.46), round(box.get_y() + 0.44)) for box in heat.patches}  # pyright: ignore
    expected = {(3, 0), (3, 2), (4, 0), (4, 2), (4, 4), (5, 0), (5, 5)}
    assert {place for place in frames if place[0] < 6} == expected
    bold = {place for place, text in cells(heat).items() if text.get_weight() == "bold"}
    assert bold == frames


def test_dropped_layers_have_a_mark_beside_their_name() -> None:
    labels = [label.get_text() for label in atlas_figure(swept(), DROP).axes[0].get_yticklabels()]
    assert labels == ["0", "× 1", "2", "3", "4", "× 5"]


@pytest.mark.slow
def test_every_column_has_a_panel_with_its_intervals_and_every_gap_one() -> None:
    figure = atlas_figure(swept())
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[1] == "retrieval/continuation: share kept (n = 80)"
    assert titles[4] == "language/rolling: nats per token added (n = 80)"
    assert titles[5].startswith("Protocol gap, share kept: mean −0.04 [−0.07, −0.02]\n")
    assert titles[6] == "Depth centroid of the lost score"
    atlas = swept().atlas
    assert atlas is not None
    draw_column(figure.axes[-1], replace(atlas.columns[0], n=49), "few", "C0", (), range(6))
    assert figure.axes[-1].get_title() == "few: share kept (n = 49, too few for narrow intervals)"
    band = figure.axes[1].collections[0].get_paths()[0].vertices
    reached = {round(float(y), 6) for _, y in band}  # pyright: ignore
    for effect in atlas.columns[0].effects:
        assert effect.share_kept is not None
        assert {round(effect.share_kept.low, 6), round(effect.share_kept.high, 6)} <= reached


def test_agreement_shows_the_ceiling_beside_the_correlation(tmp_path: Path) -> None:
    atlas = swept().atlas
    assert atlas is not None
    texts = saved_texts(agreement_figure(atlas.agreement), tmp_path / "a.svg")
    assert any(text.startswith("≤ ") for text in texts)
    assert "block influence" in texts
    one = build_atlas([task(right(0.8))], [[task(right(0.8))], [task(right(0.8, 30))]])
    assert agreement_figure(one.agreement).axes[0].texts[0].get_text() == "1.00"


@pytest.mark.slow
def test_halves_and_donor_layers_are_drawn_over_the_layers_they_belong_to() -> None:
    units = [Component((layer,), "attention") for layer in (1, 3, 4)]
    table = table_of("attention", units, [task(right(0.8))], [[task(right(0.8, lost))] for lost in (0, 30, 1)])[0]
    (ax,) = curves_figure(table).axes
    assert [list(line.get_xdata()) for line in ax.get_lines()][::2] == [[1, 3, 4], [3]]  # pyright: ignore
    assert ax.get_xlabel() == "attention of layer"
