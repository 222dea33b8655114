"""The report's section on speed and size shows everything that was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import results
from told_report import told

from shoal.artifacts.evaluation import BatchSpeed
from shoal.eval.report.costs import SpeedRatio, size_table, speed_ratio, speed_table
from shoal.eval.report.run import read_run


def test_sizes_are_those_of_evaluation_and_cache(tmp_path: Path) -> None:
    size = size_table(read_run(results.write_run(tmp_path)))
    assert size.columns[2:6] == ("Parameters", "Of the teacher", "Weights on disk", "Cache per token")
    teacher, pruned, _ = size.rows
    assert teacher[1:6] == ("8", "8.0 million", "100.0 %", "32 MB", "8.19 kB")
    as_expected = ("5.0 million", "62.5 %", "20 MB", "5.12 kB")
    assert pruned[2:6] == as_expected


def test_every_batch_size_is_shown_with_time_and_memory(tmp_path: Path) -> None:
    run = read_run(results.write_run(tmp_path))
    assert run.speed is not None
    speed = speed_table(run.speed)
    assert [row[:2] for row in speed.rows[:4]] == [("teacher", "1"), ("teacher", "4"), ("pruned", "1"), ("pruned", "4")]
    assert speed.rows[0][2:] == ("1,000.0 [990.0, 1,000.0]", "–", "128 ms", "20.0 [19.0, 21.0]", "–", "33.6 MB")
    assert speed.rows[3][2:] == (
        "6,000.0 [5,940.0, 6,000.0]",
        "1.50 × [1.50, 1.50]",
        "85.3 ms",
        "60.0 [57.0, 63.0]",
        "1.50 × [1.50, 1.50]",
        "21 MB",
    )
    text = told(tmp_path)
    assert "Machine: device cpu, cpu threads 1." in text
    assert "\n- Batch size 16 is skipped" in text


def test_a_ratio_has_the_range_of_the_rounds_in_which_both_took_a_turn(tmp_path: Path) -> None:
    teacher = BatchSpeed(1, 100.0, 10.0, 0.1, None, {"prefill": (90.0, 100.0, 120.0), "decode": (10.0, 8.0)})
    small = BatchSpeed(1, 150.0, 16.0, 0.1, None, {"prefill": (150.0, 130.0, 180.0), "decode": (16.0, 16.0)})
    assert speed_ratio(small, teacher, "prefill") == SpeedRatio(1.5, (1.3, 150 / 90))
    assert speed_ratio(small, teacher, "decode").in_words() == "1.60 × [1.60, 2.00]"
    assert speed_ratio(replace(small, samples={}), teacher, "decode").in_words() == "1.60 ×"
    assert speed_ratio(replace(small, samples={"decode": (16.0,)}), teacher, "decode").limits is None
    run = read_run(results.write_run(tmp_path))
    assert run.speed is not None
    noisy = replace(run.speed.roles["pruned"].batches[0], samples={"prefill": (), "decode": (19.0, 42.0)})
    roles = run.speed.roles | {"pruned": replace(run.speed.roles["pruned"], batches=(noisy,))}
    table = speed_table(replace(run.speed, roles=roles))
    row = next(row for row in table.rows if row[0] == "pruned")
    assert (row[3], row[6]) == ("1.50 ×", "1.50 × [1.00, 2.00]")


def test_a_run_without_speed_or_without_evaluations_shows_what_it_has(tmp_path: Path) -> None:
    run = read_run(results.write_run(tmp_path))
    assert size_table(replace(run, speed=None)).rows[0][5] == "–"
    sizes = size_table(replace(run, evaluations={}))
    assert sizes.rows[1][1:] == ("5", *size_table(run).rows[1][2:6], "–")
    (tmp_path / "eval/speed.json").unlink()
    assert "Speed was not measured" in told(tmp_path)
