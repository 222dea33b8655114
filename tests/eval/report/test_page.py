"""The page stands by itself, lets nothing in, and can be read by everybody; what Markdown escapes, how numbers read.

Covers: shoal.formatting.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from cases import cases
from html_page import Page
from results import SKILL, choice, evaluation, importance, plan, training

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.eval.report.findings import compare
from shoal.eval.report.page import Table, environment, inline, prose, with_interval
from shoal.eval.report.report import write_report
from shoal.eval.report.run import read_run
from shoal.formatting import layers_text, signed
from shoal.stats.paired import paired
from shoal.yaml_text import read_yaml

CASES = cases(__file__)
ATTACK = "\"><img src=x onerror=alert(1)><script>alert('x')</script>'--><style>*{display:none}</style>\x00\u202e"


PRIVATE = read_yaml((Path(__file__).parents[2] / "support/private_words.yaml").read_text(encoding="utf-8"))


def planted(text: str) -> tuple[TaskScore, TaskScore]:
    """The same two items before and after, one lost, with hostile names and answers."""
    before = choice("teacher", text, text, "generation", n=2)
    before = replace(before, items=tuple(ItemScore(f"{text}{i}", 1.0, text, text) for i in range(2)), metric=text)
    before = replace(before, score=1.0)
    after = replace(before, score=0.5, ci_low=0.1, items=(ItemScore(f"{text}0", 0.0, text, text), before.items[1]))
    return before, after


@pytest.mark.slow
def test_page_is_well_formed_and_self_contained(report: tuple[Page, str, Path]) -> None:
    page, _, _ = report
    assert page.crossed == []
    assert page.open == []
    assert not page.all("script")
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                assert value is not None
                assert value.startswith(("#", "data:image/png")), (tag, value)
    assert not page.all("link")
    styles = " ".join(text for text in page.text if "{" in text)
    assert "url(" not in styles
    assert "@import" not in styles


def test_policy_lets_in_the_one_style_sheet_by_its_hash(report: tuple[Page, str, Path]) -> None:
    page, _, folder = report
    html = (folder / "report.html").read_text(encoding="utf-8")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    (content,) = re.findall("<style>(.*?)</style>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert allowed.pop("style-src-elem") == f"'sha256-{digest}'"
    assert allowed == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }


def test_page_is_accessible(report: tuple[Page, str, Path]) -> None:
    page, _, _ = report
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.all("a"):
        assert (attributes["href"] or "")[1:] in ids
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in attributes for attributes in page.all("th"))
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert set((svg["aria-labelledby"] or "").split()) <= set(ids)
    assert len(page.all("svg")) == 3
    assert any("prefers-color-scheme: dark" in text for text in page.text)


def test_both_outputs_tell_the_same_numbers(report: tuple[Page, str, Path]) -> None:
    page, markdown, folder = report
    run = read_run(folder)
    row = next(row for row in compare(run).rows if row.key[0] == "retrieval_continuation")
    for role in SKILL:
        number = f"{100 * row.scores[role].score:.1f} %"
        assert number in page.words
        assert number in markdown
    found = paired(row.scores["pruned"], row.scores["distilled"])
    for text in (f"{100 * found.difference:+.1f} points", "layers 3 to 5", "the run of 3 layers with the lowest"):
        assert text in page.words
        assert text in markdown
    for name in ("before_after", "importance", "training"):
        assert f"(figures/{name}.png)" in markdown
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 1000


@pytest.mark.slow
def test_the_page_stays_small_however_many_items_there_are(tmp_path: Path) -> None:
    """A figure of thousands of items is as large as one of a hundred."""
    for role in ("teacher", "pruned", "distilled"):
        names = ("retrieval_generation", "knowledge_generation", "reasoning_generation")
        tasks = tuple(choice(role, name, name.split("_")[0], "generation", chance=0.0, n=3000) for name in names)
        long = [replace(task, items=tuple(map(partial(wordy, role), task.items))) for task in tasks]
        evaluation(role, tasks=tuple(long)).save(tmp_path / "eval" / f"{role}.json")
    page = write_report(tmp_path).read_bytes()
    (note,) = re.findall(r"The report shows ([\d,]+) of ([\d,]+)", page.decode())
    shown, changed = (int(number.replace(",", "")) for number in note)
    assert changed > 5000
    assert shown == page.count(b'<dl class="flip">') > 40
    assert len(page) < 1_300_000
    assert len((tmp_path / "report.md").read_bytes()) < 200_000


def wordy(role: str, item: ItemScore) -> ItemScore:
    """The same item with a long answer, every character of which the page has to escape."""
    return replace(item, prediction=f"{role} {item.score} " + "<&" * 2000)


@pytest.mark.slow
def test_hostile_text_from_models_and_data_stays_text(tmp_path: Path) -> None:
    before, after = planted(ATTACK)
    evaluation("teacher", tasks=(before,)).save(tmp_path / "eval" / "teacher.json")
    evaluation("pruned", tasks=(after,)).save(tmp_path / "eval" / "pruned.json")
    replace(plan(), reason=ATTACK).save(tmp_path / "plan.json")
    replace(training(), data={"sources": {ATTACK: {ATTACK: 1}}, "note": ATTACK}).save(tmp_path / "distill.json")
    replace(importance(), layers={ATTACK: importance().layers["block_influence"]}).save(tmp_path / "importance.json")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"model": ATTACK, "note": ATTACK}}))
    page = Page(write_report(tmp_path).read_text())
    assert page.crossed == []
    assert not page.all("script")
    assert not page.all("img")
    assert len(page.all("style")) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert('x')</script>" in page.words
    assert "\x00" not in page.words
    markdown = (tmp_path / "report.md").read_text()
    for outside in re.split(r"^```.*?^```$", markdown, flags=re.DOTALL | re.MULTILINE):
        assert "<script" not in outside
        assert "<img" not in outside


@pytest.mark.parametrize(("text", "escaped"), CASES["inline"])
def test_markdown_escapes_what_could_be_markup(text: str, escaped: str) -> None:
    assert inline(text) == escaped


@pytest.mark.parametrize(("text", "escaped"), CASES["prose"])
def test_markdown_keeps_commands_as_code_and_nothing_else(text: str, escaped: str) -> None:
    assert prose(text) == escaped


def test_markdown_blocks_cannot_be_broken_out_of() -> None:
    write = environment("md").get_template("md.jinja").module
    assert "`````yaml\n" in write.code("s", "a\n````\nb")  # pyright: ignore
    lines = write.table(Table("c", ("a", "b"), (("1|2", "3"),))).rstrip().split("\n")  # pyright: ignore
    assert lines[-1] == r"| 1\|2 | 3 |"
    assert lines[-2] == "|:--|--:|"


def test_a_cell_of_the_page_has_its_figure_on_a_line_of_its_own() -> None:
    parts = ["[50.2, 69.1]", "kept 61 %", "+1.5 (p &lt; 0.001)"]
    told = "60.0 % " + " ".join(f'<span class="ci">{part}</span>' for part in parts)
    assert with_interval("60.0 % [50.2, 69.1], kept 61 %, +1.5 (p < 0.001)") == told
    assert with_interval("30 (as <b>)") == '30 <span class="ci">(as &lt;b&gt;)</span>'


def test_wording_of_numbers_and_layers() -> None:
    assert layers_text((3, 13, 14, 20, 21, 22)) == "3, 13, 14, 20 to 22"
    assert [signed(value, 1) for value in (0.04, -0.04, 1.26, -1.26)] == ["0.0", "0.0", "+1.3", "−1.3"]


@pytest.mark.parametrize("name", ["report", "quickstart"])
def test_no_report_has_a_private_word(name: str, request: pytest.FixtureRequest) -> None:
    text = re.sub(r"(?ms)^```.*?^```|`[^`]*`|\]\([^)]*\)", " ", request.getfixturevalue(name)[1])
    assert not {word: plain for word, plain in PRIVATE.items() if re.search(word, text, re.IGNORECASE)}
