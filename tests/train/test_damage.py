"""Shares by damage, and what a pilot makes of them, each against its definition in float64.

Covers: shoal.artifacts.shares.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_rows import packed
from tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

from shoal.artifacts.shares import Pilot, PilotPoint, Shares
from shoal.data.packing import IGNORED, PackedRows
from shoal.errors import UserError
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import Distill, Record
from shoal.recipe.recipe import parse_recipe
from shoal.train import damage
from shoal.train.damage import FLOOR, by_damage, nats_by_source, shares_of, split_by_ability
from shoal.train.distill import distill_inputs
from shoal.train.pilot import Beginning, known_pilot, slope

LENGTH = 32


# --- shares


def test_shares_are_a_tenth_by_weight_and_the_rest_by_weight_times_damage() -> None:
    # weight times damage is 1, 0 and 1.5 of 2.5
    shares = shares_of((2.0, 1.0, 1.0), (0.5, 0.0, 1.5))
    assert shares == pytest.approx((0.1 * 0.5 + 0.9 * 0.4, 0.1 * 0.25, 0.1 * 0.25 + 0.9 * 0.6), abs=1e-15)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-15)


def test_a_source_that_the_cut_did_not_hurt_keeps_a_tenth_of_its_share() -> None:
    assert shares_of((3.0, 1.0), (0.0, 0.2))[0] == pytest.approx(FLOOR * 0.75, abs=1e-15)


def test_sources_of_which_none_is_hurt_share_by_weight() -> None:
    assert shares_of((3.0, 1.0), (0.0, 0.0)) == [0.75, 0.25]


def test_a_source_that_mixes_abilities_is_split_and_keeps_its_weight() -> None:
    recipe = parse(data=["python_docs", {"path": "ability_texts", "weight": 6, "losses": ["forward_kl"]}])
    parts = split_by_ability(recipe.distill).data
    assert [part.path for part in parts] == [
        "python_docs",
        *(f"ability_texts_{ability}" for ability in ("retrieval", "knowledge", "reasoning")),
    ]
    assert [part.weight for part in parts] == [1, 2, 2, 2]
    assert [part.losses for part in parts] == [None, *[("forward_kl",)] * 3]


# --- nats


def reference_nats(model: Any, rows: PackedRows) -> float:
    """Mean over learnt tokens of -log p in float64, every document read alone."""
    losses = []
    for row in range(len(rows)):
        item = rows[row]
        starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), len(item["input_ids"])]
        for start, end in itertools.pairwise(starts):
            ids, labels = item["input_ids"][start:end], item["labels"][start:end]
            with torch.no_grad():
                log_probs = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
            losses += [-float(log_probs[n - 1, ids[n]]) for n in range(1, len(ids)) if labels[n] != IGNORED]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_nats_are_means_over_learnt_tokens_of_documents_apart(kind: str) -> None:
    plain = packed([[20], [7, 13], [1, 9, 10]])
    learnt = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    marked = PackedRows(plain.input_ids_NS, plain.position_ids_NS, {}, learnt)
    model = tiny_model(kind, seed=3)
    found = nats_by_source(model, [plain, marked], label="test")
    exact = tiny_model(kind, seed=3).double()
    assert found == pytest.approx([reference_nats(exact, rows) for rows in (plain, marked)], abs=1e-6)
    assert found[0] != pytest.approx(found[1], abs=1e-3), "what marking is about"


def test_nats_of_a_model_that_drops_at_random_are_those_without_and_it_goes_on_training() -> None:
    rows = packed([[20], [7, 13]])
    model, quiet = (tiny_model("llama", seed=3, attention_dropout=share) for share in (0.5, 0.0))
    state = torch.get_rng_state()
    assert nats_by_source(model.train(), [rows], label="test") == nats_by_source(quiet, [rows], label="test")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_nats_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    head: Any = model.get_output_embeddings()
    head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"pruned: nats per token are .* set dtype: float32"):
        nats_by_source(model, [packed([[20]])], label="pruned")


# --- in a run directory


def parse(**distill: Any) -> Any:
    settings = {"sequence_length": LENGTH, "num_tokens": 64 * LENGTH, "data_policy": "by_damage", **distill}
    return parse_recipe({"model": "m", "run_dir": "r", "dtype": "float32", "distill": settings})


class Cut:
    """Teacher and cut student on the disk, and what asks for their shares."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load = LoadSettings(dtype="float32")
        self.folder = folder
        # the student is hurt by another seed: its numbers are all that matters here
        self.teacher, self.student = (
            Checkpoint.read(tiny_checkpoint(folder / name, "llama", seed=seed), load)
            for name, seed in (("teacher", 0), ("student", 1))
        )
        self.loaded: list[Path] = []
        model = Checkpoint.model

        def counted(checkpoint: Checkpoint, **settings: Any) -> Any:
            self.loaded.append(checkpoint.folder)
            return model(checkpoint, **settings)

        monkeypatch.setattr(Checkpoint, "model", counted)

    def settings(self, student: Checkpoint | None, drop: tuple[int, ...] = (1,), **distill: Any) -> Distill:
        recipe = parse(**{"data": [{"path": "python_docs", "weight": 3}, "readmes"], **distill})
        inputs = distill_inputs(
            recipe.distill,
            Record(),
            teacher="t",
            trained={"prune.drop": list(drop), "student": "s"},
            general={"seed": 0, "dtype": "float32", "attention": "sdpa"},
        )
        where = {"file": self.folder / Shares.FILE, "folder": self.folder / "text", "inputs": inputs}
        return by_damage(recipe.distill, self.teacher, student, tiny_tokenizer(), (), **where)


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cut:
    return Cut(tmp_path, monkeypatch)


def test_shares_follow_from_what_was_measured_and_stand_in_the_artifact(cut: Cut) -> None:
    settings = cut.settings(cut.student)
    found = Shares.read(cut.folder / Shares.FILE)
    assert [source.source for source in found.sources] == ["python_docs", "readmes"]
    assert [source.weight for source in found.sources] == [0.75, 0.25]
    assert found.provenance.inputs["prune.drop"] == [1]
    samples = damage.sample_rows(
        settings, tiny_tokenizer(), (), folder=cut.folder / "text", inputs=found.provenance.inputs
    )
    for source, rows in zip(found.sources, samples, strict=True):
        assert rows.counts.keys() == {source.source}
        assert len(rows) == damage.SAMPLE_ROWS
        assert source.num_tokens == int((rows.labels_NS != IGNORED).sum())
        for seed, nats in ((0, source.teacher_nats), (1, source.student_nats)):
            assert nats == pytest.approx(reference_nats(tiny_model("llama", seed=seed).double(), rows), abs=1e-6)
    damages = [max(0.0, source.student_nats - source.teacher_nats) for source in found.sources]
    assert min(damages) == 0 < max(damages) or min(damages) > 0, "what this is about"
    worth = [3 * damages[0], damages[1]]
    expected = [0.1 * part + 0.9 * value / sum(worth) for part, value in zip((0.75, 0.25), worth, strict=True)]
    assert [source.weight for source in settings.data] == pytest.approx(expected, abs=1e-12)
    assert [source.share for source in found.sources] == [source.weight for source in settings.data]


def test_recorded_shares_are_used_again_and_another_cut_is_measured_anew(cut: Cut) -> None:
    first = cut.settings(cut.student)
    assert [folder.parent.name for folder in cut.loaded] == ["teacher", "student"]
    written = (cut.folder / Shares.FILE).read_bytes()
    assert cut.settings(cut.student) == first
    assert cut.settings(None) == first
    assert len(cut.loaded) == 2
    assert (cut.folder / Shares.FILE).read_bytes() == written
    cut.settings(cut.student, drop=(2,))
    assert len(cut.loaded) == 4
    assert Shares.read(cut.folder / Shares.FILE).provenance.inputs["prune.drop"] == [2]
    cut.settings(cut.student, drop=(2,), losses=[{"kind": "cross_entropy"}], num_tokens=96 * LENGTH)
    assert len(cut.loaded) == 4, "what neither rows nor models depend on"


def test_shares_that_nobody_has_measured_are_refused(cut: Cut) -> None:
    with pytest.raises(UserError, match=r"shares\.json: is gone, .* delete distill\.json"):
        cut.settings(None)


def test_shares_that_are_no_whole_are_refused(cut: Cut) -> None:
    cut.settings(cut.student)
    file = cut.folder / Shares.FILE
    body = json.loads(file.read_text())
    body["sources"][0]["share"] += 0.1
    file.write_text(json.dumps(body))
    with pytest.raises(UserError, match="must be above 0 and sum to 1"):
        cut.settings(None)


# --- pilot


@pytest.mark.parametrize("tau", [2e4, 1e5, 3e6])
def test_the_slope_is_that_of_the_curve_through_both_points(tau: float) -> None:
    num_tokens, most = 100_000, 1.7

    def regained(tokens: float) -> float:
        return most * -math.expm1(-tokens / tau)

    expected = most / tau * math.exp(-num_tokens / tau)
    assert slope(regained(num_tokens / 2), regained(num_tokens), num_tokens) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("half", "whole", "expected"),
    [(0.2, 0.5, 0.005), (-0.1, 0.5, 0.005), (0.25, 0.5, 0.005), (0.5, 0.5, 0.0), (0.6, 0.5, 0.0), (0.1, -0.1, 0.0)],
)
def test_what_does_not_level_off_has_the_mean_slope_and_what_is_back_has_none(
    half: float, whole: float, expected: float
) -> None:
    assert slope(half, whole, 100) == pytest.approx(expected, abs=1e-15)


def test_a_pilots_rows_stand_for_those_that_are_not_known_yet() -> None:
    rows = packed([[20], [7, 13], [1, 9, 10]])
    begun = Beginning.of(rows, length=8)
    assert len(begun) == 8
    assert torch.equal(begun[7]["input_ids"], rows[1]["input_ids"])


def test_checkpoints_whose_pilot_is_gone_are_refused(tmp_path: Path) -> None:
    from shoal.artifacts.artifact import Provenance

    file, points = tmp_path / Pilot.FILE, tuple(PilotPoint(step, (1.0, 2.0)) for step in (0, 2))
    unfinished = Pilot(Provenance({"lr": 1}), ("a", "b"), 4, points)
    unfinished.write(file)
    assert known_pilot(file, {"lr": 1}, step=0) is None
    for step, seen in ((1, [0]), (2, [0, 2]), (3, [0, 2])):
        found = known_pilot(file, {"lr": 1}, step=step)
        assert found is not None
        assert [point.step for point in found.points] == seen
    for inputs, step in (({"lr": 1}, 4), ({"lr": 2}, 1)):
        with pytest.raises(
            UserError, match=f"checkpoint of step {step} goes on from it; delete the folder checkpoints"
        ):
            known_pilot(file, inputs, step=step)


# --- what a recipe must not say


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data": "python_docs"},
            "data_policy: by_damage shares tokens between sources, and there is only python_docs",
        ),
        ({"data_policy": "fixed", "data_pilot": 64}, "data_pilot: has no effect on fixed shares"),
        ({"data_pilot": 64 * LENGTH}, "data_pilot: 2048 leaves nothing to share of 2048 tokens"),
        (
            {"data_pilot": 64, "teacher": {"recorded": "signals"}},
            "data_pilot: which rows follow the pilot is not known",
        ),
        ({"data_pilot": 64, "trainer": {"max_steps": 3}}, "trainer.max_steps: distill.data_pilot shares the tokens"),
        ({"data_policy": "by_weight"}, "data_policy: must be"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(**{"data": ["python_docs", "readmes"], **settings})


def test_a_recording_of_one_cut_is_refused_for_several_rounds() -> None:
    settings = {"data": ["python_docs", "readmes"], "data_policy": "by_damage", "teacher": {"recorded": "signals"}}
    rounds = {"num_drop": 2, "rounds": 2, "metric": "block_influence"}
    with pytest.raises(UserError, match=r"teacher\.recorded: holds rows that .* shared after one cut"):
        parse_recipe({"model": "m", "run_dir": "r", "prune": rounds, "distill": settings})


def test_abilities_alone_are_sources_enough() -> None:
    assert parse(data="ability_texts").distill.data_policy == "by_damage"
