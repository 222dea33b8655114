"""What a comparison writes: the page, its data and its figure.

Covers: shoal.eval.compare.figure.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from compared_runs import cell_of, nats, point, write_run, write_speed
from html_page import Page

from shoal.artifacts.evaluation import TaskScore
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.figure import frontier, pareto_figure
from shoal.eval.compare.page import as_data, comparison_text, write_comparison
from shoal.eval.report.report import write_report
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
    found, name = data["tasks"][0], data["models"][4]["name"]
    assert name == "B distilled"
    assert found["scores"][name]["ci_low"] == cell.score.ci_low
    (change,) = [own for own in found["changes"] if own["after"] == name]
    assert (change["before"], change["value"], change["adjusted_p"]) == (
        "A distilled",
        cell.difference.difference,
        cell.adjusted_p,
    )
    score, change = f"{100 * cell.score.score:.1f} %", f"{100 * abs(cell.difference.difference):.1f} points"
    for text in (score, change, "82,000", "0.50", "30.0 (1.50 × ", "1.35, 1.88", "5.0 million", "10 MB"):
        assert text in page.words
        assert text in markdown
    assert "(pareto.png)" in markdown
    assert not [tag for tag, attributes in page.tags for name in attributes if name in ("src", "srcset")]
    assert [attributes["role"] for tag, attributes in page.tags if tag == "svg"] == ["img"]


def test_a_run_and_a_comparison_tell_a_task_in_the_same_words(two: list[Path], tmp_path: Path) -> None:
    write_report(two[0])
    of_run = json.loads((two[0] / "results.json").read_text())["tasks"]
    of_all = as_data(compare_runs(two))["tasks"]
    assert [own["task"] for own in of_run] == [own["task"] for own in of_all]
    for own, other in zip(of_run, of_all, strict=True):
        assert own.keys() == other.keys()
        assert own["scores"]["distilled"] == other["scores"]["A distilled"]
        assert own["share_kept"]["distilled"] == other["share_kept"]["A distilled"]
        assert own["changes"][0].keys() == other["changes"][0].keys()


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
    assert json.loads(data)["tasks"][0]["changes"][0]["ci_low"] is None
    assert "too few items" in comparison_text(comparison)


def test_the_frontier_holds_what_nothing_else_beats() -> None:
    points = (point("A", 10, 0.9), point("B", 8, 0.5), point("C", 8, 0.6), point("D", 9, 0.55), point("E", 6, 0.6))
    assert [one.label for one in frontier(points, "parameters")] == ["E", "A"]
    assert [one.label for one in frontier(points, "decode")] == ["A"]
    equal = (point("A", 8, 0.6), point("B", 8, 0.6))
    assert [one.label for one in frontier(equal, "bytes")] == ["A", "B"]


@pytest.mark.slow
def test_letters_and_stairs_are_drawn_and_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    points = (point("", 10, 1.0, "teacher"), point("A", 6, 0.5), point("A, B", 6, 0.1, "pruned"))
    figures = [pareto_figure({"parameters": points}, {"A": "one", "B": "other"}, "Mean") for _ in range(2)]
    (ax,) = figures[0].axes
    assert [text.get_text() for text in ax.texts] == ["", "A", "A, B"]
    assert len([line for line in ax.lines if line.get_drawstyle() == "steps-post"]) == 1
    written = [save_figure(figure, tmp_path / f"{index}.svg") for index, figure in enumerate(figures)]
    assert written[0] == written[1]
