"""The measure stage: what it writes, when it measures again, what it refuses before anything is loaded.

Covers: shoal.launch.verbs.measure_checks.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_model as tiny_family
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_tokenizer

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance, Removal
from shoal.artifacts.plan import PruningPlan
from shoal.components import Component
from shoal.compress import measure as hidden_measure
from shoal.errors import UserError
from shoal.launch.verbs import measure as measuring
from shoal.launch.verbs import measure_checks, prune
from shoal.launch.verbs.run import Run, open_run
from shoal.recipe.measure import Sweeps
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
    assert "measure.num_tokens: is more than" in caplog.text
    assert "few.jsonl has, which is repeated: scores rest on less text than they say" in caplog.text


def test_items_are_needed_for_the_removals_that_there_are(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = list[int]()
    refuse = "shoal.compress.sweeps.sweep.refuse_few_items"
    monkeypatch.setattr(refuse, lambda *_, num_removals, **__: counted.append(num_removals))
    for asked in ({}, {"max_removed": 2}, {"order": [3]}, {"order": [3, 2, 1], "max_removed": 4}):
        measure_checks.check_measure(make_run({"sweep": {**SWEEP, "operators": ["cumulative"], **asked}}))
    measure_checks.check_measure(make_run({"sweep": {**SWEEP, "operators": ["cumulative", "layer"], "order": [3]}}))
    assert counted == [6, 2, 1, 3, 6]


@pytest.mark.slow
def test_a_sweep_becomes_an_atlas_its_figures_and_scores_per_item(
    make_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    operators = ["layer", "cumulative"]
    run = make_run(
        {"sweep": {**SWEEP, "operators": operators, "max_removed": 4}},
        prune={"metric": "knowledge/continuation", "num_drop": 1},
    )
    measuring.measure(run)
    importance = Importance.read(run.dir / "importance.json")
    assert importance.atlas is not None
    assert [column.label for column in importance.atlas.columns] == [
        "knowledge/continuation",
        "knowledge/generation",
        "language/rolling",
    ]
    assert all(len(column.effects) == NUM_LAYERS for column in importance.atlas.columns)
    assert set(importance.atlas.agreement.columns) >= {"block_influence", "angular", "knowledge_continuation"}
    assert set(importance.sweeps) == {"cumulative"}
    assert [len(unit.layers) for unit in importance.sweeps["cumulative"].units] == [1, 2, 3, 4]
    for name in ("importance", "atlas", "agreement", "cumulative"):
        assert (run.dir / "figures" / f"{name}.svg").stat().st_size > 1000
    items = json.loads((run.dir / "sweep/layer/knowledge_generation.json").read_text())
    assert len(items["ids"]) == len(items["intact"]) == len(items["without"]["layer 3"]) == 10
    column = importance.atlas.columns[0]
    assert sum(json.loads((run.dir / "sweep/layer/knowledge_continuation.json").read_text())["intact"]) / 10 == (
        pytest.approx(column.intact.value)
    )

    caplog.clear()
    prune.prune(run)
    assert "expected sacrifice" in caplog.text or "measured without exactly these layers" in caplog.text
    assert len(PruningPlan.read(run.dir / "plan.json").drop) == 1


@pytest.mark.slow
def test_reading_is_told_from_writing_where_both_are_swept(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    operators = ["skip_prompt", "layer", "skip_written"]
    run = make_run({"sweep": {**SWEEP, "operators": operators}})
    measuring.measure(run)
    atlas = Importance.read(run.dir / "importance.json").atlas
    assert atlas is not None
    assert atlas.read_write is not None
    assert [column.task for column in atlas.read_write.columns] == [column.task for column in atlas.columns]
    for column, own in zip(atlas.read_write.columns, atlas.columns, strict=True):
        assert column.reading[-1].value == 0.0  # nobody reads what the last layer adds to a prompt
        assert column.writing[-1].value == own.losses[-1].value
    assert len({one.value for one in atlas.read_write.columns[2].writing}) == NUM_LAYERS
    for line in atlas.read_write.in_words(atlas.sweep, range(NUM_LAYERS)):
        assert line in caplog.text
    for name in ("atlas", "read_write", "skip_prompt", "skip_written"):
        assert (run.dir / "figures" / f"{name}.svg").stat().st_size > 1000


@pytest.mark.slow
def test_a_family_whose_positions_cannot_be_skipped_is_refused_before_anything_is_measured(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gemma3n"
    tiny_family("gemma3n_text", vocab_size=272, vocab_size_per_layer_input=272).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(hidden_measure, "measure_importance", lambda *_, **__: pytest.fail("measured"))
    settings = {**SWEEP, "protocols": ["continuation"], "perplexity_tokens": 0, "operators": ["layer", "skip_written"]}
    with pytest.raises(UserError, match="gemma3n_text: its layers hand on a state of shape"):
        measuring.measure(make_run({"sweep": settings}, model=str(folder)))


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
    order = Importance.read(run.dir / "importance.json").orders["task_greedy"]
    assert sorted(removal.unit.layers[0] for removal in order) == list(PruningPlan.read(run.dir / "plan.json").drop)
    assert not {0, NUM_LAYERS - 1} & {removal.unit.layers[0] for removal in order}
    single = {**sweep, "operators": ["layer"], "greedy": None}
    measuring.measure(other := make_run({"sweep": single}, run_dir=str(run.dir / "single")))
    atlas = Importance.read(other.dir / "importance.json").atlas
    assert atlas is not None
    inner = {layer: atlas.columns[0].effects[layer].score.value for layer in range(1, NUM_LAYERS - 1)}
    assert order[0].score == max(inner.values()) == inner[order[0].unit.layers[0]]


@pytest.mark.slow
def test_estimates_carry_their_standard_errors(make_run: Any) -> None:
    run = make_run({"metrics": ["block_influence", "present_absent"]})
    measuring.measure(run)
    importance = Importance.read(run.dir / "importance.json")
    assert list(importance.errors) == ["present_absent"]
    assert all(error is not None and error >= 0 for error in importance.errors["present_absent"])


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ({"sweep": {}}, "measure.sweep: scores nothing; name tasks"),
        ({"sweep": {**SWEEP, "operators": ["donor"]}}, "measure.sweep.donor: needs the operator donor"),
        ({"sweep": {**SWEEP, "donor": "x"}}, "measure.sweep.donor: needs the operator donor"),
        ({"sweep": {**SWEEP, "order": [1]}}, "measure.sweep.order: has no effect"),
        ({"sweep": {**SWEEP, "max_removed": 2}}, "measure.sweep.max_removed: has no effect"),
        ({"sweep": {**SWEEP, "operators": []}}, "measure.sweep.operators: is empty"),
        ({"sweep": {**SWEEP, "limit": 4}}, "measure.sweep.limit: with fewer than 8 items"),
        ({"sweep": {**SWEEP, "operators": ["cumulative"], "order": [1, 1]}}, r"each once and not all \(got \[1, 1\]\)"),
        ({"sweep": {**SWEEP, "operators": ["cumulative"], "order": "taylr"}}, "measure.sweep.order"),
        (
            {"sweep": {**SWEEP, "operators": ["layer", "cumulative"], "order": "taylr"}},
            "order=taylr: is not in importance.json; did you mean angular",
        ),
        (
            {"sweep": {**SWEEP, "operators": ["layer", "cumulative"], "order": "knowledge"}},
            "order=knowledge: knowledge could be knowledge_continuation or knowledge_generation",
        ),
        (
            {"sweep": {**SWEEP, "operators": ["layer", "cumulative"]}, "metrics": ["angular"]},
            "order=block_influence: is not in importance.json; it has angular",
        ),
        (
            {"sweep": {**SWEEP, "operators": ["layer", "cumulative"], "order": "knowledge/loglikelihood"}},
            "order=knowledge/loglikelihood: is not in importance.json; did you mean knowledge/",
        ),
        (
            {
                "metrics": ["blockpruner"],
                "sweep": {**SWEEP, "operators": ["layer", "cumulative"], "order": "blockpruner"},
            },
            "order=blockpruner: blockpruner is an order of attention units",
        ),
        ({"sweep": {**SWEEP, "operators": ["cumulative", "layer"], "order": "knowledge"}}, "operator layer before"),
        ({"sweep": {**SWEEP, "sequence_length": 5000}}, "measure.sweep.sequence_length: 5000 is more than the 4096"),
        ({"sweep": {**SWEEP, "perplexity_data": {"path": "/nowhere.txt"}}}, "/nowhere.txt"),
        ({"sweep": {**SWEEP, "perplexity_tokens": 300}}, "task 'perplexity': has [4-7] items, but over 6 removals"),
        ({"sweep": {**SWEEP, "limits": {"x": 9}}}, "measure.sweep.limits: 'x' is not among"),
        ({"sequence_length": 5000}, "measure.sequence_length: 5000 is more than the 4096 positions"),
        ({"sweep": {**SWEEP, "greedy": 5}}, "sweep.greedy: 5 removals are more than the model allows, which has 6"),
        ({"metrics": ["sleb"], "num_drop": 5}, "measure.num_drop: 5 removals are more than the model allows"),
        (
            {"sweep": {**SWEEP, "greedy": 2}},
            "measure.sweep.greedy: perplexity is in nats and knowledge_continuation a share, which have no unit",
        ),
        (
            {"sweep": {**NATS_AND_SHARES, "greedy": 2}},
            "measure.sweep.greedy: reasoning_worked is in nats and knowledge_continuation a share",
        ),
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
    donor = tiny_checkpoint(tmp_path, "llama", intermediate_size=64)
    run = make_run({"sweep": {**SWEEP, "operators": ["layer", "donor"], "donor": str(donor)}})
    with pytest.raises(UserError, match=r"swap: layer 0: mlp\.intermediate_size is 64 in the donor"):
        measuring.measure(run)
    recurrent = tmp_path / "mamba"
    tiny_family("mamba", vocab_size=272).save_pretrained(recurrent)
    tiny_tokenizer().save_pretrained(recurrent)
    run = make_run({"sweep": {**SWEEP, "operators": ["layer", "head"]}}, model=str(recurrent), attention="eager")
    with pytest.raises(UserError, match="layer 0 of mamba"):
        measuring.measure(run)


@pytest.mark.slow
def test_answers_of_a_donor_that_has_changed_are_not_used(make_run: Any, tmp_path: Path) -> None:
    sweep = {**SWEEP, "protocols": ["continuation"], "operators": ["donor"], "perplexity_tokens": 0}
    found = []
    for seed, name in ((1, "run"), (2, "run"), (2, "fresh")):
        donor = tiny_checkpoint(tmp_path, "llama", max_position_embeddings=4096, initializer_range=0.3, seed=seed)
        run = make_run({"sweep": {**sweep, "donor": str(donor)}}, run_dir=str(tmp_path / name))
        measuring.measure(run)
        found.append((run.dir / "sweep/donor/knowledge_continuation.json").read_text())
    assert found[0] != found[1] == found[2]


@pytest.mark.slow
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


SMALL = {"memory_gb": 0.0085}
"""Less than the wide checkpoint, enough for one of its layers."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of 9 MB, nearly all of it in the layers."""
    folder = tmp_path_factory.mktemp("wide")
    return str(tiny_checkpoint(folder, "llama", max_position_embeddings=4096, intermediate_size=4096))


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_measured_from_its_files_with_the_same_numbers(
    make_run: Any, wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = ["layer", "skip_prompt", "skip_written"]
    swept = {**SWEEP, "protocols": ["continuation"], "batch_size": 1, "operators": operators}
    whole = make_run({"sweep": swept}, model=wide, run_dir=str(tmp_path / "whole"))
    measuring.measure(whole)
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("loaded"))
    streamed = make_run({"sweep": swept, **SMALL}, model=wide, run_dir=str(tmp_path / "streamed"))
    measuring.measure(streamed)
    expected, found = (Importance.read(run.dir / "importance.json") for run in (whole, streamed))
    assert (found.layers, found.runs, found.atlas, found.sweeps) == (
        expected.layers,
        expected.runs,
        expected.atlas,
        expected.sweeps,
    )


@pytest.mark.parametrize(("dtype", "is_streamed"), [("float32", True), ("bfloat16", False)])
def test_the_limit_of_memory_is_that_of_the_weights_as_they_are_loaded(
    make_run: Any, wide: str, dtype: str, is_streamed: bool
) -> None:
    """The files hold 9 MB in float32 whatever the run loads them in."""
    assert measure_checks.is_streamed(make_run({"memory_gb": 0.006}, model=wide, dtype=dtype)) is is_streamed


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ({"sweep": SWEEP}, "'knowledge_generation' writes text, which takes the whole model in memory"),
        ({"sweep": {**SWEEP, "protocols": ["continuation"], "operators": ["mlp"]}}, "operators: mlp takes the whole"),
        ({"metrics": ["taylor"]}, "taylor needs gradients, for which the whole model has to be in memory"),
        ({"memory_gb": 0.0001}, r"measure.memory_gb: 107 kB is too little to run one layer"),
    ],
)
def test_what_needs_the_whole_model_is_refused_where_it_does_not_fit(
    make_run: Any, wide: str, monkeypatch: pytest.MonkeyPatch, measure: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(measuring, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        measuring.measure(make_run({**SMALL, **measure}, model=wide))


def test_cumulative_removals_end_where_a_greedy_order_does() -> None:
    """Of layers that the order never took it says nothing, and by their numbers layer 0 would be the next to go."""
    order = tuple(Removal(Component((layer,)), 0.0) for layer in (3, 1))
    scores = {"block_influence": (0.5, 0.1, 0.3, 0.2, 0.4, 0.6)}
    importance = Importance(Provenance({}), 6, 1, scores, {}, orders={"sleb": order})
    sweep: dict[str, Any] = {"tasks": ("retrieval_generation",), "operators": ("cumulative",)}
    assert measuring._order(Sweeps(**sweep, order="sleb"), importance) == (3, 1)
    assert measuring._order(Sweeps(**sweep, order="block_influence"), importance) == (1, 3, 2, 4, 0)
