"""The measure stage: what it writes, when it measures again, what it refuses before anything is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_model as tiny_family
from cases import cases
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_tokenizer

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.compress import measure as hidden_measure
from shoal.errors import UserError
from shoal.launch.verbs import measure as measuring
from shoal.launch.verbs import prune
from shoal.launch.verbs.run import Run, locked, open_run
from shoal.models import load as loading
from shoal.recipe.measure import num_removals
from shoal.recipe.recipe import parse_recipe

CASES = cases(__file__)

SWEEP: dict[str, Any] = {"tasks": ["knowledge_continuation", "knowledge_generation"], "limit": 10}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama checkpoint with room for prompts."""
    folder = tmp_path_factory.mktemp("teacher")
    return tiny_checkpoint(folder, "llama", max_position_embeddings=4096, initializer_range=0.3)


@pytest.fixture
def make_run(teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """A run that measures few tokens and sweeps one ability; other settings of measure and of the recipe on top."""
    caplog.set_level(logging.INFO, logger="shoal")

    def make(measure: dict[str, Any] | None = None, **settings: Any) -> Run:
        few = {"num_tokens": 64, "sequence_length": 32, "batch_size": 2, **(measure or {})}
        raw = {"model": str(teacher), "run_dir": str(tmp_path / "run"), "measure": few, **settings}
        return open_run(parse_recipe(raw))

    return make


def test_text_that_is_repeated_is_told(make_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    measuring.measure(make_run())
    assert "so it is repeated" not in caplog.text
    (tmp_path / "few.jsonl").write_text('{"text": "two and two are four."}\n')
    measuring.measure(make_run({"data": str(tmp_path / "few.jsonl")}, run_dir=str(tmp_path / "other")))
    assert "measure.data: 64 tokens are more than" in caplog.text
    assert "few.jsonl holds, so it is repeated: the fit rests on less text" in caplog.text


@pytest.mark.slow
def test_a_sweep_becomes_an_atlas_its_figures_and_scores_per_item(
    make_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(
        {"sweep": {**SWEEP, "operators": ["layer", "mlp"]}}, prune={"metric": "knowledge/continuation", "num_drop": 1}
    )
    measuring.measure(run)
    importance = Importance.load(run.dir / "importance.json")
    assert importance.atlas is not None
    assert [column.label for column in importance.atlas.columns] == ["knowledge/continuation", "knowledge/generation"]
    assert all(len(column.effects) == NUM_LAYERS for column in importance.atlas.columns)
    assert set(importance.atlas.agreement.columns) >= {"block_influence", "angular", "knowledge_continuation"}
    assert set(importance.sweeps) == {"mlp"}
    for name in ("importance", "atlas", "agreement", "mlp"):
        assert (run.dir / "figures" / f"{name}.svg").stat().st_size > 1000
    items = json.loads((run.dir / "sweep/layer/knowledge_generation.json").read_text())
    assert len(items["ids"]) == len(items["baseline"]) == len(items["without"]["layer 3"]) == 10
    column = importance.atlas.columns[0]
    assert sum(json.loads((run.dir / "sweep/layer/knowledge_continuation.json").read_text())["baseline"]) / 10 == (
        pytest.approx(column.baseline.value)
    )

    caplog.clear()
    prune.prune(run)
    assert "expected loss" in caplog.text
    assert len(Plan.load(run.dir / "plan.json").drop) == 1


@pytest.mark.slow
def test_what_is_measured_already_is_not_measured_again(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring.measure(make_run({"sweep": SWEEP}))
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("loaded"))
    measuring.measure(make_run({"sweep": SWEEP}, eval={"batch_size": 2, "perplexity_tokens": 7}))


def test_greedy_metrics_remove_what_the_plan_needs_and_a_quarter_at_least(make_run: Any) -> None:
    def removals(num_layers: int, **prune: Any) -> int:
        return num_removals(parse_recipe({"model": "m", "prune": prune}).prune, num_layers)

    assert [removals(layers) for layers in (2, 3, 6, 36)] == [1, 1, 1, 9]
    greedy = {"metric": "sleb"}
    assert [removals(36, **greedy, num_drop=count) for count in (4, 9, 12, 35)] == [9, 9, 12, 34]
    protect = [0, 1, -1, -3]
    assert removals(36, **greedy, num_drop=12, protect=protect) == 14, "an order may begin with those that stay"
    assert [removals(36, **greedy, ratio=share) for share in (0.1, 0.5)] == [9, 18]
    assert removals(36, **greedy, target={"params": 1e9}) == 34
    assert removals(36, metric="angular", num_drop=12) == 9
    inputs = [
        measuring.measure_inputs(make_run({"metrics": ["sleb", *more]}, prune={"metric": "sleb", "num_drop": count}))
        for count in (2, 3)
        for more in ([], ["angular"])
    ]
    assert [own["measure.num_removals"] for own in inputs] == [2, 2, 3, 3]
    assert "measure.num_removals" not in measuring.measure_inputs(make_run({"metrics": ["angular"]}))


@pytest.mark.slow
def test_a_task_aware_order_can_be_planned_from(make_run: Any) -> None:
    asked = {"metrics": ["task_greedy"], "sweep": {**SWEEP, "tasks": "knowledge_continuation"}}
    run = make_run(asked, prune={"metric": "task_greedy", "num_drop": 2})
    prune.prune(run)
    order = Importance.load(run.dir / "importance.json").orders["task_greedy"]
    assert sorted(removal.unit.layers[0] for removal in order) == list(Plan.load(run.dir / "plan.json").drop)
    assert not {0, NUM_LAYERS - 1} & {removal.unit.layers[0] for removal in order}
    atlas = Importance.load(run.dir / "importance.json").atlas
    assert atlas is not None
    inner = {layer: atlas.columns[0].effects[layer].score.value for layer in range(1, NUM_LAYERS - 1)}
    assert order[0].score == max(inner.values()) == inner[order[0].unit.layers[0]]


@pytest.mark.slow
def test_estimates_carry_their_standard_errors(make_run: Any) -> None:
    run = make_run({"metrics": ["block_influence", "present_absent"]})
    measuring.measure(run)
    importance = Importance.load(run.dir / "importance.json")
    assert list(importance.errors) == ["present_absent"]
    assert all(error is not None and error >= 0 for error in importance.errors["present_absent"])


@pytest.mark.parametrize(("measure", "message"), CASES)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, measure: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        measuring.measure(make_run(measure))


@pytest.mark.slow
def test_what_only_the_model_can_tell_is_refused_before_anything_is_measured(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_measure, "measure_importance", lambda *_, **__: pytest.fail("measured"))
    recurrent = tmp_path / "mamba"
    tiny_family("mamba", vocab_size=272).save_pretrained(recurrent)
    tiny_tokenizer().save_pretrained(recurrent)
    run = make_run(
        {"sweep": {**SWEEP, "operators": ["layer", "mlp"]}}, model=str(recurrent), attn_implementation="eager"
    )
    with pytest.raises(UserError, match="layer 0 of mamba"):
        measuring.measure(run)


@pytest.mark.prove
def test_how_a_model_writes_by_itself_identifies_what_is_swept(
    teacher: Path, make_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "model"))
    runs = [make_run(measure, model=str(folder)) for measure in ({"sweep": SWEEP}, {})]
    before = [measuring.measure_inputs(run) for run in runs]
    assert "generation_config.json" not in before[0]
    measuring.measure(runs[0])
    told = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**told, "repetition_penalty": 1.3}))
    writing = {"generation_config.json": {"repetition_penalty": 1.3}}
    assert [measuring.measure_inputs(run) for run in runs] == [{**before[0], **writing}, before[1]]
    measuring.measure(runs[0])
    assert "answered already" not in caplog.text
    (runs[0].dir / Importance.FILE).unlink()
    measuring.measure(runs[0])
    assert "answered already" in caplog.text


@pytest.mark.slow
def test_a_model_that_does_not_fit_waits_on_disk_and_has_the_same_numbers(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = {**SWEEP, "tasks": "knowledge_generation", "operators": ["layer", "attention"]}
    settings, plan = {"metrics": ["angular", "sleb"], "sweep": sweep}, {"metric": "sleb", "num_drop": 2}
    found = []
    for name in ("whole", "offloaded"):
        if name == "offloaded":
            monkeypatch.setattr(loading, "rooms_to_share", lambda *_: {"cpu": 200_000})
        run = make_run(settings, run_dir=str(tmp_path / name), dtype="bfloat16", prune=plan)
        (run.dir / "offloaded-by-a-killed-rank").mkdir(parents=True)
        with locked(run):
            measuring.measure(run)
        found.append(Importance.load(run.dir / "importance.json"))
        assert not list(run.dir.glob("offloaded-*"))
    whole, offloaded = found
    for part in ("layers", "runs", "orders", "atlas", "sweeps"):
        assert getattr(whole, part) == getattr(offloaded, part), part


def test_metrics_that_take_weights_apart_need_them_all_in_memory(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "rooms_to_share", lambda *_: {"cpu": 60_000})
    with pytest.raises(UserError, match=r"measure.metrics: taylor needs all weights in memory, more than is free on"):
        measuring.measure(make_run({"metrics": ["block_influence", "taylor"]}))
