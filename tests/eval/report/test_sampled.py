"""What the report says of drawn texts: pass@k beside greedy and guessing, and which lost answers are demoted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from results import choice, evaluation

from shoal.artifacts.evaluation import TaskScore
from shoal.eval.harness.samples import with_interval
from shoal.eval.report.document import Paragraph, Section, Table, to_markdown
from shoal.eval.report.findings import compare, read_run
from shoal.eval.report.report import build_document
from shoal.eval.report.sampled import sampled_section
from shoal.recipe.evaluate import Samples
from shoal.stats.pass_at import with_samples

NAME = "knowledge_generation"
SAMPLES = Samples()


def score(role: str, right: list[int], num_right: list[int], samples: Samples, chance: float) -> TaskScore:
    """Items whose greedy text is right or wrong, and of each the number of right ones among the drawn."""
    made = choice(role, NAME, "knowledge", "generation", chance=chance, n=len(right))
    items = tuple(replace(item, score=float(value)) for item, value in zip(made.items, right, strict=True))
    greedy = with_interval(replace(made, items=items, score=sum(right) / len(right)))
    return with_samples(greedy, samples, num_right)


def section(folder: Path, *, of_distilled: Samples = SAMPLES, chance: float = 0.0) -> Section | None:
    """Twenty items. The cut loses ten of sixteen, four of them demoted; distilling loses two, both gone."""
    teacher = [1] * 16 + [0] * 4
    pruned = [1] * 6 + [0] * 14
    distilled = [1] * 14 + [0] * 6
    scores = {
        "teacher": score("teacher", teacher, [8] * 16 + [0] * 4, SAMPLES, chance),
        "pruned": score("pruned", pruned, [8] * 6 + [1] * 4 + [0] * 6 + [2] * 4, SAMPLES, chance),
        "distilled": score("distilled", distilled, [4] * 14 + [0] * 6, of_distilled, chance),
    }
    for role, own in scores.items():
        evaluation(role, (own,)).write(folder / "eval" / f"{role}.json")
    return sampled_section(compare(read_run(folder)))


def tables(found: Section | None) -> list[Table]:
    assert found is not None
    return [block for block in found.blocks if isinstance(block, Table)]


def test_pass_at_k_stands_beside_greedy_for_every_role(tmp_path: Path) -> None:
    passed, _ = tables(section(tmp_path, chance=0.25))
    assert passed.columns == ("Model", "Greedy", "pass@1", "pass@4", "pass@8")
    assert passed.groups == (("knowledge, generated, 20 items", 4),)
    assert [row[0] for row in passed.rows] == ["Teacher", "Pruned", "Distilled", "By guessing"]
    starts = {row[0]: [cell.split(" [")[0] for cell in row[1:]] for row in passed.rows}
    assert starts["Teacher"] == ["80.0 %"] * 4
    # 6 items always, 4 once and 4 twice of 8: (48 + 4 + 8) / 160
    assert (starts["Pruned"][0], starts["Pruned"][1], starts["Pruned"][3]) == ("30.0 %", "37.5 %", "70.0 %")
    assert starts["By guessing"] == ["25.0 %", "25.0 %", "68.4 %", "90.0 %"]


def test_of_the_teachers_right_answers_those_are_counted_that_are_demoted_or_gone(tmp_path: Path) -> None:
    _, lost = tables(section(tmp_path, chance=0.25))
    assert lost.columns == ("Model", "Lost", "Demoted", "Gone", "By guessing")
    assert lost.groups == (("knowledge, generated, 16 right by the teacher", 2),)
    assert lost.rows == (
        ("Pruned", "10", "4, 40 % [17, 69]", "6, 60 % [31, 83]", "90 %"),
        ("Distilled", "2", "0, 0 % [0, 66]", "2, 100 % [34, 100]", "90 %"),
    )


def test_guessing_has_no_line_where_nothing_can_be_guessed(tmp_path: Path) -> None:
    passed, lost = tables(section(tmp_path))
    assert [row[0] for row in passed.rows] == ["Teacher", "Pruned", "Distilled"]
    assert [row[-1] for row in lost.rows] == ["0 %", "0 %"]


def test_texts_that_were_drawn_with_other_settings_are_left_out_and_named(tmp_path: Path) -> None:
    found = section(tmp_path, of_distilled=Samples(temperature=1.0))
    passed, lost = tables(found)
    assert [row[0] for row in passed.rows] == ["Teacher", "Pruned"]
    assert [row[0] for row in lost.rows] == ["Pruned"]
    assert found is not None
    warnings = [block.text for block in found.blocks if isinstance(block, Paragraph) and block.warning]
    assert warnings == ["Left out are distilled, whose texts were drawn with other settings."]


def test_the_section_stands_in_the_report_where_texts_were_drawn_and_else_nowhere(tmp_path: Path) -> None:
    assert section(tmp_path / "drawn") is not None
    run = read_run(tmp_path / "drawn")
    assert "## Demoted or gone" in to_markdown(build_document(run, compare(run), {}))
    evaluation("teacher").write(tmp_path / "plain/eval/teacher.json")
    plain = read_run(tmp_path / "plain")
    assert sampled_section(compare(plain)) is None
    assert "## Demoted or gone" not in to_markdown(build_document(plain, compare(plain), {}))
