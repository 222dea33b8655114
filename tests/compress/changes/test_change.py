"""Every change that a recipe can ask for: four methods, students that are proven, pairs refused by one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_model
from tiny import VOCAB_SIZE, tiny_tokenizer
from transformers import AutoModelForCausalLM

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.compress.apply import apply_plan, changes_of
from shoal.errors import UserError
from shoal.launch.verbs.dry_run import cut_estimate
from shoal.models.checkpoint_files import CLOSED_GAPS
from shoal.recipe.prune import APART, Prune
from shoal.recipe.recipe import parse_recipe

TEXT = {"data": "python_docs", "num_tokens": 2048, "sequence_length": 32}
ASKED: dict[str, dict[str, Any]] = {
    "width": {"intermediate_size": 32, **TEXT},
    "compensate": {"method": "scale", **TEXT},
}
"""Every change of the table, as a recipe asks for it."""


def asked(**sections: Any) -> Prune:
    return parse_recipe({"model": "m", "prune": {"drop": [2, 4], **sections}}).prune


def test_every_change_of_the_table_is_tried_here() -> None:
    found = [
        change.SECTION.removeprefix("prune.") for key in ASKED for change in changes_of(asked(**{key: ASKED[key]}))
    ]
    assert found == list(ASKED)


@pytest.mark.sample(3)
@pytest.mark.parametrize("key", ASKED)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_student_is_proven_and_its_plan_and_dry_run_tell_of_it(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.compress.changes.fit.FACTORS", (1e-3, 1e3))
    folder, out = tmp_path / name, tmp_path / "student"
    model: Any = tiny_model(name, vocab_size=VOCAB_SIZE)
    model.save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    changes, plan = changes_of(asked(**{key: ASKED[key]})), Plan(Provenance({}), 6, (2, 4), "test")
    told, _ = cut_estimate(folder, plan, out, changes=changes)
    assert all(change.words(model, plan) in told for change in changes)
    applied = apply_plan(folder, plan, out, changes=changes)
    assert applied.changes or not any(gap.is_closed for gap in applied.gaps)
    student = AutoModelForCausalLM.from_pretrained(out)
    assert (CLOSED_GAPS in student.config.to_dict()) == any(gap.is_closed for gap in applied.gaps)


@pytest.mark.parametrize("pair", APART, ids=str)
def test_a_pair_of_the_table_is_refused_with_its_reason(pair: tuple[str, str]) -> None:
    sections = {key: ASKED.get(key, {"params": 1e6}) for key in pair}
    with pytest.raises(UserError, match=f"prune.{pair[0]}: .*{APART[pair][:20]}.*; leave prune.{pair[1]} out"):
        asked(**sections, **({"drop": None} if "target" in pair else {}))
