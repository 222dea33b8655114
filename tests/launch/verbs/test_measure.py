"""The measure stage: what it writes, when it measures again, what it refuses before anything is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_model as tiny_family
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_tokenizer

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.compress import measure as hidden_measure
from shoal.errors import UserError
from shoal.launch.verbs import measure as measuring
from shoal.launch.verbs import prune
from shoal.launch.verbs.run import Run, open_run
from shoal.models import load as loading
from shoal.recipe.recipe import parse_recipe

SWEEP: dict[str, Any] = {
    "tasks": ["knowledge"],
    "protocols": ["continuation", "generation"],
    "limit": 10,
    "batch_size": 5,
    "perplexity_tokens": 800,
    "sequence_length": 64,
}
NATS_AND_SHARES = {
    **SWEEP,
    "tasks": ["reasoning_worked", "knowledge_continuation"],
    "protocols": [],
    "perplexity_tokens": 0,
}


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
    assert "which is repeated" not in caplog.text
    (tmp_path / "few.jsonl").write_text('{"text": "two and two are four."}\n')
    measuring.measure(make_run({"data": str(tmp_path / "few.jsonl")}, run_dir=str(tmp_path / "other")))
    assert "measure.data: 64 tokens are more than" in caplog.text
    assert "few.jsonl has, which is repeated: what is found rests on less text" in caplog.text


@pytest.mark.slow
def test_a_sweep_becomes_an_atlas_its_figures_and_scores_per_item(
    make_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(
        {"sweep": {**SWEEP, "operators": ["layer", "mlp"]}},
        prune={"metric": "knowledge/continuation", "num_drop": 1},
    )
    measuring.measure(run)
    importance = Importance.load(run.dir / "importance.json")
    assert importance.atlas is not None
    assert [column.label for column in importance.atlas.columns] == [
        "knowledge/continuation",
        "knowledge/generation",
        "language/rolling",
    ]
    assert all(len(column.effects) == NUM_LAYERS for column in importance.atlas.columns)
    assert set(importance.atlas.agreement.columns) >= {"block_influence", "angular", "knowledge_continuation"}
    assert set(importance.sweeps) == {"mlp"}
    for name in ("importance", "atlas", "agreement", "mlp"):
        assert (run.dir / "figures" / f"{name}.svg").stat().st_size > 1000
    items = json.loads((run.dir / "sweep/layer/knowledge_generation.json").read_text())
    assert len(items["ids"]) == len(items["intact"]) == len(items["without"]["layer 3"]) == 10
    column = importance.atlas.columns[0]
    assert sum(json.loads((run.dir / "sweep/layer/knowledge_continuation.json").read_text())["intact"]) / 10 == (
        pytest.approx(column.intact.value)
    )

    caplog.clear()
    prune.prune(run)
    assert "expected sacrifice" in caplog.text
    assert len(Plan.load(run.dir / "plan.json").drop) == 1


@pytest.mark.slow
def test_what_is_measured_already_is_not_measured_again(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring.measure(make_run({"sweep": SWEEP}))
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("loaded"))
    measuring.measure(make_run({"sweep": {**SWEEP, "batch_size": 2}}))


@pytest.mark.slow
def test_a_task_aware_order_can_be_planned_from(make_run: Any) -> None:
    sweep = {**SWEEP, "protocols": ["continuation"], "operators": [], "greedy": 2, "perplexity_tokens": 0}
    run = make_run({"sweep": sweep}, prune={"metric": "task_greedy", "num_drop": 2})
    prune.prune(run)
    order = Importance.load(run.dir / "importance.json").orders["task_greedy"]
    assert sorted(removal.unit.layers[0] for removal in order) == list(Plan.load(run.dir / "plan.json").drop)
    assert not {0, NUM_LAYERS - 1} & {removal.unit.layers[0] for removal in order}
    single = {**sweep, "operators": ["layer"], "greedy": None}
    measuring.measure(other := make_run({"sweep": single}, run_dir=str(run.dir / "single")))
    atlas = Importance.load(other.dir / "importance.json").atlas
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


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ({"sweep": {}}, "measure.sweep: scores nothing; name tasks"),
        ({"sweep": {**SWEEP, "operators": []}}, "measure.sweep.operators: is empty"),
        ({"sweep": {**SWEEP, "limit": 4}}, r"measure.sweep.limit: must be greater than or equal to 8 .*\(got 4\)"),
        ({"sweep": {**SWEEP, "sequence_length": 5000}}, "measure.sweep.sequence_length: 5000 is more than the 4096"),
        ({"sweep": {**SWEEP, "perplexity_data": {"path": "/nowhere.txt"}}}, "/nowhere.txt"),
        ({"sweep": {**SWEEP, "perplexity_tokens": 300}}, "task 'perplexity': has [4-7] items, but over 6 removals"),
        ({"sweep": {**SWEEP, "limit": {"x": 9}}}, "measure.sweep.limit: 'x' is not among"),
        ({"sequence_length": 5000}, "measure.sequence_length: 5000 is more than the 4096 positions"),
        ({"sweep": {**SWEEP, "greedy": 5}}, "sweep.greedy: 5 removals are more than the model allows, which has 6"),
        ({"metrics": ["sleb"], "num_drop": 5}, "measure.num_drop: 5 removals are more than the model allows"),
        ({"sweep": {**SWEEP, "greedy": 2}}, "measure.sweep.greedy: perplexity is in nats, all else a share"),
        ({"sweep": {**NATS_AND_SHARES, "greedy": 2}}, "measure.sweep.greedy: reasoning_worked is in nats"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, measure: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        measuring.measure(make_run(measure))


def test_windows_too_unequal_for_an_interval_are_refused_before_anything_is_loaded(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("loaded"))
    texts = ["some text as long as a window, or longer: " * 9, *["short"] * 20]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sweep = {**SWEEP, "perplexity_data": {"path": str(tmp_path / "texts.jsonl")}, "sequence_length": 512}
    message = r"its 21 items are of so unequal weight that they are worth 1\.\d equal ones, .* raise measure.sweep."
    with pytest.raises(UserError, match=message):
        measuring.measure(make_run({"sweep": sweep}))


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
    runs = [make_run(measure, model=str(folder)) for measure in ({"sweep": {**SWEEP, "perplexity_tokens": 0}}, {})]
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
    sweep = {**SWEEP, "protocols": ["generation"], "perplexity_tokens": 0, "operators": ["layer", "attention"]}
    settings = {"metrics": ["angular", "sleb"], "num_drop": 2, "sweep": sweep}
    found = []
    for name in ("whole", "offloaded"):
        if name == "offloaded":
            monkeypatch.setattr(loading, "rooms_to_share", lambda *_: {"cpu": 200_000})
        run = make_run(settings, run_dir=str(tmp_path / name), dtype="bfloat16")
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
