"""Concept-depth probes: planted concepts, independent scores, seeded splits, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny import NUM_LAYERS, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.lab import probes
from shoal.lab.probes import DepthPoint, ProbeSet, depth_points, probe_depth
from shoal.models.anatomy import decoder_layers

WORDS = ("red", "blue", "green", "seven", "hill", "river", "stone", "lamp")


def texts(count: int, seed: int = 0) -> list[str]:
    """Different texts that all end with the same token."""
    drawn = np.random.default_rng(seed)
    return [f"{number} {' '.join(drawn.choice(WORDS, 1 + number % 4))}." for number in range(count)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> ProbeSet:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ProbeSet(str(path))


def balanced(path: Path, count: int = 60) -> ProbeSet:
    return write(path, [{"text": text, "label": number % 2} for number, text in enumerate(texts(count))])


def planted(labels: dict[tuple[int, ...], int], depth: int) -> PreTrainedModel:
    """A model whose layers pass their input on, but for one that adds a text's label to its last token's state."""
    model, seen = tiny_model("llama"), list[list[int]]()
    for index, layer in enumerate(decoder_layers(model)):

        def replaced(_: Any, args: Any, output: Any, index: int = index) -> torch.Tensor:
            state = args[0].clone()
            if index == depth - 1:
                for row, ids in enumerate(seen):
                    for known, label in labels.items():
                        if tuple(ids[: len(known)]) == known:
                            state[row, len(known) - 1, 3] += 4.0 * (2 * label - 1)
            return state

        layer.register_forward_hook(replaced)

    def remember(_: Any, __: Any, kwargs: Any) -> None:
        seen[:] = kwargs["input_ids"].tolist()

    model.get_decoder().register_forward_pre_hook(remember, with_kwargs=True)
    return model


@pytest.mark.prove
@pytest.mark.parametrize("depth", [1, 4, NUM_LAYERS])
def test_a_concept_written_by_one_layer_is_found_from_there_on(depth: int, tmp_path: Path) -> None:
    probe_set, tokenizer = balanced(tmp_path / "set.jsonl"), tiny_tokenizer()
    labels = {tuple(tokenizer(text)["input_ids"]): number % 2 for number, text in enumerate(texts(60))}
    found = probe_depth(planted(labels, depth), tokenizer, probe_set, batch_size=7)
    assert len(found.accuracy) == NUM_LAYERS + 1
    assert found.accuracy[depth:] == found.f1[depth:] == found.auc[depth:] == (1.0,) * (NUM_LAYERS + 1 - depth)
    assert max(found.accuracy[:depth]) < 0.7  # all texts end with one token, whose state then says nothing
    assert found.jump == found.enough == DepthPoint(depth / NUM_LAYERS)
    assert found.converging.depth == (1.0 if depth < NUM_LAYERS else (NUM_LAYERS - 1) / NUM_LAYERS)
    assert found.majority == 0.5
    assert (found.num_train, found.num_test, found.classes) == (42, 18, ("0", "1"))


@pytest.mark.prove
@pytest.mark.parametrize("num_classes", [2, 3])
def test_scores_are_those_of_states_scaled_by_the_training_part(num_classes: int, tmp_path: Path) -> None:
    """F1 and AUC by counting."""
    rows = [{"text": text, "label": f"c{len(text) % num_classes}"} for text in texts(150, seed=5)]
    probe_set, tokenizer, model = write(tmp_path / "set.jsonl", rows), tiny_tokenizer(), tiny_model("qwen3")
    found = probe_depth(model, tokenizer, probe_set, batch_size=16, seed=2)
    labels = np.array([int(row["label"][1]) for row in rows])
    train_rows, test_rows = probes._stratified(labels, probe_set, 2)
    for depth in (1, NUM_LAYERS):
        with torch.no_grad():
            states = torch.stack([_state(model, tokenizer(row["text"])["input_ids"], depth) for row in rows]).double()
        train, test = states[train_rows], states[test_rows]
        mean, spread = train.mean(0), train.std(0, correction=0)
        probe = LogisticRegression(max_iter=1000).fit(((train - mean) / spread).numpy(), labels[train_rows])
        chances = probe.predict_proba(((test - mean) / spread).numpy())
        truth, said = labels[test_rows], chances.argmax(1)
        assert found.accuracy[depth] == pytest.approx(np.mean(said == truth))
        assert found.f1[depth] == pytest.approx(_f1(truth, said, num_classes))
        assert found.auc[depth] == pytest.approx(_auc(truth, chances, num_classes), abs=2e-3)


def _state(model: PreTrainedModel, ids: list[int], depth: int) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    with decoder_layers(model)[depth - 1].register_forward_hook(lambda _, __, out: caught.append(out[0, -1])):
        model(torch.tensor([ids]), use_cache=False)
    return caught[0]


def _f1(truth: Any, said: Any, num_classes: int) -> float:
    values = []
    for label in (1,) if num_classes == 2 else range(num_classes):
        both = ((truth == label) & (said == label)).sum()
        values.append(2 * both / ((truth == label).sum() + (said == label).sum()))
    return float(np.mean(values))


def _auc(truth: Any, chances: Any, num_classes: int) -> float:
    values = []
    for label in (1,) if num_classes == 2 else range(num_classes):
        ours, others = chances[truth == label, label], chances[truth != label, label]
        values.append(np.mean([(one > other) + 0.5 * (one == other) for one in ours for other in others]))
    return float(np.mean(values))


def test_the_split_is_seeded_and_stratified(tmp_path: Path) -> None:
    labels = np.array([0] * 70 + [1] * 20 + [2] * 10)
    one, same, other = (probes._stratified(labels, ProbeSet("x"), seed) for seed in (0, 0, 1))
    assert (one[1] == same[1]).all()
    assert one[1].tolist() != other[1].tolist()
    assert np.bincount(labels[one[1]]).tolist() == [21, 6, 3]
    assert sorted(np.concatenate(one)) == list(range(100))


def test_points_follow_from_the_accuracies() -> None:
    points = depth_points((0.5, 0.5, 0.54, 0.6, 0.9, 0.95, 0.94))
    assert points["variation"] == pytest.approx((1, 1.08, 0.6 / 0.54, 1.5, 0.95 / 0.9, 0.94 / 0.95))
    assert points["jump"] == DepthPoint(3 / 6)
    assert points["converging"] == DepthPoint(1.0)
    assert points["enough"] == DepthPoint(5 / 6)
    flat = depth_points((0.5, 0.45, 0.4, 0.0, 0.0, 0.3))
    assert flat["variation"][3:] == (None, None)
    assert flat["jump"] == DepthPoint(None, "no layer raises the accuracy by a factor of 1.1")
    assert flat["converging"] == DepthPoint(None, "every layer changes the accuracy by 3% or more")
    assert flat["enough"] == DepthPoint(0.0)


@pytest.mark.prove
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a", "label": 1}] * 2 + [{"text": "b", "label": 1}],
            r"holds different texts 2 of class '1'; a",
        ),
        (
            [{"text": f"t{n}", "label": int(n < 9)} for n in range(40)],
            r"31 of class '0', 9 of class '1'; a probe needs two classes or more with 10 each",
        ),
        ([{"text": "a", "klass": 1}], r"has no column 'label'; it has text, klass"),
        ([{"text": "a", "label": 1}, {"text": "  ", "label": 0}], r"row 1: has nothing in column 'text'; fill it"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], r"row 1: has nothing in column 'label'; fill it"),
    ],
)
def test_sets_that_cannot_be_probed_are_refused(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    probe_set = write(tmp_path / "set.jsonl", rows)
    with pytest.raises(UserError, match=message):
        probe_depth(tiny_model("llama"), tiny_tokenizer(), probe_set, batch_size=2)
