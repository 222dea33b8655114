"""Results of another run, and roles that read other tokens, are refused with file, field, both values and a remedy.

Covers: shoal.eval.report.run.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import results
from cases import cases
from tiny import tiny_tokenizer
from tokenizers import normalizers

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.artifacts.evaluation import TaskScore
from shoal.errors import UserError
from shoal.eval.compare.comparable import require_same_tokenizer
from shoal.eval.harness.rates import LENGTH, RATES
from shoal.eval.report.cautions import cautions
from shoal.eval.report.findings import Comparison, compare, protocol_gaps, writing
from shoal.eval.report.run import Run, read_run
from shoal.eval.report.tables import gap_table
from shoal.stats.paired import mcnemar

CASES = cases(__file__)


def write(folder: Path, file: str, artifact: Artifact, **inputs: Any) -> None:
    dataclasses.replace(artifact, provenance=Provenance(inputs, {}, "")).save(folder / file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose files say what they were made from, as the stages write them."""
    write(tmp_path, "plan.json", results.plan(), model="T")
    write(tmp_path, "importance.json", results.importance(), model="T")
    write(tmp_path, "distill.json", results.training(), model="T", student="S", **{"prune.drop": list(results.DROP)})
    for role, model in (("teacher", "T"), ("pruned", "S"), ("distilled", "D")):
        write(tmp_path, f"eval/{role}.json", results.evaluation(role), model=model)
    write(tmp_path, "eval/speed.json", results.speed(), teacher="T", pruned="S", distilled="D")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    CASES,
    ids=lambda value: value if isinstance(value, str) and value.endswith("json") else "",
)
def test_results_of_another_run_are_refused(folder: Path, file: str, changes: dict[str, Any], message: str) -> None:
    assert set(read_run(folder).evaluations) == {"teacher", "pruned", "distilled"}
    body = json.loads((folder / file).read_text())
    body["internal"]["inputs"] |= changes
    (folder / file).write_text(json.dumps(body))
    with pytest.raises(UserError, match=message):
        read_run(folder)


def test_an_evaluation_under_another_roles_name_is_refused(folder: Path) -> None:
    (folder / "eval/distilled.json").unlink()
    for ending in ("json", "items.jsonl"):
        (folder / f"eval/pruned.{ending}").rename(folder / f"eval/distilled.{ending}")
    with pytest.raises(
        UserError, match=r"distilled.json: role is 'pruned', but the file's name is 'distilled'; rename"
    ):
        read_run(folder)


# --- written text and protocols -----------------------------------------------------------------------------------


def compared(**tasks: tuple[TaskScore, ...]) -> Comparison:
    evaluations = {role: results.evaluation(role, scores) for role, scores in tasks.items()}
    return compare(Run(Path(), None, None, None, None, evaluations, None))


def test_rates_of_written_text_are_paired_between_roles_and_corrected_over_tasks() -> None:
    fine, broken, worse = ["Rome"] * 40, ["..."] * 6 + ["Rome"] * 34, ["..."] * 12 + ["Rome"] * 28
    comparison = compared(
        teacher=(results.capitals(fine, "one"), results.capitals(fine, "two"), results.nats("teacher")),
        pruned=(results.capitals(broken, "one"), results.capitals(worse, "two"), results.nats("pruned")),
    )
    found = writing(comparison.rows)
    names = (*(name for name in RATES if name != "refused"), LENGTH)  # nothing harmful was asked
    assert [(one.row.key[0], one.name) for one in found] == [(task, name) for task in ("one", "two") for name in names]
    pair = ("teacher", "pruned")
    first, second = (one for one in found if one.name == "malformed")
    assert first.rates["teacher"].value == 0.0
    assert second.rates["pruned"].value == 0.3
    assert first.rates["pruned"].ci_low < 0.15 < first.rates["pruned"].ci_high
    assert second.differences[pair].ci_low > 0
    assert (first.differences[pair].won, first.differences[pair].lost) == (0, 6)
    assert [one.adjusted_p[pair] for one in (first, second)] == [mcnemar(0, 6), 2 * mcnemar(0, 12)]


def test_a_protocol_gap_has_an_interval_that_holds_it() -> None:
    comparison = compared(
        **{
            role: (
                results.choice(role, "capitals", "knowledge", "continuation", n=200),
                results.choice(role, "capitals", "knowledge", "generation", n=200, chance=0.0, share=0.8),
            )
            for role in ("teacher", "pruned")
        }
    )
    ((*_, gap),) = protocol_gaps(comparison.rows, "pruned")
    value, low, high = gap
    assert low < value < high


def test_protocols_above_the_teacher_are_numbers_and_no_disagreement() -> None:
    def scores(likely: float, written: float) -> tuple[TaskScore, ...]:
        return tuple(
            results.choice("teacher", "capitals", "knowledge", protocol, n=200, share=share)
            for protocol, share in (("continuation", likely), ("generation", written))
        )

    comparison = compared(teacher=scores(0.6, 0.5), pruned=scores(0.65, 0.9))
    ((_, _, _, written, gap, _),) = gap_table(comparison.rows).rows
    assert float(written.split()[0]) > 150
    assert gap.startswith("−")
    run = Run(Path(), None, None, None, None, {}, None)
    assert "Protocols disagree" not in [caution.about for caution in cautions(run, comparison)]


# --- tokenizers ---------------------------------------------------------------------------------------------------


def saved(folder: Path, change: Any = lambda tokenizer: None) -> Path:
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tokenizer: tokenizer.add_tokens(["Rome"]),
            r"/p: the tokenizer of pruned has another vocabulary than that of teacher \(.*/t\).*Copy",
        ),
        (lambda tokenizer: setattr(tokenizer, "eos_token", "<pad>"), "has another eos_token than that of teacher"),
        (lower_case, "has another way of splitting text than that of teacher"),
    ],
)
def test_a_tokenizer_that_differs_between_roles_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    folders = {"teacher": saved(tmp_path / "t"), "pruned": saved(tmp_path / "p", change)}
    with pytest.raises(UserError, match=message):
        require_same_tokenizer(folders)


def test_a_control_of_another_training_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A recipe that no longer asks for one trains the model again, and would end with an error after hours."""
    told = {"model": "T", "data": "text", "distill.num_tokens": 5}
    write(folder, "distill.json", results.training(), student="S", **told)
    write(folder, "eval/control.json", dataclasses.replace(results.evaluation("teacher"), role="control"), model="C")
    write(folder, "control/distill.json", results.training(), **told | {"control.norm": True})
    assert "control" in read_run(folder).evaluations
    write(folder, "control/distill.json", results.training(), **told | {"data": "other text"})
    assert "control" not in read_run(folder).evaluations
    assert "differs from the distilled model's: data is 'text' in this recipe but 'other text' there" in caplog.text
