"""Figures hold what they claim, are text in SVG, repeat bit for bit, and never take names from data for markup.

Covers: shoal.figures.layers, shoal.figures.scores, shoal.figures.training.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from subprocess import run

import pytest
from matplotlib.figure import Figure
from results import DROP, NUM_LAYERS, choice, evaluation, importance, training

from shoal.artifacts.evaluation import Scores
from shoal.figures.layers import importance_figure
from shoal.figures.scores import before_after_figure, ladders, level_figure
from shoal.figures.style import INK, inline_svg, save_figure
from shoal.figures.training import training_figure

ROLES = ("teacher", "pruned", "distilled")


def texts(path: Path) -> list[str]:
    return [node.text or "" for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_importance_figure_hatches_the_cut_layers_and_frames_their_run() -> None:
    figure = importance_figure(importance(), DROP)
    bars, heat, _ = figure.axes
    assert len(bars.patches) == NUM_LAYERS
    assert [layer for layer, bar in enumerate(bars.patches) if bar.get_hatch()] == list(DROP)
    assert heat.patches[0].get_xy() == (DROP[0] - 0.5, len(DROP) - 0.5)  # pyright: ignore[reportAttributeAccessIssue]


def test_training_figure_draws_every_loss_term_and_the_learning_rate() -> None:
    losses, rate = training_figure(training()).axes
    assert [line.get_label() for line in losses.get_lines()] == ["Loss", "Forward kl", "Cross entropy"]
    assert rate.get_title(loc="left") == "Learning rate"


def test_training_figure_shows_what_was_scored_on_the_way() -> None:
    watched = {"step": 5.0, "watch/perplexity": 3.2, "watch/retrieval": 0.4}
    figure = training_figure(replace(training(), history=(*training().history, watched)))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    held_out, tasks = figure.axes[1:3]
    assert titles[1:3] == ["Held-out text while training, nats per token", "Tasks while training, score"]
    for ax, score in ((held_out, 3.2), (tasks, 0.4)):
        (line,) = ax.get_lines()
        assert [list(line.get_xdata()), list(line.get_ydata())] == [[5.0], [score]]  # pyright: ignore


def climbed(role: str, *levels: float) -> Scores:
    tasks = (choice(role, f"track_{level:g}", "reasoning", "generation", chance=0.0) for level in levels)
    return evaluation(role, tuple(replace(t, family="track", level=v) for t, v in zip(tasks, levels, strict=True)))


def test_level_figure_draws_every_role_over_the_levels_that_all_share() -> None:
    (ladder,) = ladders([climbed("teacher", 4, 1, 2), climbed("pruned", 1, 2, 8), evaluation("distilled")])
    assert (ladder.family, ladder.protocol, ladder.levels) == ("track", "generation", (1, 2))
    assert list(ladder.scores) == ["teacher", "pruned"]
    (ax,) = level_figure([ladder]).axes
    for role, scores in ladder.scores.items():
        (line,) = [line for line in ax.get_lines() if line.get_label() == role]
        assert list(line.get_ydata()) == [score.score for score in scores]  # pyright: ignore
        drawn = [tuple(map(float, line.get_ydata())) for line in ax.get_lines()]  # pyright: ignore
        assert {(score.ci_low, score.ci_high) for score in scores} <= set(drawn)
    assert ladders([climbed("teacher", 1)]) == ()


@pytest.mark.slow
def test_before_after_figure_shows_scores_intervals_and_chance(tmp_path: Path) -> None:
    figure = before_after_figure([evaluation(role) for role in ROLES])
    abilities = [ax.get_title(loc="left") for ax in figure.axes]
    assert abilities == ["Retrieval", "Reasoning", "Language: nats per token, lower is better"]
    task = choice("teacher", "retrieval_continuation", "retrieval", "continuation")
    drawn = [tuple(map(float, line.get_xdata())) for line in figure.axes[0].get_lines()]  # pyright: ignore
    assert (task.ci_low, task.ci_high) in drawn
    assert (task.score,) in drawn
    assert (task.chance, task.chance) in drawn
    save_figure(figure, tmp_path / "a.svg")
    assert {"teacher", "pruned", "distilled", "chance", "option text"} <= set(texts(tmp_path / "a.svg"))


def test_before_after_figure_shows_reworded_tasks_first_and_the_trained_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(figure: Figure) -> list[str]:
        return [text.get_text() for text in figure.axes[0].texts]

    own = choice("teacher", "retrieval_generation", "retrieval", "generation")
    reworded = choice("teacher", "retrieval_reworded_generation", "retrieval", "generation")
    models = [evaluation("teacher", tasks=(replace(own, column="in"), replace(reworded, column="reworded")))]
    assert rows(before_after_figure(models)) == ["reworded, generated", "generated, trained wording"]
    monkeypatch.setattr("shoal.figures.scores.MAX_TASKS", 1)
    assert rows(before_after_figure(models)) == ["reworded, generated"]


def test_names_from_data_stay_text(tmp_path: Path) -> None:
    name = "$\\frac{a}$ <script>alert(1)</script>\x00"
    task = choice("teacher", name, "retrieval", "continuation")
    figure = before_after_figure([evaluation("teacher", tasks=(task,))])
    svg = save_figure(figure, tmp_path / "a.svg")
    assert any("<script>" in text and "\ufffd" in text for text in texts(tmp_path / "a.svg"))
    assert "<script" not in inline_svg(svg, "x", title=name, description=name)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_equal_input_gives_equal_bytes(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        save_figure(importance_figure(importance(), DROP), tmp_path / f"{name}.{suffix}")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content == (tmp_path / f"b.{suffix}").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"a.{suffix}", f"b.{suffix}"]
    assert b"<metadata" not in content


@pytest.mark.slow
def test_inline_svgs_share_a_page_without_sharing_ids(tmp_path: Path) -> None:
    figures = {"one": importance_figure(importance()), "two": training_figure(training())}
    files = {name: save_figure(figure, tmp_path / f"{name}.svg") for name, figure in figures.items()}
    assert files["one"] == (tmp_path / "one.svg").read_bytes()
    markups = [inline_svg(svg, name, title="T <1>", description="D") for name, svg in files.items()]
    ids = [found for markup in markups for found in re.findall(r'\bid="([^"]+)"', markup)]
    assert len(ids) == len(set(ids))
    for markup in markups:
        root = ElementTree.fromstring(markup)
        assert [root[0].text, root[1].text] == ["T <1>", "D"]
        for target in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', markup):
            assert "".join(target) in ids
        assert INK not in markup
        assert "<style" not in markup
        background = re.search(r'id="\w+-patch_1">\s*<path d="([^"]*)" style="fill: (.*?)"', markup)
        assert background is not None
        assert background[2] == "none", "a page shows through"
        size = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', markup)[0]
        assert set(size) <= set(background[1].split()), "it is the whole picture's"


@pytest.mark.slow
def test_importing_figures_does_not_load_matplotlib() -> None:
    code = "import sys, shoal.figures.scores, shoal.figures.training; assert 'matplotlib' not in sys.modules"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
