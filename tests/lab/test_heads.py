"""Retrieval heads: on a model whose heads are known.

Covers: shoal.lab.attention.prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
from induction import COPYING, PREVIOUS, copy_prompt, induction_model
from tiny import tiny_tokenizer

from shoal.artifacts.artifact import Provenance
from shoal.errors import UserError
from shoal.figures.style import save_figure
from shoal.lab.attention.prompts import SIZES, copy_prompts
from shoal.lab.heads import Heads, TaskHeads, heads_figure, score_heads

TOKENIZER: Any = tiny_tokenizer()


def test_the_head_that_copies_scores_1_and_all_others_0() -> None:
    num_right, found = score_heads(induction_model(), [copy_prompt(at) for at in (1, 3, 5, 8)], batch_size=3)
    assert num_right == 4
    scores = {(layer, head): score for layer, row in enumerate(found) for head, score in enumerate(row)}
    assert scores.pop(COPYING) == 1
    assert PREVIOUS in scores
    assert set(scores.values()) == {0}


@pytest.mark.prove
def test_a_head_scores_the_share_of_the_needle_that_it_copies_in_order() -> None:
    """Of a needle whose places are told one too far, the head looks at none at its place."""
    prompt = copy_prompt(3)
    shifted = type(prompt)(prompt.input_ids, tuple(place + 1 for place in prompt.needle), prompt.question)
    partly = type(prompt)(prompt.input_ids, (prompt.needle[0], *shifted.needle[1:]), prompt.question)
    model = induction_model()
    assert score_heads(model, [shifted], batch_size=1)[1][COPYING[0]][COPYING[1]] == 0
    share = score_heads(model, [partly], batch_size=1)[1][COPYING[0]][COPYING[1]]
    assert share == pytest.approx(1 / len(prompt.needle))
    assert score_heads(model, [prompt, shifted], batch_size=2)[1][COPYING[0]][COPYING[1]] == 0.5


@pytest.mark.prove
def test_prompts_that_are_answered_wrong_do_not_count() -> None:
    prompt = copy_prompt(3)
    wrong = type(prompt)((*prompt.input_ids[:-1], prompt.input_ids[0]), prompt.needle, prompt.question)
    model = induction_model()
    num_right, found = score_heads(model, [prompt, wrong], batch_size=2)
    assert (num_right, found[COPYING[0]][COPYING[1]]) == (1, 1)
    with pytest.raises(UserError, match="answers none of 1 prompts right"):
        score_heads(model, [wrong], batch_size=2)


@pytest.mark.prove
def test_heads_of_a_family_without_softmax_attention_are_refused() -> None:
    prompt = copy_prompt(3)
    for family in ("mamba", "rwkv", "bloom"):
        with pytest.raises(UserError, match=f"without softmax attention, or with one of its own: {family} hands no"):
            score_heads(architectures.tiny_model(family), [prompt], batch_size=1)


@pytest.mark.prove
@pytest.mark.parametrize("task", ["retrieval", "needle"])
def test_prompts_name_the_places_of_what_is_copied(task: Any) -> None:
    prompts = copy_prompts((task,), 1, TOKENIZER, seed=0)[task]
    assert len(prompts) == 15
    depths = set()
    for prompt in prompts:
        ids = prompt.input_ids
        assert tuple(ids[place] for place in prompt.needle) == prompt.answer
        text, value = TOKENIZER.decode(list(ids)), TOKENIZER.decode(list(prompt.answer))
        assert value.isdigit()
        assert len(value) == 4
        assert text.endswith(value)
        assert text.count(value) == 2
        question = TOKENIZER.decode(list(ids[prompt.question :]))
        assert question.lstrip().startswith("Answer:" if task == "retrieval" else "Question:")
        depths.add(round(4 * prompt.needle[0] / prompt.question))
    assert depths == {0, 1, 2, 3, 4}
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert max(lengths[:5]) < min(lengths[5:10]) < max(lengths[5:10]) < min(lengths[10:])
    assert len(SIZES[task][1]) == 3
    assert prompts == copy_prompts((task,), 1, TOKENIZER, seed=0)[task] != copy_prompts((task,), 1, TOKENIZER, seed=1)


def measured(scores: list[list[float]]) -> Heads:
    rows = tuple(map(tuple, scores))
    return Heads(Provenance({}), len(rows), (TaskHeads("retrieval", 15, 9, rows),))


SCORES = [[0.0, 0.09], [0.5, 0.2], [0.0, 0.0], [0.9, 0.05], [0.1, 0.0], []]


def test_the_fewest_layers_hold_a_share_of_the_score() -> None:
    heads = measured(SCORES)
    assert heads.layer_scores == pytest.approx((0, 0.7, 0, 0.9, 0.1, 0))
    assert heads.layers_holding(0.5) == (3,)
    assert heads.layers_holding(0.9) == (1, 3)
    assert heads.layers_holding(1.0) == (1, 3, 4)
    assert heads.retrieval_heads == ((3, 0), (1, 0), (1, 1), (4, 0))
    assert measured([[0.05], [0.0]]).layers_holding(0.9) == ()
    assert heads.in_words().endswith("layers that hold 90% of it: prune.protect: [1, 3]")


@pytest.mark.prove
def test_heads_are_read_as_they_were_written_and_drawn(tmp_path: Path) -> None:
    heads = measured(SCORES)
    heads.save(tmp_path / Heads.FILE)
    assert Heads.load(tmp_path / Heads.FILE) == heads
    assert "4 of 10 heads copy 10% or more of what is asked for (9 of 15 retrieval right)" in heads.in_words()
    assert "Retrieval score" in save_figure(heads_figure(heads), tmp_path / "heads.svg").decode()
