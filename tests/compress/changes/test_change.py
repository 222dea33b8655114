"""Every change that a recipe can ask for, alone and one after the other: four methods, students that are proven."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_model
from calibrations import text_of
from tiny import VOCAB_SIZE, tiny_tokenizer
from transformers import AutoModelForCausalLM

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.compress.apply import KINDS, apply_plan, changes_of, num_tokens_of
from shoal.compress.estimate import cut_estimate
from shoal.models.checkpoint_files import CLOSED_GAPS
from shoal.recipe.measure import Measure
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import TextSource

TEXT = Measure(data=(TextSource("docstrings"),), num_tokens=2048, sequence_length=32)
WIDTH: dict[str, Any] = {"kind": "width", "intermediate_size": 32}
SCALE: dict[str, Any] = {"kind": "compensate", "method": "scale"}
ASKED: tuple[Any, ...] = ([WIDTH], [SCALE], [WIDTH, SCALE], [WIDTH, "compensate"])
"""Changes as a recipe asks for them."""


def test_every_kind_is_tried_here() -> None:
    assert {settings.__dataclass_fields__["kind"].default for settings in KINDS} == {WIDTH["kind"], SCALE["kind"]}


@pytest.mark.parametrize(
    ("asked", "read", "decided"),
    [
        *(("compensate", 20, 224), ("compensate", 2048, 2048), ("compensate", 10**6, 65_536)),
        *((SCALE, 20, 64), (SCALE, 10**6, 8192), (WIDTH, 20, 32), ([WIDTH, SCALE], 10**6, 65_536)),
    ],
)
def test_text_is_what_is_measured_on_or_what_a_change_needs_or_gains_by(asked: Any, read: int, decided: int) -> None:
    changes = changes_of(parse_recipe({"model": "m", "prune": {"drop": [2, 4], "changes": asked}}).prune)
    found = num_tokens_of(
        changes, tiny_model("llama"), Plan(Provenance({}), 6, (2, 4), ""), replace(TEXT, num_tokens=read)
    )
    assert found == decided  # four for each of 48 features are fitted to, in 6 of 7 rows


@pytest.mark.sample(3)
@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_student_is_proven_and_its_plan_and_dry_run_tell_of_it(
    name: str, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "gemma3_text" and "compensate" in asked:
        pytest.skip("a norm behind the MLP cannot hold a correction")
    monkeypatch.setattr("shoal.compress.changes.fit.FACTORS", (1e-3, 1e3))
    folder, out = tmp_path / name, tmp_path / "student"
    model: Any = tiny_model(name, vocab_size=VOCAB_SIZE)
    model.save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    changes = changes_of(parse_recipe({"model": "m", "prune": {"drop": [2, 4], "changes": asked}}).prune)
    plan = Plan(Provenance({}), 6, (2, 4), "test")
    num_tokens = num_tokens_of(changes, model, plan, TEXT)
    told, _ = cut_estimate(folder, plan, out, changes=changes, text=TEXT)
    assert all(change.words(model, plan, num_tokens) in told for change in changes)
    applied = apply_plan(folder, plan, out, changes=changes, text=text_of(TEXT, num_tokens))
    has_closed = any(gap.is_closed for gap in applied.gaps)
    assert [change.kind for change in applied.changes] == [
        *(["width"] if WIDTH in asked else []),
        *(["compensate"] if has_closed else []),
    ]
    student = AutoModelForCausalLM.from_pretrained(out)
    assert (CLOSED_GAPS in student.config.to_dict()) == has_closed
