"""What a comparison writes: the page, its data and its figure.

Covers: shoal.eval.compare.data, shoal.eval.compare.figure, shoal.figures.pareto.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from compared_runs import cell_of, nats, point, write_run, write_speed
from html_page import Page

from shoal.artifacts.evaluation import TaskScore
from shoal.errors import UserError
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.data import as_data
from shoal.eval.compare.page import comparison_text, write_comparison
from shoal.figures.pareto import ParetoPanel, frontier, pareto_figure
from shoal.figures.style import save_figure

ATTACK = "\"><img src=x onerror=alert(1)><script>alert('x')</script>"


@pytest.mark.slow
def test_page_markdown_json_and_figure_tell_the_same(two: list[Path], tmp_path: Path) -> None:
    write_speed(two[0], 1.5)
    write_speed(two[1], 1.8)
    comparison = compare_runs(two)
    path = write_comparison(comparison, tmp_path / "out")
    names = ["compare.html", "compare.json", "compare.md", "pareto.png", "pareto.svg"]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    page, markdown = Page(path.read_text()), (path.parent / "compare.md").read_text()
    data = json.loads((path.parent / "compare.json").read_text())
    cell = cell_of(comparison, "B", "distilled", "retrieval_continuation")
    assert cell.difference is not None
    found = data["models"][4]["cells"][0]
    assert (data["models"][4]["run"], data["models"][4]["role"]) == ("B", "distilled")
    assert (found["score"], found["ci_low"]) == (cell.score.score, cell.score.ci_low)
    assert found["difference"]["adjusted_p"] == cell.adjusted_p
    score, change = f"{100 * cell.score.score:.1f} %", f"{100 * abs(cell.difference.difference):.1f} points"
    for text in (score, change, "82,000", "0.50", "30.0 (1.50 × ", "1.35, 1.88", "5.0 million", "10 MB"):
        assert text in page.words
        assert text in markdown
    assert "(pareto.png)" in markdown
    assert not [tag for tag, attributes in page.tags for name in attributes if name in ("src", "srcset")]
    assert [attributes["role"] for tag, attributes in page.tags if tag == "svg"] == ["img"]


@pytest.mark.slow
def test_hostile_names_stay_text_everywhere(tmp_path: Path) -> None:
    name = ATTACK.replace("/", "|")
    hostile = {"retrieval_continuation": f"{ATTACK}\x1b[31m"}

    def change(task: TaskScore) -> TaskScore:
        return replace(task, task=hostile.get(task.task, task.task), ability=ATTACK)

    runs = [write_run(tmp_path / "one", change=change), write_run(tmp_path / name, change=change, distilled=0.5)]
    comparison = compare_runs(runs)
    page = Page(write_comparison(comparison, tmp_path / "out").read_text())
    assert not [tag for tag, attributes in page.tags if tag == "img" or any(key.startswith("on") for key in attributes)]
    assert not [tag for tag, attributes in page.tags if tag == "script" and "alert" in str(attributes)]
    assert "<script>alert" not in "".join((tmp_path / "out" / "compare.html").read_text().split("</style>")[1:])
    assert "<img" not in (tmp_path / "out/compare.md").read_text()
    assert "<script>" not in (tmp_path / "out/pareto.svg").read_text()
    assert "\x1b" not in comparison_text(comparison)


def test_infinite_ends_are_null_in_json(tmp_path: Path) -> None:
    def one_window(share: float) -> tuple[TaskScore, ...]:
        return (nats(4 - 2 * share, n=1),)

    runs = [write_run(tmp_path / name, scores=one_window, distilled=d) for name, d in (("one", 0.7), ("other", 0.5))]
    comparison = compare_runs(runs)
    data = json.dumps(as_data(comparison), allow_nan=False)
    assert json.loads(data)["models"][4]["cells"][0]["difference"]["ci_low"] is None
    assert "too few items" in comparison_text(comparison)


def test_the_frontier_holds_what_nothing_else_beats() -> None:
    points = (point("A", 10, 0.9), point("B", 8, 0.5), point("C", 8, 0.6), point("D", 9, 0.55), point("E", 6, 0.6))
    by_size = frontier(ParetoPanel("x", "parameters", points))
    assert [one.label for one in by_size] == ["E", "A"]
    by_speed = frontier(ParetoPanel("x", "decode", points))
    assert [one.label for one in by_speed] == ["A"]
    equal = (point("A", 8, 0.6), point("B", 8, 0.6))
    assert [one.label for one in frontier(ParetoPanel("x", "bytes", equal))] == ["A", "B"]


@pytest.mark.slow
def test_marks_of_equal_cost_stand_side_by_side_and_letters_and_stairs_are_drawn(tmp_path: Path) -> None:
    points = (point("", 10, 1.0, "teacher"), point("A", 6, 0.5), point("B", 6, 0.6), point("A, B", 6, 0.1, "pruned"))
    panel = ParetoPanel("Retrieval, generation", "parameters", points)
    figure = pareto_figure([[panel]], {"A": "one", "B": "other"})
    (ax,) = figure.axes
    marks = [line for line in ax.lines if line.get_marker() in ("o", "v", "s")]
    places = [float(line.get_xdata()[0]) for line in marks]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    assert len(set(places)) == 4
    assert places[0] == 10
    assert [text.get_text() for text in ax.texts] == ["", "A", "B", "A, B"]
    stairs = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    assert len(stairs) == 1
    assert [label.get_text() for legend in figure.legends for label in legend.get_texts()] == [
        *("teacher", "pruned", "distilled", "frontier"),
        *("A = one", "B = other"),
    ]
    save_figure(figure, tmp_path / "one.svg")
    save_figure(pareto_figure([[panel]], {"A": "one", "B": "other"}), tmp_path / "again.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_a_figure_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="there is no retention to draw"):
        pareto_figure([], {})
