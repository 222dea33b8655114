"""Sweeps of lm-eval tasks over variants, against evaluating every variant on its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from evaluations import assert_same, evaluate
from tiny import NUM_LAYERS, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from shoal.artifacts.evaluation import TaskScore
from shoal.compress.edits.layer_edits import components_of
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.sweeps import sweep as module
from shoal.compress.sweeps.sweep import sweep
from shoal.compress.variants.variants import Edited, Variant, variant_of, without
from shoal.recipe.evaluate import Eval

SETTINGS = Eval(
    tasks=("knowledge_continuation", "knowledge_loglikelihood", "retrieval_generation", "reasoning_worked"),
    limit=5,
    batch_size=3,
    perplexity_tokens=0,
)


def model(**changes: Any) -> PreTrainedModel:
    return tiny_model("llama", max_position_embeddings=4096, initializer_range=0.3, **changes)


def run(
    variants: list[Variant], settings: Eval = SETTINGS, **arguments: Any
) -> tuple[tuple[TaskScore, ...], list[tuple[TaskScore, ...]]]:
    return sweep(Edited(model()), tiny_tokenizer(), variants, settings, seed=0, **arguments)


@pytest.mark.prove
def test_a_sweep_scores_what_evaluating_every_cut_model_scores() -> None:
    drops = [(layer,) for layer in range(NUM_LAYERS)] + [(1, 4)]
    intact, removed = run([without(drop) for drop in drops])
    assert_same(intact, evaluate(model(), tiny_tokenizer(), SETTINGS, seed=0))
    for drop, scores in zip(drops, removed, strict=True):
        assert_same(scores, evaluate(cut_model(model(), drop), tiny_tokenizer(), SETTINGS, seed=0))
    texts = {str([item.prediction for item in scores[2].items]) for scores in removed}
    assert len(texts) == len(drops)


@pytest.mark.prove
def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [without([layer]) for layer in range(3)]
    expected = run(variants)
    score, calls = module.score_variants, []

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(module, "score_variants", stops)
    monkeypatch.setattr(module, "REQUESTS_AT_ONCE", 4)
    with pytest.raises(KeyboardInterrupt):
        run(variants, folder=tmp_path, identity="a")
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("a") as torn:
        torn.write('["half a li')
    calls.clear()
    calls += [0, 0]
    found = run(variants, folder=tmp_path, identity="a")
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert_same(one, other)
    answered = sum(calls)
    calls[:] = [0, 0]
    assert run(variants, folder=tmp_path, identity="a") == found
    assert calls == [0, 0]
    run(variants, folder=tmp_path, identity="b")
    assert sum(calls) == answered + 12  # 4 * 3 were answered before the stop; another model's answers are not used
    calls[:] = [0, 0]
    monkeypatch.setattr(module, "ENGINE", module.ENGINE + 1)
    run(variants, folder=tmp_path, identity="b")
    assert sum(calls) == answered + 12  # nor are those of another engine
    calls[:] = [0, 0]
    monkeypatch.setattr(module, "versions", lambda: {"torch": "0.0"})
    run(variants, folder=tmp_path, identity="b")
    assert sum(calls) == answered + 12


@pytest.mark.slow
def test_two_ranks_answer_from_each_others_files(tmp_path: Path) -> None:
    variants = [without([1])]
    expected = run(variants, folder=tmp_path, identity="a")
    file = tmp_path / "answers-0.jsonl"
    head, *lines = file.read_text().splitlines()
    (tmp_path / "answers-1.jsonl").write_text("\n".join([head, *lines[::2]]) + "\n")
    file.write_text("\n".join([head, *lines[1::2]]) + "\n")
    before = file.read_text()
    assert run(variants, folder=tmp_path, identity="a") == expected
    assert file.read_text() == before
    assert all(len(json.loads(line)) == 2 for line in lines)


@pytest.mark.parametrize(
    ("operator", "count"),
    [
        ("layer", 6),
        ("skip_prompt", 6),
        ("skip_written", 6),
        ("attention", 6),
        ("mlp", 6),
        ("head", 24),
        ("kv_group", 12),
        ("donor", 6),
        ("cumulative", 3),
    ],
)
def test_units_of_an_operator_cover_the_model(operator: str, count: int) -> None:
    made = model()
    units = components_of(operator, made, order=[3, 1, 4])
    assert len(units) == count == len({unit.name for unit in units})
    variants = [variant_of(unit, made) for unit in units]
    assert len({one.edits for one in variants}) == count
    if operator == "cumulative":
        assert [one.edits for one in variants] == [without(drop).edits for drop in ([3], [1, 3], [1, 3, 4])]


@pytest.mark.slow
def test_a_recurrent_model_is_swept_variant_by_variant() -> None:
    from architectures import tiny_model as tiny_family

    made = tiny_family("mamba2", vocab_size=272, num_hidden_layers=3)
    settings = dataclasses.replace(SETTINGS, tasks=("knowledge_continuation",), limit=2)
    intact, removed = sweep(Edited(made), tiny_tokenizer(), [without([1])], settings, seed=0)
    expected = evaluate(cut_model(made, [1]), tiny_tokenizer(), settings, seed=0)
    assert_same(removed[0], expected)
    assert_same(intact, evaluate(made, tiny_tokenizer(), settings, seed=0))
