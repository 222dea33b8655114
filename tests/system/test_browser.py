"""The report in a browser: nothing planted runs, nothing is asked for; keyboard, phone and both colours work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
from browser import MISSING, SKIP_REASON, Browser, started_browser
from compared_runs import write_run as compared_run
from results import SKILL, choice, evaluation, plan, write_quickstart, write_run

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.page import write_comparison
from shoal.eval.report.report import write_report
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import as_dict

pytestmark = [pytest.mark.prove, pytest.mark.skipif(bool(MISSING), reason=SKIP_REASON)]

PLANTED = (
    "\"'></style></title></textarea><script>window.planted = 1</script><img src=x onerror='window.planted = 2'>"
    "<svg onload='window.planted = 3'><a href='javascript:window.planted = 4'>{{ 7 * 7 }}`"
)
TEXT_AND_GROUND = """
const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (c) => c.slice(0, 3).map((v) => linear(v / 255))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (node) => { for (; node; node = node.parentElement) {
  const colour = rgba(getComputedStyle(node).backgroundColor); if (colour[3] === 1) return colour; } };
const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let count = 0;
while (walker.nextNode()) {
  const parent = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || parent.closest("svg, script, option") || !parent.checkVisibility()) continue;
  count += 1;
  const [one, other] = [light(rgba(getComputedStyle(parent).color)), light(ground(parent))];
  const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  if (contrast < 4.5) faint.push([contrast, walker.currentNode.data.trim().slice(0, 40)]);
}
return [count, faint];
"""
ROOT = Path(__file__).parents[2]
AXE = Path(os.environ.get("AXE", ROOT / "node_modules/axe-core/axe.min.js"))
RUN_AXE = """
for (const node of document.querySelectorAll("details")) node.open = true;
for (const node of document.querySelectorAll(".scroll, .plate")) node.style.background = "none";  // shades hide colours
return axe.run({resultTypes: ["violations"]}).then((found) => found.violations.filter((rule) => /serious|critical/.test(
  rule.impact)).map((rule) => [rule.id, ...rule.nodes.map((node) => node.target.join(" "))]));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run in which everything that others write is hostile."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    for role in SKILL:
        own = choice(role, f"named {PLANTED}", "retrieval", "generation", chance=0.0, share=0.8)
        tasks = (*evaluation(role).tasks, hostile(own))
        evaluation(role, tasks).save(folder / "eval" / f"{role}.json")
    replace(plan(), reason=PLANTED).save(folder / "plan.json")
    recipe = as_dict(parse_recipe({"model": "demo:smollm2-135m", "run_dir": "runs/test"})) | {"model": PLANTED}
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "stages": {}}))
    return write_report(folder)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with the numbers of README's table."""
    return write_report(write_quickstart(tmp_path_factory.mktemp("quickstart")))


def hostile(task: TaskScore) -> TaskScore:
    def said(item: ItemScore) -> ItemScore:
        return replace(item, prediction=f"{PLANTED} {item.prediction}", target=PLANTED, id=f"{PLANTED}{item.id}")

    return replace(task, items=tuple(map(said, task.items)))


def test_nothing_planted_runs_and_nothing_is_asked_for(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert "window.planted" in browser.run(
        "return [...document.querySelectorAll('.flips')].map((own) => own.textContent).join()"
    )
    assert browser.run("return window.planted ?? null") is None
    assert browser.run(
        "return ['script', 'style', 'img', 'title'].map((t) => document.querySelectorAll(t).length)"
    ) == [*(0, 1, 0), 1 + browser.run("return document.querySelectorAll('svg > title').length")]
    assert browser.run("return [...document.links].filter((l) => l.getAttribute('href')[0] !== '#').length") == 0
    assert "49" not in browser.run("return document.title")
    assert browser.console() == []
    assert [url for url in browser.requests() if not url.startswith("data:image/png")] == [page.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(browser: Browser, page: Path, scheme: str, tmp_path: Path) -> None:
    browser.prefer(scheme)
    browser.resize(1280, 900)
    browser.open(page)
    browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    count, faint = browser.run(TEXT_AND_GROUND)
    assert count > 500
    assert faint == []
    ground = browser.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(ground) > 200) if scheme == "light" else (max(ground) < 60)
    assert len(browser.screenshot(tmp_path / f"{scheme}.png")) > 20_000
    browser.prefer("light")


@pytest.mark.parametrize("width", [320, 375])
def test_a_phone_scrolls_down_only(browser: Browser, page: Path, width: int, tmp_path: Path) -> None:
    browser.resize(width, 700)
    browser.open(page)
    browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert browser.run("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert len(browser.screenshot(tmp_path / "phone.png")) > 20_000
    browser.resize(1280, 900)


def test_a_screen_reader_finds_its_way(browser: Browser, page: Path) -> None:
    browser.open(page)
    nodes = [node for node in browser.command("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = [node["role"]["value"] for node in nodes]
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert roles.count(landmark) == 1, landmark
    nameless = [
        node["role"]["value"]
        for node in nodes
        if node["role"]["value"]
        in ("button", "combobox", "searchbox", "link", "image", "region", "navigation", "table")
        and not node.get("name", {}).get("value", "").strip()
    ]
    assert nameless == []
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert browser.run("return document.querySelectorAll('th:not([scope])').length") == 0
    browser.press("Tab")
    assert browser.run("return document.activeElement.textContent") == "Skip to the results"
    browser.press("Enter")
    assert browser.run("return document.activeElement.id") == "main"


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core not found (docs/contributing.md has the command)")
@pytest.mark.parametrize("of", ["report", "comparison", "site"])
def test_axe_finds_nothing_serious(browser: Browser, page: Path, quickstart: Path, of: str, tmp_path: Path) -> None:
    pages = [page, quickstart]
    if of == "comparison":
        runs = [compared_run(tmp_path / name) for name in ("one", "other")]
        pages = [write_comparison(compare_runs(runs), tmp_path / "out")]
    elif of == "site":
        pytest.importorskip("material", reason="needs the extra docs")
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        pages = [tmp_path / f"{name}.html" for name in ("index", "docs/first_steps", "docs/how-to/publish")]
    for own, width, scheme in product(pages, (1280, 390), ("light", "dark")):
        browser.prefer(scheme)
        browser.resize(width, 900)
        browser.open(own)
        assert browser.run(AXE.read_text(encoding="utf-8") + RUN_AXE) == [], (own.name, width, scheme)
        assert browser.run("return document.documentElement.scrollWidth") <= width, own.name


# --- what is seen first, on a screen and on a phone ------------------------------------------------------------------

SEEN_TEXT = """
const seen = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const parent = walker.currentNode.parentElement, range = document.createRange();
  if (parent.closest('svg, script, .skip') || !parent.checkVisibility()) continue;
  range.selectNodeContents(walker.currentNode);
  const box = range.getBoundingClientRect();
  if (box.width && box.top >= 0 && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth)
    seen.push(walker.currentNode.data.trim());
}
return seen.filter(Boolean).join(' ');
"""


@pytest.mark.parametrize(("width", "height", "at_least"), [(1280, 800, 7), (390, 844, 5)])
def test_the_first_screen_says_what_was_lost_and_what_came_back(
    browser: Browser, quickstart: Path, width: int, height: int, at_least: int
) -> None:
    browser.resize(width, height)
    browser.open(quickstart)
    seen = browser.run(SEEN_TEXT)
    lines = [
        "retrieval, generated 64 % [54, 73] 22 % [15, 31] 98 % [93, 99]",
        "retrieval, option text 98 % [93, 99] 66 % [56, 75] 98 % [93, 99]",
        "knowledge, generated 38 % [29, 48] 1 % [0, 5] 47 % [38, 57]",
        "knowledge, option text 93 % [86, 97] 64 % [54, 73] 85 % [77, 91]",
        "reasoning, one step, option text 48 % [38, 58] 35 % [26, 45] 46 % [37, 56]",
        "reasoning, worked answers nats per token, lower is better 1.21 [1.15, 1.27] 1.96 [1.91, 2.02] 0.25",
        "perplexity, running text lower is better 12.9 [11.4, 14.3] 31.5 [28.0, 35.1] 17.3 [15.7, 18.9]",
    ]
    for line in lines[:at_least]:
        assert line in seen
    assert seen.index("▼ −42 points") < seen.index("▲ +76 points")
    colours = browser.run(
        "return [...document.querySelectorAll('.board thead .mark')].map((m) => getComputedStyle(m).backgroundColor)"
    )
    assert colours == ["rgb(125, 133, 144)", "rgb(213, 94, 0)", "rgb(31, 134, 200)"], "those of the figures"
