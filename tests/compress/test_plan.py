"""How layers are chosen, and which choices are refused.

Covers: shoal.compress.free_layers, shoal.compress.sweeps.columns.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import cases
from sweep_results import LOST, NUM_ITEMS, atlas, right, task
from sweep_results import importance as swept_importance

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance, Removal
from shoal.components import Component
from shoal.compress.free_layers import default_count
from shoal.compress.plan import Choice, choose_changes
from shoal.compress.sweeps.atlas import build_atlas
from shoal.compress.sweeps.columns import expected_sacrifice, joint_change
from shoal.errors import UserError
from shoal.recipe.prune import CutByScore, CutThese
from shoal.recipe.recipe import parse_recipe

CASES = cases(__file__)

NUM_LAYERS = 6
INFLUENCE = (0.9, 0.2, 0.1, 0.3, 0.1, 0.05)


def importance(num_layers: int = NUM_LAYERS, **runs: Any) -> Importance:
    """Angular scores that make the run starting at layer 2 the cheapest unprotected one, and the tail cheaper still."""
    angular = tuple(
        tuple(
            0.01 if start + length == num_layers else abs(start - 2) + 0.1 for start in range(num_layers - length + 1)
        )
        for length in range(1, num_layers + 1)
    )
    return Importance(
        Provenance({}), num_layers, 100, {"block_influence": INFLUENCE[:num_layers]}, {"angular": angular, **runs}
    )


def choose(scores: Importance | None = None, **prune: Any) -> tuple[tuple[int, ...], str]:
    settings = CutThese(**prune) if "drop" in prune else CutByScore(**prune)
    choice = choose_changes(settings, num_layers=NUM_LAYERS, importance=scores)
    return choice.drop, choice.reason


def test_explicit_list_is_sorted_and_needs_no_importance() -> None:
    assert choose(drop=(4, 1)) == ((1, 4), "2 of 6 layers named in the recipe")


def test_lowest_scores_go_first_and_equal_ones_by_lower_index() -> None:
    drop, reason = choose(importance(), num_drop=1)
    assert drop == (2,)
    assert choose(importance(), num_drop=3)[0] == (1, 2, 4)
    assert reason == "the 1 of 6 layers with the lowest block_influence (0.1 to 0.1); layers 0, 5 protected"


def test_protected_layers_stay_and_may_be_counted_from_the_end() -> None:
    assert choose(importance(), num_drop=2, protect=())[0] == (2, 5)
    assert choose(importance(), num_drop=2, protect=(2, -2))[0] == (1, 5)


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 1), (0.34, 2), (0.5, 3)])
def test_ratio_is_rounded_down(ratio: float, count: int) -> None:
    assert len(choose(importance(), ratio=ratio)[0]) == count


@pytest.mark.parametrize(("num_layers", "count"), [(30, 3), (36, 4), (16, 2), (6, 1), (3, 1)])
def test_an_eighth_goes_where_nothing_is_said(num_layers: int, count: int) -> None:
    assert default_count(num_layers) == count
    assert choose(importance())[0] == choose(importance(), num_drop=1)[0]


def test_a_run_longer_than_was_measured_is_refused() -> None:
    scores = importance(of_short_runs=((0.1,) * NUM_LAYERS, (0.2,) * (NUM_LAYERS - 1)))
    with pytest.raises(UserError, match=r"runs of up to 2 layers, but 3 are to be dropped; drop fewer, or choose"):
        choose(scores, num_drop=3, contiguous=True, metric="of_short_runs", protect=())


def test_contiguous_takes_the_cheapest_run_without_a_protected_layer() -> None:
    drop, reason = choose(importance(), num_drop=2, contiguous=True)
    assert drop == (2, 3)
    assert reason == "the run of 2 of 6 layers with the lowest angular (0.1) of 3 possible; layers 0, 5 protected"
    assert choose(importance(), num_drop=2, contiguous=True, protect=(2,))[0] == (4, 5)


@pytest.mark.parametrize(("prune", "message"), CASES["impossible"])
def test_impossible_choice_is_refused(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(importance(), **prune)


# --- columns of a sweep -------------------------------------------------------------------------------------------


@functools.cache
def swept() -> Importance:
    return swept_importance()


def change(scores: Importance | None = None, **prune: Any) -> Choice:
    return choose_changes(CutByScore(**prune), num_layers=NUM_LAYERS, importance=scores or swept())


@pytest.mark.parametrize("metric", ["knowledge_continuation", "knowledge/continuation", "knowledge"])
def test_a_swept_task_chooses_by_its_name_or_by_ability_and_protocol(metric: str) -> None:
    choice = change(num_drop=3, metric=metric, protect=(0,))
    assert choice.drop == (2, 3, 4)
    assert choice.reason == f"the 3 of 6 layers with the lowest {metric} (0 to 0); layer 0 protected"


def test_lower_is_better_columns_choose_what_raises_them_least() -> None:
    assert change(num_drop=2, metric="language/rolling").drop == (1, 3)


def test_a_name_that_was_not_swept_is_refused_with_the_closest_one() -> None:
    with pytest.raises(UserError, match=r"prune.metric=knowledge/generation: .* did you mean knowledge/continuation"):
        change(num_drop=1, metric="knowledge/generation")
    with pytest.raises(UserError, match=r"prune.metric.blok_influence: .* did you mean block_influence\?"):
        change(num_drop=1, metric={"blok_influence": 1.0})
    with pytest.raises(UserError, match=r"a task: in measure.sweep.tasks\) and measure again"):
        change(num_drop=1, metric="zzz")
    with pytest.raises(UserError, match=r"prune.spare: retreival: .* did you mean retrieval\?"):
        change(num_drop=1, spare=("retreival",))
    with pytest.raises(UserError, match=r"prune.spare: block_influence: .* name it in measure.sweep.tasks and measure"):
        change(num_drop=1, spare=("block_influence",))


def test_a_metric_of_several_mixes_ranks() -> None:
    """block_influence ranks 1 2 5 4 3 from layer 1 on (0.2 apart with 0 for the lowest); knowledge ties 2, 3 and 4."""
    influence = {1: 0.0, 2: 0.2, 5: 0.4, 4: 0.6, 3: 0.8, 0: 1.0}
    knowledge = {2: 0.2, 3: 0.2, 4: 0.2, 1: 0.6, 5: 0.8, 0: 1.0}
    mixed = {layer: 0.75 * influence[layer] + 0.25 * knowledge[layer] for layer in range(1, 6)}
    expected = sorted(mixed, key=lambda layer: mixed[layer])
    for count in range(1, 5):
        choice = change(num_drop=count, metric={"block_influence": 3.0, "knowledge": 1.0}, protect=(0,))
        assert choice.drop == tuple(sorted(expected[:count]))
        assert "lowest mean rank of 0.75 block_influence + 0.25 knowledge (" in choice.reason


# --- greedy orders ------------------------------------------------------------------------------------------------


def test_the_first_removals_of_an_order_go() -> None:
    choice = change(num_drop=2, metric="sleb", protect=())
    assert choice.drop == (0, 3)
    assert choice.reason == "the first 2 of 6 layers of the order of sleb (4 without them)"


def test_protected_layers_of_an_order_are_passed_over_and_told() -> None:
    choice = change(num_drop=2, metric="sleb")
    assert choice.drop == (1, 3)
    assert choice.reason == (
        "the first 2 of 6 layers of the order of sleb that may be dropped (1 passed over); layers 0, 5 protected"
    )


# --- what may not be spent ----------------------------------------------------------------------------------------


def test_spared_abilities_keep_their_critical_layers() -> None:
    """By block_influence the first to go are 1, 2, 5; retrieval needs 0 and 2, in writing also 4."""
    assert change(num_drop=2, protect=()).drop == (1, 2)
    choice = change(num_drop=2, protect=(), spare=("retrieval/continuation",))
    assert choice.drop == (1, 5)
    assert choice.reason.endswith("; layers 0, 2 protected; no significant loss on retrieval_continuation")
    assert change(num_drop=3, protect=(), spare=("retrieval/continuation",)).drop == (1, 4, 5)
    assert change(num_drop=3, protect=(), spare=("retrieval",)).drop == (1, 3, 5)
    with pytest.raises(UserError, match=r"only 3 of 6 are not protected .* shorten prune.protect or prune.spare"):
        change(num_drop=4, protect=(), spare=("retrieval",))


def creeping() -> Importance:
    """Each of layers 1 to 5 loses three other items of retrieval: none is critical alone, together they are."""
    variants = []
    for layer in range(NUM_LAYERS):
        scores = right(0.8, 60) if layer == 0 else right(0.8)
        scores[3 * layer : 3 * layer + 3] = 0.0
        variants.append([task(scores)])
    return replace(swept(), atlas=build_atlas([task(right(0.8))], variants))


def test_losses_that_are_small_alone_may_not_add_up() -> None:
    scores = creeping()
    assert scores.atlas is not None
    (column,) = scores.atlas.columns
    assert column.critical == (0,)
    assert joint_change(column, (1,)).high > 0 > joint_change(column, (1, 2, 3, 4)).high
    with pytest.raises(UserError, match=r"only 1|only 2|only 3") as refused:
        change(scores, num_drop=5, protect=(), spare=("retrieval",))
    assert (
        "can be dropped without a significant loss on retrieval_continuation (estimated from single removals)"
        in str(refused.value)
    )
    with pytest.raises(UserError, match="be dropped without a significant loss"):
        change(scores, num_drop=4, protect=(), contiguous=True, spare=("retrieval",))
    with pytest.raises(UserError, match="be dropped without a significant loss"):
        change(
            replace(scores, orders={"sleb": tuple(Removal(Component((layer,)), 0.0) for layer in range(1, 6))}),
            num_drop=5,
            metric="sleb",
            protect=(),
            spare=("retrieval",),
        )
    assert change(scores, num_drop=1, protect=(), spare=("retrieval",)).drop == (1,)


@pytest.mark.parametrize(("prune", "message"), CASES["contradicting"])
def test_recipes_that_contradict_themselves_are_refused(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"model": "m", "run_dir": "r", "prune": prune})


# --- what a plan costs --------------------------------------------------------------------------------------------


def test_joint_change_is_the_sum_with_the_interval_of_correlated_changes() -> None:
    column = atlas().columns[1]
    drop = (2, 4)
    found = joint_change(column, drop)
    changes = [column.effects[layer].change for layer in drop]
    assert found.value == pytest.approx(-(30 + 25) / NUM_ITEMS)
    lost = np.array([[i < LOST[column.task][layer] for i in range(NUM_ITEMS)] for layer in drop], dtype=float)
    rho = np.corrcoef(lost)[0, 1]
    down, up = [c.value - c.low for c in changes], [c.high - c.value for c in changes]
    assert found.low == pytest.approx(
        found.value - np.sqrt(down[0] ** 2 + down[1] ** 2 + 2 * rho * down[0] * down[1]), abs=1e-4
    )
    assert found.high == pytest.approx(
        found.value + np.sqrt(up[0] ** 2 + up[1] ** 2 + 2 * rho * up[0] * up[1]), abs=1e-4
    )
    alone = joint_change(column, (2,))
    assert (alone.low, alone.high) == pytest.approx((changes[0].low, changes[0].high))


def test_expected_sacrifice_names_every_column_and_the_critical_layers() -> None:
    head, *lines = expected_sacrifice(swept(), (2, 3))
    assert head.startswith("expected loss before distillation, added up over single removals (a rough")
    assert lines[0].startswith("  retrieval_continuation (continuation): 80.0 % -> 42.5 %, −37.5 points [−")
    assert lines[0].endswith("n = 80; critical here: layer 2")
    assert lines[2].startswith("  knowledge_continuation (continuation): 80.0 % -> 80.0 %, 0.0 points [")
    assert lines[2].endswith("n = 80; no significant loss")
    assert lines[3].startswith("  language_rolling (rolling): 2.500 -> 2.7")
    assert " nats_per_token, +0.2" in lines[3]
