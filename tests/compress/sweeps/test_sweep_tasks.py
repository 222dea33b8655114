"""Sweeps over tasks that are unlike shoal's own: drawn text, several filters, examples drawn at random."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import cases
from evaluations import assert_same, evaluate
from tiny import tiny_model, tiny_tokenizer

from shoal.components import LayerEdit
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.sweeps import sweep as module
from shoal.compress.sweeps.sweep import checked_tasks, sweep
from shoal.compress.variants.variants import Edited, variant, without
from shoal.errors import UserError
from shoal.recipe.evaluate import Eval

CASES = cases(__file__)

TASK: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
DRAWN = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_k": 0}
WRITTEN = [{"function": "take_first"}, {"function": "regex", "regex_pattern": "(.)"}]
TASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drawn": {"repeats": 2, "generation_kwargs": DRAWN},
    "filtered": {
        "filter_list": [{"name": "second", "filter": WRITTEN[::-1]}, {"name": "first", "filter": WRITTEN[:1]}]
    },
    "shown": {"num_fewshot": 3},
    "long": {"generation_kwargs": {**TASK["generation_kwargs"], "max_gen_toks": 4096}},
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {n} and {n * 7 % 5}?", "answer": f" {n}"} for n in range(12)]
    files = {}
    for split, chosen in (("train", rows[:8]), ("test", rows[6:10])):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        files[split] = str(path)
    for name, changes in TASKS.items():
        task = {**TASK, "task": name, "dataset_kwargs": {"data_files": files}, **changes}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def settings(folder: Path, *names: str, **changes: Any) -> Eval:
    return Eval(tasks=names, include_path=str(folder), limit=4, batch_size=3, perplexity_tokens=0, **changes)


def model() -> Any:
    return tiny_model("llama", max_position_embeddings=4096, initializer_range=0.3)


def run(asked: Eval, drops: list[int], **arguments: Any) -> Any:
    return sweep(Edited(model()), tiny_tokenizer(), [without([drop]) for drop in drops], asked, seed=0, **arguments)


@pytest.mark.slow
def test_filters_and_examples_drawn_at_random_are_those_of_an_evaluation(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(tasks, "filtered", "shown")
    written: list[int] = []
    write = module.generate_variants
    monkeypatch.setattr(module, "generate_variants", lambda *a, **k: written.append(len(a[2])) or write(*a, **k))
    intact, removed = run(asked, [1, 4])
    assert sum(written) == 8  # every prompt is the same for all variants
    assert_same(intact, evaluate(model(), tiny_tokenizer(), asked, seed=0))
    for drop, scores in zip([1, 4], removed, strict=True):
        assert_same(scores, evaluate(cut_model(model(), [drop]), tiny_tokenizer(), asked, seed=0))


class Broken(Edited):
    """Without the MLP of layer 3 it gives no numbers."""

    def run(self, layerwise: Any, layer: int, edits: Any, hidden_BSD: Any, call: Any) -> Any:
        return super().run(layerwise, layer, edits, hidden_BSD, call) * (math.nan if edits and layer == 3 else 1)


@pytest.mark.slow
def test_a_variant_that_gives_no_numbers_is_named() -> None:
    variants = [variant(f"mlp {layer}", [(layer, LayerEdit("mlp"))]) for layer in (2, 3)]
    asked = Eval(tasks=("knowledge_continuation",), limit=2)
    with pytest.raises(UserError, match=r"mlp 3: .* likelihoods are NaN in torch.float32; check the weights"):
        sweep(Broken(model()), tiny_tokenizer(), variants, asked, seed=0)


@pytest.mark.parametrize(("names", "changes", "message"), CASES)
def test_what_a_sweep_would_refuse_later_is_refused_at_once(
    tasks: Path, names: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    asked = dataclasses.replace(settings(tasks, *names), **changes)
    with pytest.raises(UserError, match=message):
        checked_tasks(asked, model().config, tiny_tokenizer(), num_removals=1)
