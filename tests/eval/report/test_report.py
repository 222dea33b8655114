"""The report says what the results allow and no more, works after any stage, and is safe to pass on.

Covers: shoal.eval.report.cautions, shoal.eval.report.details, shoal.eval.report.document, shoal.eval.report.flips,
shoal.eval.report.headline, shoal.eval.report.page, shoal.eval.report.sections,
shoal.eval.report.wording, shoal.formatting, shoal.redaction.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from matplotlib.figure import Figure
from results import (
    DROP,
    NUM_LAYERS,
    QUICKSTART,
    SKILL,
    choice,
    evaluation,
    importance,
    plan,
    provenance,
    training,
    write_quickstart,
    write_run,
)
from sweep_results import importance_with_parts

from shoal.artifacts.artifact import ClosedGap, Evaluation, ItemScore, Provenance, PruningPlan, TaskScore
from shoal.artifacts.depth import DepthUse, EffectiveDepth, Moved, RoleUse, TaskUse
from shoal.artifacts.importance import Estimate
from shoal.artifacts.search import (
    Column,
    Correlation,
    HealedPlan,
    Interval,
    PlanStanding,
    Ranking,
    SearchResult,
    Standing,
)
from shoal.compress.sweeps.atlas import build_atlas
from shoal.errors import UserError
from shoal.eval.harness.rates import with_rates
from shoal.eval.harness.samples import with_interval
from shoal.eval.report.cautions import cautions_section
from shoal.eval.report.document import (
    FLIPS_IN_MARKDOWN,
    Code,
    Document,
    Flip,
    Flips,
    Paragraph,
    Section,
    Table,
    block_markdown,
    inline,
    prose,
    to_markdown,
)
from shoal.eval.report.findings import Comparison, Run, compare, protocol_gaps, read_result, read_run
from shoal.eval.report.flips import within
from shoal.eval.report.headline import facts, headline
from shoal.eval.report.page import to_html
from shoal.eval.report.report import build_document, write_report
from shoal.formatting import layers_text, signed
from shoal.recipe.edits import SkipAttention, Swap
from shoal.redaction import redacted
from shoal.stats.paired import holm, paired

ATTACK = "\"><img src=x onerror=alert(1)><script>alert('x')</script>'--><style>*{display:none}</style>\x00\u202e"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, Path]:
    folder = write_run(tmp_path_factory.mktemp("run"))
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text()), (folder / "report.md").read_text(), folder


def told(folder: Path) -> str:
    """report.md of the folder, without drawing its figures."""
    run = read_run(folder)
    return to_markdown(build_document(run, compare(run), {}, read_result(SearchResult, folder / SearchResult.FILE)))


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
    assert page.all("script") == [{}]
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


def test_policy_lets_in_the_one_script_and_style_sheet_by_their_hashes(report: tuple[Page, str, Path]) -> None:
    page, _, folder = report
    html = (folder / "report.html").read_text(encoding="utf-8")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    for tag, directive in (("script", "script-src"), ("style", "style-src-elem")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert allowed.pop(directive) == f"'sha256-{digest}'"
    assert allowed == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }


def test_a_page_without_changed_items_has_no_script(tmp_path: Path) -> None:
    plan().write(tmp_path / "plan.json")
    page = Page(write_report(tmp_path).read_text())
    assert not page.all("script")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "script-src" not in (policy or "")


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
    assert len(page.all("svg")) == 4
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
    for name in ("before_after", "depth", "runs", "training"):
        assert f"(figures/{name}.png)" in markdown
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 1000


@pytest.mark.slow
def test_a_swept_run_shows_its_atlas(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    scores = {role: [choice(role, "retrieval", "retrieval", "continuation")] for role in SKILL}
    removed = [scores["pruned"], scores["distilled"]] * (NUM_LAYERS // 2)
    replace(importance(), atlas=build_atlas(scores["teacher"], removed)).write(folder / "importance.json")
    text = write_report(folder).read_text()
    assert "What every layer is worth, by ability and protocol" in text
    assert (folder / "figures/atlas.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_that_tells_reading_from_writing_says_so(tmp_path: Path) -> None:
    importance_with_parts().write(tmp_path / "importance.json")
    text = write_report(tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert "What layers read and what they write" in text
    assert "reading is needed in layers 0 and 2" in markdown or "reading is needed in layers 0, 2" in markdown
    assert "| retrieval/generation | 4 | +31.2 points" in markdown
    assert "| +30 points" in markdown
    assert (tmp_path / "figures/read_write.png").stat().st_size > 1000


def test_headline_claims_only_what_the_tests_show(report: tuple[Page, str, Path]) -> None:
    run = read_run(report[2])
    text = " ".join(headline(run, compare(run)))
    assert "3 of the 8 decoder layers" in text
    assert "Cutting made all 3 scores worse" in text
    assert "Distilling made all 3 scores better than those of the cut model" in text
    assert "One task is left out" in text


def test_the_speed_at_a_glance_has_the_range_of_its_rounds(report: tuple[Page, str, Path]) -> None:
    run = read_run(report[2])
    assert run.speed is not None
    noisy = {
        role: replace(run.speed.roles[role], decode_tokens_per_s=median, samples={"decode": samples})
        for role, median, samples in (("teacher", 10.0, (8.0, 10.0, 16.0)), ("distilled", 12.0, (12.0, 14.0, 8.0)))
    }
    glance = facts(replace(run, speed=replace(run.speed, roles=noisy)))
    assert ("1.20 ×", "decoding speed (single rounds: 0.50 to 1.50 ×)") in glance


def test_a_change_within_its_interval_is_no_change(tmp_path: Path) -> None:
    pruned = choice("pruned", "retrieval_continuation", "retrieval", "continuation")
    flipped = next(i for i, item in enumerate(pruned.items) if item.score == 0)
    items = tuple(replace(item, score=1.0) if i == flipped else item for i, item in enumerate(pruned.items))
    for role, task in (("pruned", pruned), ("distilled", replace(pruned, items=items, score=pruned.score + 0.01))):
        evaluation(role, tasks=(task,)).write(tmp_path / "eval" / f"{role}.json")
    run = read_run(tmp_path)
    text = " ".join(headline(run, compare(run)))
    assert "no score clearly better" in text
    assert "no clear change: retrieval (option text)" in text
    assert "From which size on a true change, taken alone, shows four times out of five: Pruned to distilled: " in told(
        tmp_path
    )


def test_worse_is_said_for_rising_nats_and_better_for_falling(report: tuple[Page, str, Path]) -> None:
    row = next(row for row in compare(read_run(report[2])).rows if row.ability == "language")
    assert row.differences["teacher", "pruned"].difference > 0
    assert row.verdict("teacher", "pruned") == "worse"
    assert row.verdict("pruned", "distilled") == "better"
    assert "perplexity" in report[1]


def test_p_values_are_corrected_over_tasks(report: tuple[Page, str, Path]) -> None:
    rows = compare(read_run(report[2])).rows
    pair = ("pruned", "distilled")
    expected = holm([row.differences[pair].p_value for row in rows])
    assert [row.adjusted_p[pair] for row in rows] == expected


def test_tasks_at_chance_are_listed_and_not_hidden(report: tuple[Page, str, Path]) -> None:
    page, markdown, _ = report
    section = markdown.split("## No signal here")[1].split("\n## ")[0]
    assert "reasoning, generated" in section
    assert "retrieval, option text" not in section
    assert "reasoning, generated" in markdown.split("## No signal here")[0]
    assert "No signal here" in page.words


def test_protocol_gap_is_retention_by_likelihood_minus_generation(report: tuple[Page, str, Path]) -> None:
    rows = compare(read_run(report[2])).rows
    ((likely, written, gap),) = protocol_gaps(rows, "pruned")
    first, second = likely.retained["pruned"].value, written.retained["pruned"].value
    assert first is not None
    assert second is not None
    assert (likely.key[1], written.key[1]) == ("continuation", "generation")
    assert gap == pytest.approx(first - second)


def test_flips_show_both_texts_and_their_counts(report: tuple[Page, str, Path]) -> None:
    page, markdown, folder = report
    row = next(row for row in compare(read_run(folder)).rows if row.key[0] == "retrieval_continuation")
    won = paired(row.scores["pruned"], row.scores["distilled"]).won
    assert won > FLIPS_IN_MARKDOWN
    assert f"retrieval, option text: {won} items won back by distilling" in page.words
    assert "retrieval\\_continuation" not in markdown  # inside a word it is no markup
    assert f"retrieval, option text: {won} items won back by distilling, {FLIPS_IN_MARKDOWN} shown" in markdown
    assert "pruned said so" in page.words
    assert len(page.all("details")) > 3


@pytest.mark.slow
def test_the_page_stays_small_however_many_items_there_are(tmp_path: Path) -> None:
    """Bound: 1 MB of changed items in the page. A figure of thousands of items is as large as one of a hundred."""
    for role in ("teacher", "pruned", "distilled"):
        names = ("retrieval_generation", "knowledge_generation", "reasoning_generation")
        tasks = tuple(choice(role, name, name.split("_")[0], "generation", chance=0.0, n=3000) for name in names)
        long = [replace(task, items=tuple(map(partial(wordy, role), task.items))) for task in tasks]
        evaluation(role, tasks=tuple(long)).write(tmp_path / "eval" / f"{role}.json")
    page = write_report(tmp_path).read_bytes()
    (note,) = re.findall(r"([\d,]+) of ([\d,]+) are shown", page.decode())
    shown, changed = (int(number.replace(",", "")) for number in note)
    assert changed > 5000
    assert shown == page.count(b"<li data-item=") > 200
    lists = page.index(b'class="lists"'), page.index(b"</section>", page.index(b'class="lists"'))
    assert 800_000 < lists[1] - lists[0] < 1_000_000
    assert len(page) < 1_300_000
    assert len((tmp_path / "report.md").read_bytes()) < 200_000


def wordy(role: str, item: ItemScore) -> ItemScore:
    """The same item with a long answer, every character of which the page has to escape."""
    return replace(item, prediction=f"{role} {item.score} " + "<&" * 2000)


def test_every_task_keeps_its_share_of_a_small_room() -> None:
    flips = [Flip(str(index), "", "x", "y" * 100, "z" * 100) for index in range(50)]
    groups = [Flips(name, "lost", False, "teacher", "pruned", 50, tuple(flips)) for name in ("a", "b")]
    kept = within(groups, 12 * 850)
    assert [len(group.items) for group in kept] == [6, 6]
    assert kept[0].caption == "a: 50 items lost, 6 shown"
    assert [len(group.items) for group in within(groups, 10**6)] == [50, 50]


@pytest.mark.slow
def test_hostile_text_from_models_and_data_stays_text(tmp_path: Path) -> None:
    before, after = planted(ATTACK)
    evaluation("teacher", tasks=(before,)).write(tmp_path / "eval" / "teacher.json")
    evaluation("pruned", tasks=(after,)).write(tmp_path / "eval" / "pruned.json")
    replace(plan(), reason=ATTACK).write(tmp_path / "plan.json")
    replace(training(), data={"sources": {ATTACK: {ATTACK: 1}}, "note": ATTACK}).write(tmp_path / "distill.json")
    replace(importance(), layers={ATTACK: importance().layers["block_influence"]}).write(tmp_path / "importance.json")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"model": ATTACK, "note": ATTACK}}))
    page = Page(write_report(tmp_path).read_text())
    assert page.crossed == []
    assert page.all("script") == [{}]
    assert not page.all("img")
    assert len(page.all("style")) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert('x')</script>" in page.words
    assert "\x00" not in page.words
    markdown = (tmp_path / "report.md").read_text()
    for outside in re.split(r"^```.*?^```$", markdown, flags=re.DOTALL | re.MULTILINE):
        assert "<script" not in outside
        assert "<img" not in outside


@pytest.mark.slow
def test_no_secret_of_settings_or_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "s" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("SOME_PASSWORD", "pass-in-environment")
    trainer = {"api_token": secret, "note": f"use {secret}", "per_device_train_batch_size": 2}
    write_run(tmp_path, recipe={"distill": {"num_tokens": 4321, "trainer": trainer}})
    write_report(tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert secret not in text
        assert "hf_aaaa" not in text
        assert "pass-in-environment" not in text
        assert "num_tokens: 4321" in text
        assert "per_device_train_batch_size: 2" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ("importance.json", "No plan has been made yet"),
        ("plan.json", "Importance was not measured in this run"),
        ("distill.json", "Nothing has been evaluated yet"),
        ("eval/pruned.json", "nothing to compare it with"),
        ("eval/speed.json", "The cut model was not distilled in this run"),
    ],
)
def test_report_works_after_any_single_stage(tmp_path: Path, kept: str, said: str) -> None:
    write_run(tmp_path / "whole")
    target = tmp_path / "part" / kept
    target.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / kept, target)
    page = Page(write_report(tmp_path / "part").read_text())
    assert page.crossed == []
    assert said in page.words
    assert "Not in this report" in page.words


def test_report_refuses_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no result to report"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: is not valid JSON"):
        write_report(tmp_path)


def test_scores_of_other_settings_are_left_out_by_name(tmp_path: Path) -> None:
    write_run(tmp_path)
    other = choice("distilled", "retrieval_continuation", "retrieval", "continuation", num_fewshot=5)
    evaluation("distilled", tasks=(other,)).write(tmp_path / "eval" / "distilled.json")
    run = read_run(tmp_path)
    comparison = compare(run)
    row = next(row for row in comparison.rows if row.key[0] == "retrieval_continuation")
    assert "distilled" not in row.scores
    assert "num_fewshot is 0 in one evaluation and 5 in the other" in comparison.refused[0]
    assert "because settings differ" in told(tmp_path)


def test_an_evaluation_of_another_plan_is_pointed_out(tmp_path: Path) -> None:
    write_run(tmp_path)
    plan(DROP[:1]).write(tmp_path / "plan.json")
    assert "it belongs to another plan" in told(tmp_path)


def read(source: str, **found: int) -> dict:
    """What distill.json says of its data: one source, and how many items of which task were found in it."""
    overlap = {task: {"items": 10, "compared": 9, "found": count, "examples": []} for task, count in found.items()}
    searched = {"overlap": overlap, "tokens_searched_for_overlap": 5000} if found else {}
    return {"sources": {source: {"tokens": 1}}, **searched}


@pytest.mark.parametrize(
    ("data", "tasks", "said"),
    [
        (read("python_docs"), None, "Training and evaluation items are disjoint"),
        (read("my.jsonl"), None, "It was not checked whether training text and evaluation items overlap"),
        (read("python_docs_heldout"), None, "which is evaluation text"),
        (read("python_docs"), "mmlu", "overlap for: MMLU, option text"),
        (
            read("my.jsonl", mmlu=0, gsm8k=0),
            None,
            "No evaluation item of 2 tasks was found in the first 5,000 tokens of the training",
        ),
        (
            read("my.jsonl", mmlu=0, gsm8k=3),
            None,
            "first 5,000 tokens of the training text, by 13 words in succession: 3 of 9",
        ),
    ],
)
def test_overlap_of_training_and_evaluation_is_stated(
    tmp_path: Path, data: dict, tasks: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    replace(training(), data=data).write(tmp_path / "distill.json")
    if tasks:
        own = (choice("teacher", tasks, "knowledge", "continuation"),)
        evaluation("teacher", tasks=own).write(tmp_path / "eval" / "teacher.json")
    assert said in told(tmp_path)


def compensated(text: dict) -> PruningPlan:
    """A plan whose gap was closed after ``text``."""
    return replace(plan(), gaps=(ClosedGap(DROP[0], DROP[-1], 1.2, False, 1, 1, 1, 1),), text=text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (read("python_docs"), None),
        (read("my.jsonl"), "It was not checked whether compensation text and evaluation items overlap for: my.jsonl"),
        (read("python_docs_heldout"), "Compensation was fitted to python_docs_heldout, which is evaluation text"),
        (read("my.jsonl", mmlu=0), None),
        (read("my.jsonl", mmlu=2), "in the first 5,000 tokens of the text of prune.compensate, by 13 words in"),
        (
            {**read("my.jsonl", mmlu=0), "wording": {"a/b": {"found": 2, "places": [{"number": 0, "excerpt": "x"}]}}},
            "The wording of a/b stands in the first 5,000 tokens of the text of prune.compensate",
        ),
    ],
)
def test_overlap_of_compensation_and_evaluation_is_a_caution(tmp_path: Path, text: dict, said: str | None) -> None:
    write_run(tmp_path)
    replace(training(), data=read("python_docs")).write(tmp_path / "distill.json")
    before = told(tmp_path)
    compensated(text).write(tmp_path / "plan.json")
    after = told(tmp_path)
    assert said is None or said in after
    assert said is None or said not in before
    assert ("of compensation and evaluation" in after or "twins in compensation text" in after) == (said is not None)
    replace(compensated(text), gaps=()).write(tmp_path / "plan.json")
    assert said is None or said not in told(tmp_path), "what stayed open was not fitted to any text"


def test_a_plan_without_a_word_on_its_compensations_text_is_not_trusted(tmp_path: Path) -> None:
    write_run(tmp_path, recipe={"prune": {"drop": list(DROP), "compensate": {"data": "my.jsonl"}}})
    compensated({}).write(tmp_path / "plan.json")
    assert "compensation text and evaluation items overlap for: my.jsonl" in told(tmp_path)


def test_wording_of_twins_in_training_text_is_a_caution_with_a_place(tmp_path: Path) -> None:
    wording = {
        "retrieval/letter": {"found": 1200, "places": [{"number": 7, "excerpt": "Dear Tom, you asked"}]},
        "retrieval/arrows": {"found": 0, "places": []},
    }
    write_run(tmp_path)
    about = "scores in such a form may flatter"
    assert about not in told(tmp_path)
    data = {**read("my.jsonl", mmlu=0), "wording": wording}
    replace(training(), data=data).write(tmp_path / "distill.json")
    text = told(tmp_path)
    assert "The wording of retrieval/letter stands in the first 5,000 tokens of the training text" in text
    assert about in text
    assert "retrieval/letter: found in documents: 1,200, one with “Dear Tom, you asked”" in text
    assert "Wording of twins in the training text" in text
    wording["retrieval/letter"]["found"] = 0
    replace(training(), data=data).write(tmp_path / "distill.json")
    assert about not in told(tmp_path)


@pytest.mark.slow
def test_report_repeats_byte_for_byte(tmp_path: Path) -> None:
    write_run(tmp_path)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines", "two ⏎ lines"),
        ("<b> & [x](y)", r"&lt;b&gt; &amp; \[x\](y)"),
        ("task_name *bold* _it_", r"task_name \*bold\* \_it\_"),
        ("https://x.y", "https:&#47;/x.y"),
    ],
)
def test_markdown_escapes_what_could_be_markup(text: str, escaped: str) -> None:
    assert inline(text) == escaped


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("run `shoal eval` again", "run `shoal eval` again"),
        ("`eval/*.json` holds *it*", r"\`eval/\*.json\` holds \*it\*"),
        ("`<b>` and `a` <i>", r"\`&lt;b&gt;\` and `a` &lt;i&gt;"),
        ("a stray ` and `code`", r"a stray \` and `code`"),
    ],
)
def test_markdown_keeps_commands_as_code_and_nothing_else(text: str, escaped: str) -> None:
    assert prose(text) == escaped


def test_markdown_of_a_report_shows_no_escaped_backtick(tmp_path: Path) -> None:
    plan().write(tmp_path / "plan.json")
    markdown = told(tmp_path)
    assert "`shoal eval`" in markdown
    assert "\\`" not in markdown


def test_markdown_blocks_cannot_be_broken_out_of() -> None:
    assert block_markdown(Code("a\n````\nb", "yaml")).startswith("`````yaml")
    assert block_markdown(Paragraph("x", warning=True)) == "> **Note.** x"
    lines = block_markdown(Table("c", ("a", "b"), (("1|2", "3"),))).split("\n")
    assert lines[-1] == r"| 1\|2 | 3 |"
    assert lines[-2] == "|:--|--:|"


def test_wording_of_numbers_and_layers() -> None:
    assert layers_text((3, 13, 14, 20, 21, 22)) == "3, 13, 14, 20 to 22"
    assert [signed(value, 1) for value in (0.04, -0.04, 1.26, -1.26)] == ["0.0", "0.0", "+1.3", "−1.3"]
    assert redacted({"num_tokens": 5, "API_KEY": "x", "a": [{"password": "y"}], "url": "https://u:p@h/"}) == {
        "num_tokens": 5,
        "API_KEY": "(hidden)",
        "a": [{"password": "(hidden)"}],
        "url": "https://(hidden)@h/",
    }
    kept = {"data": "s3://bucket/part@3", "keys": "a", "mail": "me@host"}
    assert redacted({"aws_secret_access_key": "x", "api-key": "y", "git": "https://just-a-token@h/x", **kept}) == {
        "aws_secret_access_key": "(hidden)",
        "api-key": "(hidden)",
        "git": "https://(hidden)@h/x",
        **kept,
    }


def test_headline_of_a_plan_alone(tmp_path: Path) -> None:
    plan((2,)).write(tmp_path / "plan.json")
    run = read_run(tmp_path)
    assert isinstance(run, Run)
    assert headline(run, compare(run)) == (
        "1 of the 8 decoder layers of the model was cut out (layer 2, counted from 0).",
        "No ability has been evaluated yet, so nothing is said here about what was lost.",
    )


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ((), "Edited in the model: attention of layer 3 zeroed and layer 5 swapped with donor at weight 1."),
        (
            (2,),
            "1 of the 8 decoder layers of the model was cut out (layer 2, counted from 0). "
            "Edited: attention of layer 3 zeroed and layer 5 swapped with donor at weight 1.",
        ),
    ],
)
def test_edits_are_told_without_paths(tmp_path: Path, drop: tuple[int, ...], said: str) -> None:
    edits = (SkipAttention("skip_attention", (3,)), Swap("swap", (5,), f"{tmp_path}/donor"))
    plan(drop, edits).write(tmp_path / "plan.json")
    run = read_run(tmp_path)
    assert headline(run, compare(run))[0] == said
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "attention of layer 3 zeroed" in page
    assert ("Cut: layers" in page) == bool(drop)


def climbing(role: str, level: int) -> TaskScore:
    """A task of a family that gets harder, every item of which knows how its text went."""
    share = 0.9 if level == 1 else 0.5 if level == 2 else 0.02
    task = choice(role, f"track_{level}", "reasoning", "generation", chance=0.0, share=share)
    rates = {"malformed": float(role == "pruned"), "repetition": 0.0, "cut_off": 0.0, "tokens": 12.0}
    items = tuple(replace(item, rates=rates, question=f"What is {item.id}?") for item in task.items)
    return with_rates(replace(task, family="track", level=float(level), items=items))


@pytest.mark.slow
def test_every_figure_is_drawn_once_for_the_file_and_the_page_and_once_as_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    savefig = Figure.savefig

    def counted(self: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(kwargs["format"])
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", counted)
    files = sorted(file.suffix[1:] for file in (write_report(write_run(tmp_path)).parent / "figures").iterdir())
    assert sorted(drawn) == files
    assert files.count("svg") == files.count("png") > 1


def test_a_role_with_other_settings_stands_in_no_figure_of_levels(tmp_path: Path) -> None:
    """What a table refuses beside the others, a curve and its sentence may not say either."""
    levels = tuple(climbing("teacher", level) for level in (1, 2, 3))
    evaluation("teacher", levels).write(tmp_path / "eval/teacher.json")
    other = tuple(replace(climbing("pruned", level), num_fewshot=3) for level in (1, 2, 3))
    evaluation("pruned", other).write(tmp_path / "eval/pruned.json")
    text = told(tmp_path)
    assert "num\\_fewshot is 0" in text or "num_fewshot is 0" in text
    assert "clear of chance are teacher up to 2." in text


def test_a_verdict_that_many_comparisons_could_bring_about_is_not_said(tmp_path: Path) -> None:
    """Lost on 9 items and won on 1 is clear alone (p = 0.02), not among ten tasks without any change."""

    def task(number: int, lost: range) -> TaskScore:
        items = tuple(ItemScore(str(i), float(i % 4 > 0 and i not in lost), "a", "a") for i in range(200))
        made = replace(choice("teacher", f"task_{number}", f"skill {number}", "continuation"), items=items, n=200)
        return with_interval(replace(made, score=sum(item.score for item in items) / 200))

    for count, worse, said in ((1, 1, "task 0 (option text) worse"), (10, 0, "0 of 10 scores worse")):
        for role, lost in (("teacher", range(3, 4)), ("pruned", range(101, 112))):
            tasks = tuple(task(number, lost if number == 0 else range(0)) for number in range(count))
            evaluation(role, tasks).write(tmp_path / "eval" / f"{role}.json")
        text = told(tmp_path)
        assert f"Cutting made {said}" in text
        assert text.count("▼ worse") == worse


def test_a_teacher_with_few_items_is_not_said_to_be_at_chance(tmp_path: Path) -> None:
    """Two right of four against a chance of 25 % is anything between 15 % and 85 %; 25 of 100 is a guesser."""

    def task(name: str, right: int, n: int) -> TaskScore:
        items = tuple(ItemScore(str(i), float(i < right), "a", "a") for i in range(n))
        made = replace(choice("teacher", name, "knowledge", "continuation"), items=items, n=n, score=right / n)
        return with_interval(made)

    evaluation("teacher", (task("few", 2, 4), task("many", 25, 100))).write(tmp_path / "eval/teacher.json")
    text = told(tmp_path)
    at_chance, unknown = text.split("**At chance from the start.**")[1].split("**Not shown to be above chance.**")
    assert "many (option text)" in at_chance
    assert "few (option text)" not in at_chance
    assert "Neither is it on few (option text), but with so few items it may be well above it" in unknown
    assert "left out of these sentences" not in text, "with the teacher alone there are none"


def level(number: int, right: int) -> TaskScore:
    """A level of a family with the first ``right`` of 100 items right."""
    items = tuple(ItemScore(str(i), float(i < right), "7", "7") for i in range(100))
    task = replace(choice("teacher", f"track_{number}", "reasoning", "generation", chance=0.0), items=items)
    return with_interval(replace(task, score=right / 100, family="track", level=float(number)))


def test_levels_that_nobody_masters_are_told_in_a_sentence(tmp_path: Path) -> None:
    evaluation("pruned", (level(1, 2), level(2, 2))).write(tmp_path / "eval/pruned.json")
    for right, expected in ((90, "clear of chance are teacher up to 1; pruned at no level."), (2, "no model is clear")):
        evaluation("teacher", (level(1, right), level(2, 2))).write(tmp_path / "eval/teacher.json")
        assert f"levels 1 to 2: {expected}" in told(tmp_path)


def test_one_lucky_answer_is_not_clear_of_chance(tmp_path: Path) -> None:
    """A level on which the table finds no signal is not one that a model masters."""
    evaluation("teacher", (level(1, 90), level(2, 2))).write(tmp_path / "eval/teacher.json")
    text = told(tmp_path)
    assert "clear of chance are teacher up to 1." in text
    assert "No signal here" in text


@pytest.mark.slow
def test_levels_rates_and_questions_are_told(tmp_path: Path) -> None:
    for role in SKILL:
        evaluation(role, tuple(climbing(role, level) for level in (1, 2, 3))).write(tmp_path / "eval" / f"{role}.json")
    page = Page(write_report(tmp_path).read_text())
    assert "Track, generated, levels 1 to 3: clear of chance are teacher up to 2" in page.words
    assert (tmp_path / "figures/levels.png").stat().st_size > 1000
    assert "Without a readable answer 0.0 % [0.0, 3.7] 100.0 % [96.3, 100.0] 0.0 % [0.0, 3.7]" in page.words
    assert "Many texts of the pruned model cannot be read." in page.words
    told = "Held no answer that could be read, which counts as wrong: pruned 100 % on track 1 (generated) and 100 % on"
    assert told in page.words
    assert "Question What is track_1-" in page.words
    assert "question" in (tmp_path / "report.md").read_text()


def test_cautions_come_first_and_say_where_nothing_was_found(report: tuple[Page, str, Path]) -> None:
    titles = re.findall(r"^## (.*)$", report[1], flags=re.MULTILINE)
    assert titles[:2] == ["Read with care", "Before and after"]
    section = report[1].split("## Read with care")[1].split("\n## ")[0]
    told = "The intact teacher is not 3 standard errors above chance on reasoning (generated)."
    assert f"**At chance from the start.** {told}" in section
    nothing = cautions_section(*nothing_to_say())
    assert "Nothing was found" in str(nothing)


def nothing_to_say() -> tuple[Run, Comparison]:
    tasks = {
        role: tuple(choice(role, f"retrieval_{how}", "retrieval", how) for how in ("continuation", "generation"))
        for role in ("teacher", "pruned")
    }
    run = Run(Path(), None, {}, None, None, None, {role: evaluation(role, own) for role, own in tasks.items()}, None)
    return run, compare(run)


def test_machines_and_versions_that_differ_are_a_caution(tmp_path: Path) -> None:
    write_run(tmp_path)
    other = evaluation("distilled")
    environment = {**other.provenance.environment, "torch": "2.12.0"}
    replace(other, provenance=replace(other.provenance, environment=environment)).write(
        tmp_path / "eval/distilled.json"
    )
    text = told(tmp_path)
    assert (
        "The models were not scored with the same torch. torch: 2.13.0 for teacher, 2.13.0 for pruned, 2.12.0" in text
    )


def test_a_likelihood_score_that_hides_damage_is_a_caution() -> None:
    run, _ = nothing_to_say()
    said_well = choice("teacher", "retrieval_continuation", "retrieval", "continuation")
    pruned = (said_well, run.evaluations["pruned"].tasks[1])
    run = replace(run, evaluations={**run.evaluations, "pruned": evaluation("pruned", pruned)})
    said = "The pruned model keeps 100 % of retrieval (option text), but"
    assert said in str(cautions_section(run, compare(run)))


def test_costs_and_the_search_are_told_where_they_are_recorded(tmp_path: Path) -> None:
    write_run(tmp_path)
    searched().write(tmp_path / SearchResult.FILE)
    teacher = Evaluation.read(tmp_path / "eval/teacher.json")
    replace(teacher, num_requests=1092, num_kept=72).write(tmp_path / "eval/teacher.json")
    markdown = told(tmp_path)
    assert "; 72 of 1,092 answers were kept from before | – | – |" in markdown
    assert markdown.count("kept from before") == 1, "the others have asked everything themselves"
    assert "Measuring the layers" not in markdown, "how long it took is not recorded"
    assert "| Distilling | 8 s | 4,000 | 1 GB |" in markdown
    assert "| Healing 2 plans to choose from | – | 2,000 | – |" in markdown
    section = markdown.split("## What the search over plans found")[1].split("\n## ")[0]
    assert "2 plans, each healed for 1,000 tokens, best first" in section
    assert "| low | 1 | 2 | 3, 4 |" in section
    assert "The ranking before the heal did not hold" in section
    assert "drop: [3, 4]" in section


def searched() -> SearchResult:
    none = Correlation(None, None)

    def standing(value: float, rank: int, behind: float) -> Standing:
        return Standing(Interval(value, value, value), rank, None, None, Interval(behind, behind, behind))

    column = Column(
        *("perplexity", "language", "rolling", "nats_per_token", 9, 0.0, False),
        *(Interval(2, 2, 2), 1.0, "it has no chance level", none),
    )
    plans = tuple(
        HealedPlan(name, {}, drop, (), f"named {name}", 6, None) for name, drop in (("own", (1, 2)), ("low", (3, 4)))
    )
    standings = (
        PlanStanding("low", standing(3.0, 2, 0.1), standing(2.5, 1, 0.0), ()),
        PlanStanding("own", standing(2.9, 1, 0.0), standing(2.7, 2, 0.2), ()),
    )
    ranking = Ranking("nats", (column,), standings, {"overall": none}, 9, "own", "low", Interval(-0.2, -0.3, -0.1))
    return SearchResult(provenance(), 1000, plans, ranking)


# --- what a reader sees first ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, Path]:
    """The report of a run with the numbers of README's table."""
    folder = write_quickstart(tmp_path_factory.mktemp("quickstart"))
    return Page(write_report(folder).read_text()), (folder / "report.md").read_text(), folder


@pytest.mark.slow
def test_the_report_opens_with_what_was_lost_and_what_came_back_in_numbers(
    quickstart: tuple[Page, str, Path],
) -> None:
    opening = quickstart[1].split("\n## ")[0].replace("\\", "")
    for line in (
        "| retrieval, generated | 64 % [54, 73] | 22 % [15, 31] | 98 % [93, 99] | ▼ −42 points [−51, −31] | ▲ +76",
        "| retrieval, option text | 98 % [93, 99] | 66 % [56, 75] | 98 % [93, 99] | ▼ −32 points",
        "| knowledge, generated | 38 % [29, 48] | 1 % [0, 5] | 47 % [38, 57] |",
        "| reasoning, one step, option text | 48 % [38, 58] | 35 % [26, 45] | 46 % [37, 56] |",
        "| perplexity, running text, lower is better | 12.9 [11.6, 14.2] | 31.5 [28.3, 35.0] | 17.3 [15.8, 18.8] |",
        "no clear change [−5, +1]",
    ):
        assert line in opening
    assert "lettered options" not in opening, "the teacher is at chance there, so nothing was lost"
    assert quickstart[0].words.index("64 %") < quickstart[0].words.index("Read with care")


def test_a_change_is_a_number_in_the_opening_only_where_it_is_clear(tmp_path: Path) -> None:
    """Seven of ten items changed their side, five of them for the worse: with ten items that is nothing."""
    right = {"teacher": range(9), "pruned": range(3, 9)}
    for role, kept in right.items():
        items = tuple(ItemScore(str(i), float(i in kept), "a", "a") for i in range(10))
        task = replace(choice("teacher", "retrieval_generation", "retrieval", "generation", chance=0.0), items=items)
        task = with_interval(replace(task, n=10, score=len(kept) / 10))
        evaluation(role, (task,)).write(tmp_path / "eval" / f"{role}.json")
    opening = told(tmp_path).split("\n## ")[0]
    assert "no clear change" in opening
    assert "points" not in opening


def test_a_cell_of_the_page_has_its_figure_on_a_line_of_its_own() -> None:
    blocks = Table("c", ("a", "b"), (("x", "60.0 % [50.2, 69.1], kept 61 %, +1.5 (p < 0.001)"), ("y", "30 (as <b>)")))
    page = to_html(Document("t", ("h",), (Section("s", (blocks,)),)))
    first = ["[50.2, 69.1]", "kept 61 %", "+1.5 (p &lt; 0.001)"]
    assert '<td data-column="b">60.0 % ' + " ".join(f'<span class="ci">{part}</span>' for part in first) in page
    assert '>30 <span class="ci">(as &lt;b&gt;)</span></td>' in page


def test_one_way_of_asking_is_enough_where_all_keep_the_same(tmp_path: Path) -> None:
    for role in ("teacher", "pruned"):
        tasks = [choice(role, f"retrieval_{n}pairs_continuation", "retrieval", "continuation") for n in (5, 10, 20)]
        same = tuple(replace(task, items=tasks[0].items, score=tasks[0].score) for task in tasks)
        evaluation(role, same).write(tmp_path / "eval" / f"{role}.json")
    opening = told(tmp_path).split("\n## ")[0]
    assert opening.count("| retrieval, ") == 1


def test_readers_see_words_and_find_identifiers_in_the_appendix(quickstart: tuple[Page, str, Path]) -> None:
    page, markdown, folder = quickstart
    names = [task[0] for task in QUICKSTART] + ["reasoning_worked"]
    seen = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    before, appendix = seen.split("**Tasks by their names**")
    figures = "".join(file.read_text() for file in (folder / "figures").glob("*.svg"))
    for name in names:
        assert not re.search(rf"{name}(?!-\d)", before), name
        assert f"| {name} |" in appendix
        assert name not in figures
    titles = [attributes["title"] for attributes in page.all("th") if "title" in attributes]
    assert "retrieval_generation, generation, match" in titles
    assert "retrieval, generated" in page.words


def test_no_sentence_of_the_cautions_is_repeated_and_none_is_a_riddle(quickstart: tuple[Page, str, Path]) -> None:
    section = quickstart[1].split("## Read with care")[1].split("\n## ")[0]
    sentences = [one.strip() for line in section.split("\n") for one in re.split(r"(?<=\.) ", line) if len(one) > 25]
    assert len(sentences) == len(set(sentences)) > 8
    for riddle in ("1 other tasks", "texts of teacher", "cannot show any", "and 1 more"):
        assert riddle not in quickstart[1]
    page = quickstart[0].words
    lead = "What is kept depends on how the model is asked: no number alone tells what it can do."
    assert page.count(lead) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"ability_texts": {"tokens": 5}}, "Its training text has that form, with other items."),
        ({"my.jsonl": {"tokens": 5}}, "Whether its training text has that form is not known here."),
    ],
)
def test_a_distilled_model_that_beats_its_teacher_may_have_learnt_the_form(
    tmp_path: Path, sources: dict, said: str
) -> None:
    write_quickstart(tmp_path)
    replace(training(), data={"sources": sources}).write(tmp_path / "distill.json")
    text = told(tmp_path)
    assert "The distilled model beats its teacher on 3 scores: it may have learnt the form of the questions." in text
    assert f"knowledge (generated) and reasoning (worked answers). {said}" in text
    assert "what is more than the teacher has is no share of it, see “Read with care”" in text
    write_run(tmp_path / "worse")
    assert "beats its teacher" not in told(tmp_path / "worse")


def test_the_precision_is_told_where_the_run_has_it_recorded(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert "Numeric precision" not in told(tmp_path)
    story = json.loads((tmp_path / "run.json").read_text())
    why = "bfloat16 is 60 times slower on this processor."
    story["numerics"] = {"dtype": "float32", "precision": "float32", "reason": why, "device": "some CPU"}
    (tmp_path / "run.json").write_text(json.dumps(story))
    settings = told(tmp_path).split("## Exact settings and versions")[1]
    line = "models are measured and evaluated in float32 and training computes in float32, on some CPU: bfloat16 is 60"
    assert f"Numeric precision: {line} times slower on this processor.\n" in settings
    story["numerics"] |= {"precision": "auto", "size": 0.5, "size_reason": "half of the tokens, as this is slow"}
    (tmp_path / "run.json").write_text(json.dumps(story))
    text = told(tmp_path)
    assert "training computes as DeepSpeed is configured, on some CPU" in text
    assert "on this processor. Sizes: half of the tokens, as this is slow.\n" in text


def test_roles_that_were_scored_in_different_precision_are_a_caution(tmp_path: Path) -> None:
    write_run(tmp_path)
    for role, dtype in (("teacher", "bfloat16"), ("pruned", "float32"), ("distilled", "float32")):
        made = replace(provenance(), inputs={"model": "abc", "dtype": dtype})
        replace(evaluation(role), provenance=made).write(tmp_path / "eval" / f"{role}.json")
    assert "not scored with the same dtype. dtype: bfloat16 for teacher, float32 for pruned" in told(tmp_path)


def test_what_moved_in_depth_is_told_and_another_cuts_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    kept = {"teacher": tuple(range(NUM_LAYERS)), "distilled": plan().keep}

    def use(of: tuple[int, ...], at: float) -> RoleUse:
        left = tuple(Estimate(1 - 0.01 * layer, 0.9 - 0.01 * layer, 1.0) for layer in of)
        return RoleUse(Estimate(0.8, 0.7, 0.9), left, Estimate(at, at - 0.05, at + 0.05), 3)

    layers = kept["distilled"]
    changes = tuple(Estimate(0.3, 0.2, 0.4) if layer == layers[1] else Estimate(0, -0.1, 0.1) for layer in layers)
    moved = Moved("teacher", "distilled", layers, changes, Estimate(0.123, 0.05, 0.2), 0.75)
    roles = {"teacher": use(kept["teacher"], 0.4), "distilled": use(layers, 0.52)}
    task = TaskUse("retrieval_continuation", "retrieval", "continuation", "acc", True, 80, roles, (moved,))
    rules = {"cosine": EffectiveDepth(1, 0.5), "kl": EffectiveDepth(None, None, "no layer is nearer")}
    inputs = {
        role: json.loads((folder / f"eval/{role}.json").read_text())["provenance"]["inputs"]["model"] for role in kept
    }
    found = DepthUse(Provenance(inputs), NUM_LAYERS, kept, (task,), {"distilled": rules})
    found.write(folder / DepthUse.FILE)
    write_report(folder)
    text = (folder / "report.md").read_text()
    section = text.partition("## How depth is used")[2].partition("\n## ")[0].replace("\\", "")
    assert "0.40 [0.35, 0.45]" in section
    assert "+0.12 [+0.05, +0.20]" in section
    assert f"1 of {len(layers)} ({layers[1]})" in section
    assert "+0.75" in section
    assert f"distilled: layer {layers[1]} (50 %) by cosine, no layer is nearer by kl" in section
    assert (folder / "figures/depth_use.svg").is_file()
    replace(found, provenance=Provenance({**inputs, "distilled": "another"})).write(folder / DepthUse.FILE)
    with pytest.raises(UserError, match=r"depth_use\.json: distilled is 'another'.*Run `shoal depth` again"):
        write_report(folder)
