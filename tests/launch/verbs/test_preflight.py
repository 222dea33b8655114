"""What is refused within seconds: metrics that nothing measures, before hours are spent on others.

Covers: shoal.compress.sweeps.placeholder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cases import cases

from shoal.errors import UserError
from shoal.launch.verbs import prune as pruning
from shoal.launch.verbs.distill import check_distill
from shoal.launch.verbs.dry_run import dry_run
from shoal.launch.verbs.pipeline import preflight
from shoal.launch.verbs.run import open_run
from shoal.recipe.recipe import parse_recipe

CASES = cases(__file__)


@pytest.mark.parametrize(("prune", "measure", "message"), CASES)
def test_a_metric_that_nothing_measures_is_refused_before_anything_is_measured(
    teacher: Path,
    prune: dict[str, Any],
    measure: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = {"model": str(teacher), "run_dir": str(tmp_path / "run"), "measure": measure}
    run = open_run(parse_recipe({**raw, "prune": {"num_drop": 1, **prune}}))
    monkeypatch.setattr(pruning, "measure", lambda _: pytest.fail("measured"))
    for stage in (preflight, pruning.prune, partial(dry_run, "prune")):
        with pytest.raises(UserError, match=message):
            stage(run)


LONG = """
task: long_texts
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
output_type: generate_until
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 5000, until: ["."]}}
metric_list: [{{metric: exact_match}}]
"""


def test_tasks_that_cannot_run_are_refused_before_anything_is_trained(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored after hours of healing, or watched while it goes on, they would end the run then."""
    (tmp_path / "rows.jsonl").write_text('{"question": "When?", "answer": "Now"}\n' * 3)
    (tmp_path / "long.yaml").write_text(LONG.format(rows=tmp_path / "rows.jsonl"))
    raw = {"model": str(teacher), "run_dir": str(tmp_path / "run"), "prune": {"drop": [2]}}
    own = {"tasks": ["long_texts"], "include_path": str(tmp_path)}
    distill = {"sequence_length": 64, "data": ["python_docs"]}
    with pytest.raises(UserError, match=r"asks for 5000 new tokens .* remove this task from eval.tasks"):
        preflight(open_run(parse_recipe({**raw, "distill": distill, "eval": own})))
    watched = {**distill, "watch": {"tasks": ["long_texts"]}}
    with pytest.raises(UserError, match=r"asks for 5000 new tokens .* remove this task from distill.watch.tasks"):
        check_distill(
            open_run(parse_recipe({**raw, "distill": watched, "eval": {**own, "tasks": ["knowledge_continuation"]}}))
        )
    monkeypatch.setattr("shoal.ranks.allowed_cores", lambda: 8)
    few = {**distill, "watch": {"tasks": ["knowledge_continuation"], "limit": 4}}
    with pytest.raises(UserError, match=r"distill.watch.limit: 'knowledge_continuation' has 4 item\(s\) for 8 ranks"):
        check_distill(open_run(parse_recipe({**raw, "num_processes": 8, "distill": few})))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(3, r"^distill\.batch_size: 4 rows cannot be divided over 3 ranks .*or another number of ranks")],
)
def test_ranks_that_cannot_train_are_refused_before_any_starts(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, message: str
) -> None:
    monkeypatch.setattr("shoal.ranks.allowed_cores", lambda: 8)
    distill = {"sequence_length": 64, "data": ["python_docs"], "batch_size": 4}
    raw = {"model": str(teacher), "run_dir": str(tmp_path / "run"), "prune": {"drop": [2]}, "distill": distill}
    run = open_run(parse_recipe({**raw, "num_processes": ranks}))
    for check in (check_distill, preflight, partial(dry_run, "distill")):
        with pytest.raises(UserError, match=message):
            check(run)
