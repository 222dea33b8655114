"""Drawn texts: pass@k against its definition over all subsets, and demoted answers told from gone ones."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from shoal.artifacts.artifact import Provenance
from shoal.errors import UserError
from shoal.lab.samples import DrawnItem, DrawnTask, Samples, Settings, pass_at, work
from shoal.launch.verbs.run import open_run
from shoal.recipe.recipe import parse_recipe


@pytest.mark.parametrize("n", [1, 4, 7])
def test_the_estimate_is_the_share_of_all_subsets_that_hold_a_right_text(n: int) -> None:
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        texts = [index < right for index in range(n)]
        subsets = list(itertools.combinations(texts, k))
        assert pass_at(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_a_lost_answer_is_demoted_if_a_drawn_text_has_it() -> None:
    teacher = DrawnTask("teacher", "t", 0.0, tuple(DrawnItem(name, name != "d", 2) for name in "abcd"))
    num_right = {"a": 2, "b": 1, "c": 0, "d": 1}
    items = tuple(DrawnItem(name, name == "a", right) for name, right in num_right.items())
    pruned = DrawnTask("pruned", "t", 0.0, items)
    lines = Samples(Provenance({}), 2, (1, 2), (teacher, pruned)).in_words().splitlines()
    lost = next(line for line in lines[4:] if "pruned" in line)
    assert lost.split()[:4] == ["t", "pruned", "2", "1,"], lost
    assert next(line for line in lines if "pruned" in line).split()[3:6] == ["25.0", "%", "[4.6,"]


@pytest.mark.prove
def test_texts_of_every_model_of_a_run_are_drawn_and_judged(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, "llama", max_position_embeddings=4096)
    evaluated = {"tasks": ["knowledge_generation", "knowledge_continuation"], "limit": 3, "perplexity_tokens": 20}
    run = open_run(parse_recipe({"model": str(model), "run_dir": str(tmp_path / "run"), "eval": evaluated}))
    with pytest.raises(UserError, match="k: 8 texts cannot be taken out of n, 2"):
        work(run, Settings(n=2))
    text = work(run, Settings(n=2, k=(1, 2)))
    (drawn,) = Samples.read(run.dir / "lab/samples.json").tasks
    assert (drawn.task, drawn.role, len(drawn.items)) == ("knowledge_generation", "teacher", 3)
    assert work(run, Settings(n=2, k=(1, 2))) == text
