"""How long samples become, and what is told of it."""

from __future__ import annotations

import itertools
import json
import logging
from typing import Literal

import numpy as np
import pytest

from shoal.data.repetition import Loop
from shoal.recipe import distill as recipe
from shoal.recipe.distill import OnPolicy
from shoal.train.generated import horizon as module
from shoal.train.generated.horizon import LEAST_TOKENS, Horizon
from shoal.train.generated.loops import Sample

END = 257


def horizon(*, loops: Literal["cut", "keep"] = "cut", **settings) -> Horizon:
    return Horizon(OnPolicy(loops=loops, horizon=recipe.Horizon(**{"start": 64, "max": 200} | settings)))


def clean(length: int, *, ends: bool = False) -> Sample:
    return Sample(0, 5, [*range(length - ends), *[END] * ends], None)


def looping(before: int, copies: int, period: int = 1) -> Sample:
    return Sample(0, 5, [*range(1000, 1000 + before), *list(range(period)) * copies], Loop(before, period))


def seen(state: Horizon, *samples: Sample) -> int:
    state.observe(samples, end_ids=(END,), step=0)
    return state.new_tokens


def test_the_horizon_is_the_exponential_mean_of_slack_times_the_quantile_of_effective_lengths():
    state, mean = horizon(start=40, max=100, quantile=0.6, slack=2.0), 40.0
    assert state.new_tokens == 40
    for step in range(6):
        lengths = [3, 20 + step, 30, 11]
        new_tokens = seen(state, looping(3, 9), clean(20 + step), clean(30, ends=True), looping(11, 3, 5))
        mean = 0.9 * mean + 0.1 * 2.0 * np.percentile(lengths, 60)
        assert new_tokens == int(np.ceil(mean))


def test_texts_that_fill_the_horizon_let_it_rise_to_max_and_loops_let_it_fall():
    state = horizon()
    rising = [seen(state, *[clean(state.new_tokens)] * 4) for _ in range(40)]
    assert all(one < other or one == 200 for one, other in itertools.pairwise([64, *rising]))
    assert rising[-1] == 200
    # as many texts that end by themselves need no more room than slack gives
    ended = [seen(state, *[clean(40, ends=True)] * 4) for _ in range(80)][-1]
    assert ended == pytest.approx(1.5 * 40, abs=1)
    falling = [seen(state, *[looping(2, state.new_tokens)] * 4) for _ in range(40)]
    assert all(one > other or other == LEAST_TOKENS for one, other in itertools.pairwise([ended, *falling]))
    assert falling[-1] == LEAST_TOKENS
    assert seen(horizon(start=8), looping(0, 8)) == 8, "a start below the least is the least"


def test_without_a_horizon_the_tokens_stay_and_the_curves_are_there():
    state = Horizon(OnPolicy(new_tokens=12))
    assert seen(state, looping(2, 10), clean(12), clean(9, ends=True), clean(5, ends=True)) == 12
    assert state.read_curves() == {
        "on_policy/horizon": 12.0,
        "on_policy/loop_rate": 0.25,
        "on_policy/end_rate": 0.5,
        "on_policy/kept_tokens": 4 + 12 + 9 + 5,
    }


def test_curves_are_over_the_steps_since_the_last_reading():
    state = horizon(start=20)
    assert state.read_curves() == {"on_policy/horizon": 20.0}
    seen(state, looping(2, 10), clean(12))
    seen(state, clean(20), clean(4, ends=True))
    curves = state.read_curves()
    assert curves["on_policy/loop_rate"] == curves["on_policy/end_rate"] == 0.25
    assert curves["on_policy/kept_tokens"] == (4 + 12 + 20 + 4) / 2
    assert state.read_curves() == {"on_policy/horizon": float(state.new_tokens)}
    kept = horizon(loops="keep")
    seen(kept, looping(2, 10))
    assert kept.read_curves()["on_policy/kept_tokens"] == 12


def test_a_state_that_was_saved_goes_on_as_if_nothing_had_happened(caplog):
    """In the middle of what is read together, and without the first step's warning once more."""
    ours, theirs = horizon(), horizon()
    texts = [[clean(64), looping(3, 9)], [clean(50), clean(7, ends=True)], [looping(1, 30), looping(5, 8)]]
    for of_step in texts[:2]:
        seen(ours, *of_step)
    caplog.clear()
    theirs.load_state(json.loads(json.dumps(ours.state())))
    assert seen(theirs, *texts[2]) == seen(ours, *texts[2])
    assert theirs.state() == ours.state()
    assert theirs.read_curves() == ours.read_curves()
    assert not caplog.records


def test_all_ranks_learn_from_the_texts_of_all(monkeypatch):
    texts = [clean(64), looping(3, 9), clean(30, ends=True), clean(11), looping(8, 3)]
    whole, facts = horizon(), []
    seen(whole, *texts)
    monkeypatch.setattr(module, "together", lambda own: facts.append(own()) or [own()])
    for part in (texts[:1], texts[1:]):
        seen(horizon(), *part)
    monkeypatch.setattr(module, "together", lambda _own: facts)
    for part in (texts[:1], texts[1:]):
        of_rank = horizon()
        seen(of_rank, *part)
        assert of_rank.state() == whole.state()


@pytest.mark.parametrize(("loops", "warns"), [(3, False), (4, True)])
def test_a_first_step_with_more_than_30_percent_loops_warns_and_later_ones_do_not(caplog, loops, warns):
    state = Horizon(OnPolicy(start=0.1))
    with caplog.at_level(logging.WARNING):
        state.observe([looping(2, 10)] * loops + [clean(5)] * (10 - loops), end_ids=(END,), step=6)
        if warns:
            assert "step 7, the first on what the student writes: 40 % of its texts end in a loop" in caplog.text
            assert "Raise distill.on_policy.start (now 0.1)" in caplog.text
        caplog.clear()
        state.observe([looping(2, 10)] * 10, end_ids=(END,), step=7)
    assert not caplog.records
    assert state.state()["num_steps"] == 2
