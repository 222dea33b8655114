"""Students as drafts: the overlap of two distributions, position by position, and what a run tells of it.

Covers: shoal.artifacts.draft.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny import merging_tokenizer, tiny_checkpoint, tiny_model
from torch import Tensor

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.draft import Acceptance, Drafts
from shoal.artifacts.evaluation import Interval
from shoal.errors import UserError
from shoal.eval import draft as module
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.data import as_data
from shoal.eval.compare.page import comparison_text
from shoal.eval.draft import Text, acceptance, measure_drafts, overlaps
from shoal.eval.export.card import model_card
from shoal.eval.report.findings import read_run
from shoal.eval.report.report import write_report
from shoal.eval.report.speed import draft_cost, draft_section, draft_table
from shoal.inference.decoder import Decoder
from shoal.launch.cli import main, run_verb
from shoal.launch.verbs.run import locked, open_run
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.evaluate import Eval
from shoal.recipe.recipe import load_recipe
from shoal.stats.drafting import tokens_per_round

TEXTS: list[Text] = [([256], list(b"The sea is blue")), (list(b"What is it? "), list(b"it is")), ([256, 65], [66])]


class Fixed:
    """A decoder of one distribution at every position."""

    enough_tokens = 1

    def __init__(self, *probabilities: float) -> None:
        self.logits_V = torch.tensor(probabilities).log()

    def right_padded(self, rows: list[list[int]]) -> Tensor:
        return torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)

    def hidden(self, ids_BS: Tensor) -> Tensor:
        return torch.zeros(*ids_BS.shape, 1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.logits_V.expand(len(hidden_ND), -1)

    def positions_at_once(self) -> int:
        return 2


def test_two_distributions_of_three_tokens_overlap_as_by_hand() -> None:
    teacher: Any = Fixed(0.5, 0.3, 0.2)
    for draft, share, agrees in (
        (Fixed(0.2, 0.3, 0.5), 0.2 + 0.3 + 0.2, False),
        (Fixed(0.9, 0.1, 0.0), 0.5 + 0.1, True),
        (Fixed(0.4, 0.2, 0.1, 0.3), 0.4 + 0.2 + 0.1, True),  # a row that only the draft has
        (Fixed(0.6, 0.4), 0.5 + 0.3, True),
    ):
        own: Any = draft
        for shares_N, agree_N in overlaps(teacher, own, TEXTS, batch_size=2):
            assert shares_N.tolist() == pytest.approx([share] * len(shares_N), abs=1e-6)
            assert agree_N.tolist() == [agrees] * len(agree_N)
    counts = [len(shares_N) for shares_N, _ in overlaps(teacher, teacher, TEXTS, batch_size=2)]
    assert counts == [len(judged) for _, judged in TEXTS]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_overlaps_are_those_of_float64_distributions(kind: str) -> None:
    teacher, draft = tiny_model(kind), tiny_model(kind, seed=1, num_hidden_layers=3)
    found = overlaps(Decoder(teacher), Decoder(draft), TEXTS, batch_size=2)
    teacher, draft = teacher.double(), draft.double()
    for (read, judged), (shares_N, agree_N) in zip(TEXTS, found, strict=True):
        ids = torch.tensor([[*read, *judged]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, len(read) - 1 : -1].softmax(-1) for model in (teacher, draft))
        assert shares_N.tolist() == pytest.approx(torch.minimum(p, q).sum(-1).tolist(), abs=1e-5)
        assert agree_N.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_the_mean_is_over_positions_and_its_interval_over_texts() -> None:
    found = acceptance([[1.0, 0.5, 0.0], [0.5]])
    assert found.share.value == 0.5
    assert 0.4 < found.share.ci_low <= 0.5 <= found.share.ci_high < 0.6
    wide = acceptance([[1.0], [0.0], [1.0], [0.0]])
    assert wide.share.ci_high - wide.share.ci_low > 0.5


def test_every_rank_writes_a_text_of_every_task_that_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}
    monkeypatch.setattr(module, "scores_of", lambda lm, tasks, settings, seed: limits.update(settings.limits))
    lm: Any = SimpleNamespace(world_size=3)
    tasks = {
        name: SimpleNamespace(OUTPUT_TYPE="generate_until", eval_docs=range(count))
        for name, count in (("many", 9), ("few", 2))
    }
    module._written(lm, tasks, Eval(tasks=("many", "few"), limit=5, perplexity_tokens=8), seed=0)
    assert limits == {"many": 3, "few": 2}


SETTINGS: dict[str, Any] = {
    "tasks": ["knowledge_generation", "knowledge_continuation"],
    "limit": 6,
    "limits": {"knowledge_continuation": 2},
    "perplexity_tokens": 600,
    "sequence_length": 128,
    "speed_batch_sizes": [1],
    "draft": True,
}


@pytest.fixture(scope="module")
def run_dir(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one layer fewer, cut and scored. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"model": str(teacher), "run_dir": str(folder / "run"), "prune": {"drop": [3]}, "eval": SETTINGS}
    settings["dtype"] = "float32"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert [run_verb(verb, str(folder / "recipe.yaml"), []) for verb in ("prune", "eval")] == [0, 0]
    return folder / "run"


@pytest.mark.slow
def test_a_run_tells_what_its_student_is_worth_as_a_draft(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafts = Drafts.read(run_dir / Drafts.FILE)
    ((role, (held_out, written)),) = drafts.roles.items()
    assert (role, held_out.text, written.text) == ("pruned", "held_out", "written")
    assert held_out.num_positions == 600
    assert 0 < written.num_texts <= 6
    assert 0 < written.num_positions <= 600
    for own in (held_out, written):
        assert 0 < own.greedy.share.value < 1
        assert own.sampled.share.ci_low <= own.sampled.share.value <= own.sampled.share.ci_high < 1
    accepted = [own for own in held_out.sampled.accepted if own is not None]
    assert accepted == sorted(accepted)
    assert len(accepted) == 8
    run = read_run(run_dir)
    cost = draft_cost(run.speed, "pruned")
    assert run.speed is not None
    speeds = [run.speed.roles[own].decode_tokens_per_s for own in ("teacher", "pruned")]
    assert cost == pytest.approx(speeds[0] / speeds[1])
    section = draft_section(run)
    assert section is not None
    assert "As a draft for the teacher" in write_report(run_dir).read_text()
    written_at = (run_dir / Drafts.FILE).stat().st_mtime_ns
    assert run_verb("eval", str(run_dir), []) == 0
    assert "draft: done already" in capsys.readouterr().err
    assert (run_dir / Drafts.FILE).stat().st_mtime_ns == written_at


@pytest.mark.slow
def test_the_teacher_accepts_all_of_itself(teacher: Path, run_dir: Path) -> None:
    load, settings = LoadSettings(dtype="float32"), Eval(tasks=(), perplexity_tokens=300, sequence_length=64)
    own = Checkpoint.read(teacher, load)
    provenance = Drafts.read(run_dir / Drafts.FILE).provenance
    ((held_out,),) = measure_drafts(
        own, {"pruned": own}, settings, provenance=provenance, tasks={}, seed=0
    ).roles.values()
    for way in (held_out.sampled, held_out.greedy):
        assert way.share == Interval(1.0, 1.0, 1.0)
        assert way.accepted == tuple(range(1, 9))


def test_a_draft_of_other_tokens_is_refused_before_it_is_loaded(teacher: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path, "qwen2")
    merging_tokenizer().save_pretrained(other)
    load = LoadSettings()
    checkpoints = [Checkpoint.read(folder, load) for folder in (teacher, other)]
    with pytest.raises(UserError, match=r"a draft has to have the teacher's tokens: choose another one, or set"):
        measure_drafts(checkpoints[0], {"model": checkpoints[1]}, Eval(), provenance=Provenance({}), tasks={}, seed=0)


@pytest.mark.slow
def test_a_table_says_that_a_costly_draft_cannot_pay(run_dir: Path) -> None:
    ((own, _),) = Drafts.read(run_dir / Drafts.FILE).roles.values()
    accepted = tuple(tokens_per_round(0.75, g) - 1 - 0.01 * (g > 1) for g in range(1, 9))
    own = replace(own, sampled=Acceptance(Interval(0.75, 0.7, 0.8), accepted))
    rows = {cost: draft_table([("pruned", own, cost)]).rows[0] for cost in (None, 0.75, 0.5)}
    assert rows[None][-1] == "not measured with one sequence at once"
    assert rows[0.75][-1] == "cannot pay"
    assert rows[0.5][3:6] == ("75.0 % [70.0, 80.0]", "0.50 of the teacher's", "1")
    assert rows[0.5][-2:] == ("1.75", "1.17 ×")
    unknown = replace(own, sampled=replace(own.sampled, accepted=(None,) * 8))
    assert draft_table([("pruned", unknown, 0.5)]).rows[0][-1] == "no text is long enough"


@pytest.mark.slow
def test_the_card_and_the_comparison_show_it(run_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run_dir, tmp_path / "other")
    comparison = compare_runs([run_dir, other])
    assert "B pruned" in comparison_text(comparison)
    assert "the teacher's own text" in comparison_text(comparison)
    assert as_data(comparison)["runs"][0]["drafts"]["pruned"][1]["text"] == "written"
    assert "## As a draft for the teacher" in model_card(run_dir)


@pytest.mark.slow
def test_a_checkpoint_beside_a_run_waits_for_the_run_whose_answers_it_reads_and_adds_to(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, student = shutil.copytree(run_dir, tmp_path / "held"), shutil.copytree(run_dir / "student", tmp_path / "own")
    for file in (held / "eval/items").iterdir():
        file.unlink()
    monkeypatch.setattr("shoal.launch.verbs.run.LOCK_WAIT_S", -1)

    def compare() -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            main(["compare", str(held), str(student), "--out", str(tmp_path / "out")])
        return ended.value.code

    with locked(open_run(load_recipe(held))):
        assert compare() == 2
    assert f"run_dir {held}: is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not list((held / "eval/items").iterdir())
    assert compare() == 0
    assert list((held / "eval/items").iterdir()), "what the teacher wrote is the run's"
    (beside,) = tmp_path.glob(f"out/models/*/{Drafts.FILE}")
    assert Drafts.read(beside).roles["model"] == Drafts.read(held / Drafts.FILE).roles["pruned"]
