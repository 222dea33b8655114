"""Plans by target: the lowest sum under every limit, over layers of unequal size, runs and orders.

Covers: shoal.compress.goals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from sweep_results import importance as swept_importance
from unequal_layers import LENGTH, OUTSIDE, PARAMETERS, SCORES, TOKEN_BYTES, sizes

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance, Removal
from shoal.components import Component
from shoal.compress.goals import Goal, Goals, TeacherTime, goals_of
from shoal.compress.plan import check_choice, choose_changes
from shoal.compress.sweeps.expected_loss import is_loss, joint_change
from shoal.compress.to_target import cheapest_layers
from shoal.errors import UserError
from shoal.recipe.prune import Prune
from shoal.recipe.recipe import parse_recipe


def prune_to(target: dict[str, Any], **prune: Any) -> Prune:
    return parse_recipe({"model": "m", "run_dir": "r", "prune": {"target": target, **prune}}).prune


def choose(target: dict[str, Any], scores: Importance | None = None, **prune: Any) -> tuple[tuple[int, ...], str]:
    settings = prune_to(target, **prune)
    goals = goals_of(settings.target, sizes())  # pyright: ignore[reportArgumentType]
    choice = choose_changes(settings, num_layers=6, importance=scores or measured(), goals=goals)
    return choice.drop, choice.reason


def measured(**changes: Any) -> Importance:
    return replace(Importance(Provenance({}), 6, 100, {"block_influence": SCORES}, {}), **changes)


def reached(target: dict[str, Any], drop: tuple[int, ...]) -> bool:
    """By the definition, from the tables above alone."""
    keep = [layer for layer in range(6) if layer not in drop]
    parameters = OUTSIDE + sum(PARAMETERS[layer] for layer in keep)

    def cache(layers: Any, batch: int, length: int) -> int:
        return batch * sum(TOKEN_BYTES[layer] * length or 16 for layer in layers)

    def read(layers: Any) -> int:
        weights = sum(PARAMETERS[layer] // (5 if PARAMETERS[layer] > 100 else 1) for layer in layers)
        return 2 * (OUTSIDE + weights) + cache(layers, 1, LENGTH)

    whole = read(range(6))
    memory = target.get("memory_gb")
    return (
        parameters <= target.get("params", parameters)
        and (not memory or 2 * parameters + cache(keep, memory["batch"], memory["length"]) <= memory["limit"] * 2**30)
        and Fraction(whole, read(keep)) >= Fraction(target.get("speedup", 0))
        and ("ms_per_token" not in target or 8 * read(keep) / whole <= target["ms_per_token"]["limit"])
    )


TARGETS: list[dict[str, Any]] = [
    {"params": 1200},
    {"params": 600},
    {"speedup": 1.25},
    {"memory_gb": {"limit": 2400 / 2**30, "batch": 3, "length": 50}},
    {"ms_per_token": {"limit": 6.5, "teacher": 8.0}},
    {"params": 1100, "speedup": 1.2},
    {
        "params": 1000,
        "speedup": 1.3,
        "memory_gb": {"limit": 2400 / 2**30, "batch": 3, "length": 50},
        "ms_per_token": {"limit": 6.0, "teacher": 8.0},
    },
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: "+".join(target))
@pytest.mark.parametrize("protect", [(), (0, -1)])
def test_the_plan_is_the_lowest_sum_of_all_cuts_that_reach_every_target(
    target: dict[str, Any], protect: tuple[int, ...]
) -> None:
    free = [layer for layer in range(6) if layer not in {p % 6 for p in protect}]
    cuts = [cut for size in range(6) for cut in itertools.combinations(free, size) if reached(target, cut)]
    if not cuts:
        with pytest.raises(UserError, match=r"^prune\.target\..*the nearest is "):
            choose(target, protect=list(protect))
        return
    drop, reason = choose(target, protect=list(protect))
    best = min(cuts, key=lambda cut: (sum(map(Fraction, (SCORES[layer] for layer in cut))), len(cut)))
    assert drop == best
    assert "of all that reach the target the lowest sum of block_influence" in reason


def test_the_reason_tells_what_is_reached_and_what_was_asked() -> None:
    _, reason = choose({"params": 1100, "ms_per_token": {"limit": 7, "teacher": 8}})
    assert "params 955 (at most 1,100), ms_per_token " in reason
    assert "for 1 sequence of 10 tokens, predicted from the teacher's 8 ms in the recipe (at most 7 ms)" in reason


@pytest.mark.parametrize(
    "target", [{"params": 300}, {"speedup": 4}, {"memory_gb": 5e-7}, {"ms_per_token": {"limit": 1, "teacher": 8}}]
)
def test_the_nearest_value_that_is_named_is_reached_and_a_little_more_is_not(target: dict[str, Any]) -> None:
    ((name, value),) = target.items()
    with pytest.raises(UserError, match=rf"prune.target.{name}: .* the nearest is ") as refused:
        choose(target)
    nearest = float(str(refused.value).split("the nearest is ")[1].split(" ")[0].rstrip(".").replace(",", ""))

    def asking(nearest: float) -> dict[str, Any]:
        given = value if isinstance(value, dict) else {"limit" if name != "speedup" else "factor": value}
        key = "factor" if "factor" in given else "limit"
        return {name: nearest} if name == "params" else {name: {**given, key: nearest}}

    assert choose(asking(nearest))[0] == (1, 2, 3, 4)
    with pytest.raises(UserError, match="the nearest is"):
        choose(asking(nearest * (1.01 if name == "speedup" else 0.99)))


def test_a_model_that_loses_all_layers_but_one_is_the_smallest() -> None:
    with pytest.raises(UserError, match=r"params: 200 is not reached by .*; the nearest is 240\. Set"):
        choose({"params": 200}, protect=[])
    assert choose({"params": 240}, protect=[])[0] == (0, 1, 2, 4, 5)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"params": 1265, "speedup": 1.1}, r"params: 1,265 is not below the model's 1,265"),
        ({"memory_gb": 1}, r"nothing has to go, because all of it holds already: memory_gb .* \(at most 1 GiB\)"),
        ({"ms_per_token": 3}, r"ms_per_token: needs the teacher's own time.*run `shoal eval` first.*teacher"),
    ],
)
def test_targets_that_say_nothing_about_the_model_are_refused(target: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(target)


def test_a_memory_limit_below_what_the_cache_takes_is_refused_with_weights_and_cache() -> None:
    cache = r"\(with all layers .* GiB of weights and .* of cache\)"
    with pytest.raises(UserError, match=rf"memory_gb: 0.001 GiB is not reached .* 1,000 tokens {cache}"):
        choose({"memory_gb": {"limit": 0.001, "batch": 10_000, "length": 1000}})


def test_memory_is_refused_where_the_cache_cannot_be_told() -> None:
    unknown = replace(sizes().cost, cache=None)
    target = prune_to({"memory_gb": 1}).target
    assert target is not None
    with pytest.raises(UserError, match=r"memory_gb: the cache of this family cannot be told"):
        goals_of(target, sizes(cost=unknown))


def test_a_measured_time_is_scaled_by_the_bytes_read_at_its_own_batch_and_length() -> None:
    target = prune_to({"ms_per_token": {"limit": 4.5, "batch": 4, "length": 30}}).target
    assert target is not None
    goals = goals_of(target, sizes(), teacher_time=TeacherTime(2.0, 1, LENGTH, "eval/speed.json"))
    whole, at_once = sizes().read(4, 30), sizes().read(1, LENGTH)
    assert goals.goals[0].value(whole) == pytest.approx(2.0 * whole / at_once, rel=1e-12)
    assert "predicted from the teacher's 2 ms in eval/speed.json" in goals.in_words(())


def line(asked: dict[str, Any], measured: TeacherTime | None = None) -> Goal:
    target = prune_to({"ms_per_token": {"length": LENGTH, **asked}}).target
    assert target is not None
    return goals_of(target, sizes(), teacher_time=measured).goals[0]


def test_two_measured_depths_tell_apart_what_does_not_shrink_with_the_layers() -> None:
    whole, third = sizes().read(1, LENGTH), sizes().at_depth(2).read(1, LENGTH)
    assert whole > third
    per_byte, fixed = 0.004, 1.5
    measured = TeacherTime(
        fixed + per_byte * whole, 1, LENGTH, "eval/speed.json (batch size 1)", (2, fixed + per_byte * third)
    )
    goal = line({"limit": fixed + per_byte * (whole - 300)}, measured)
    assert goal.value(whole) == pytest.approx(measured.milliseconds)
    assert goal.value(0) == pytest.approx(fixed)
    assert whole - 301 <= goal.limit <= whole - 300
    assert "ms in eval/speed.json (batch size 1) and " in goal.conditions
    # noise that puts the line's beginning below 0 leaves the whole model's time as it is
    steep = line({"limit": 1}, replace(measured, shallower=(2, 1e-6)))
    assert (steep.value(0), steep.value(whole)) == (0, pytest.approx(measured.milliseconds))
    with pytest.raises(UserError, match=r"2 of its 6 layers take .* no less; measure again on a quiet machine"):
        line({"limit": 1}, replace(measured, shallower=(2, measured.milliseconds)))


def test_a_given_time_may_say_what_no_layer_takes() -> None:
    whole = sizes().read(1, LENGTH)
    goal = line({"limit": 6, "teacher": 8, "fixed": 2})
    assert (goal.value(whole), goal.value(0), goal.value(whole // 2)) == (8, 2, pytest.approx(5, rel=0.01))
    assert "the teacher's 8 ms in the recipe, 2 of them fixed" in goal.conditions
    for wrong in ({"fixed": 2}, {"teacher": 2, "fixed": 2}):
        with pytest.raises(UserError, match=r"fixed: 2\.0 ms are part of the teacher's"):
            prune_to({"ms_per_token": {"limit": 6, **wrong}})


def test_what_is_out_of_reach_is_refused_before_anything_is_measured() -> None:
    settings = prune_to({"params": 300})
    assert settings.target is not None
    goals = goals_of(settings.target, sizes())
    with pytest.raises(UserError, match="the nearest is 310"):
        check_choice(settings, num_layers=6, goals=goals)
    check_choice(
        prune_to({"params": 320}), num_layers=6, goals=replace(goals, goals=(replace(goals.goals[0], limit=320),))
    )


def test_edits_that_remove_layers_save_too() -> None:
    target = prune_to({"params": 900}).target
    assert target is not None
    goals = goals_of(target, sizes(), removed=(2,))
    assert goals.needs == (sizes().cost.num_parameters - 310 - 900,)
    settings = prune_to({"params": 900}, edits=[{"kind": "merge", "layers": [1, 2]}])
    choice = choose_changes(settings, num_layers=6, importance=measured(), goals=goals)
    assert choice.drop == (2, 4)


def test_all_runs_are_tried() -> None:
    rows = tuple(tuple(1.0 if start == 1 else 2.0 - 0.1 * start + n for start in range(7 - n)) for n in (1, 2, 3, 4))
    scores = measured(runs={"angular": rows})
    target = {"params": 1000}
    runs = {
        tuple(range(start, start + n)): rows[n - 1][start]
        for n in (1, 2, 3, 4)
        for start in range(7 - n)
        if not {0, 5} & set(range(start, start + n)) and reached(target, tuple(range(start, start + n)))
    }
    best = min(runs, key=lambda run: (runs[run], len(run), run))
    drop, reason = choose(target, scores, contiguous=True)
    assert drop == best
    assert "the lowest angular (1) that reaches the target" in reason
    with pytest.raises(UserError, match=r"params: 400 is not reached by any run .* the nearest is 655"):
        choose({"params": 400}, replace(scores, runs={"angular": rows[:2]}), contiguous=True)


def test_an_order_gives_its_shortest_prefix_that_reaches_all() -> None:
    order = tuple(Removal(Component((layer,)), 3.0) for layer in (3, 0, 1, 4, 2))
    scores = measured(orders={"sleb": order})
    assert choose({"params": 1225}, scores, metric="sleb")[0] == (3,)
    drop, reason = choose({"params": 1224}, scores, metric="sleb")
    assert drop == (1, 3)
    assert "the order of sleb that may go (1 passed over)" in reason
    with pytest.raises(
        UserError,
        match=r"4 removals of the order of sleb that may go .raise measure.num_drop for more.; the nearest is 310",
    ):
        choose({"params": 300}, scores, metric="sleb")


def test_of_halves_only_whole_layers_save() -> None:
    halves = [(2, "attention"), (1, "mlp"), (2, "mlp"), (1, "attention")]
    order = tuple(Removal(Component((layer,), part), 3.0) for layer, part in halves)  # pyright: ignore[reportArgumentType]
    settings = prune_to({"params": 1000}, metric="blockpruner")
    assert settings.target is not None
    goals = goals_of(settings.target, sizes())
    choice = choose_changes(settings, num_layers=6, importance=measured(orders={"blockpruner": order}), goals=goals)
    assert choice.drop == (2,)
    assert [edit.kind for edit in choice.edits] == ["skip_mlp"]


@pytest.mark.parametrize("tight", [1170, 1000, 900])
def test_what_is_spared_is_the_lowest_sum_without_a_significant_loss(tight: int) -> None:
    scores = replace(swept_importance(), layers={"block_influence": SCORES})
    assert scores.atlas is not None
    columns = tuple(scores.atlas.of("knowledge"))
    critical = {layer for column in columns for layer in column.critical}
    free = [layer for layer in range(1, 5) if layer not in critical]
    cuts = [
        cut
        for size in range(1, 5)
        for cut in itertools.combinations(free, size)
        if reached({"params": tight}, cut) and not any(is_loss(c, joint_change(c, cut)) for c in columns)
    ]
    best = min(cuts, key=lambda cut: sum(Fraction(SCORES[layer]) for layer in cut))
    assert choose({"params": tight}, scores, spare=["knowledge"])[0] == best


def test_the_next_cheapest_plans_are_tried_until_one_spares_what_is_to_be_spared() -> None:
    target = prune_to({"params": 930}).target
    assert target is not None
    goals, free = goals_of(target, sizes()), (1, 2, 3, 4)

    def spends(layers: Sequence[int]) -> bool:
        return {2, 3} <= {*layers} or {1, 3} <= {*layers}

    cuts = [cut for size in range(5) for cut in itertools.combinations(free, size) if reached({"params": 930}, cut)]
    by_sum = sorted(cuts, key=lambda cut: sum(Fraction(SCORES[layer]) for layer in cut))
    assert spends(by_sum[0])
    assert cheapest_layers(SCORES, free, goals, spends) == next(cut for cut in by_sum if not spends(cut))
    with pytest.raises(UserError, match=r"^prune.spare: no plan that reaches prune.target goes without"):
        cheapest_layers(SCORES, free, goals, lambda _: True)


def test_scores_below_zero_do_not_drop_layers_that_no_target_needs() -> None:
    gains = measured(layers={"block_influence": (0.5, 0.5, -0.2, -0.1, -0.3, 0.5)})
    assert choose({"params": 960}, gains)[0] == (4,)


def test_goals_are_reached_to_the_unit() -> None:
    target = prune_to({"params": 960}).target
    assert target is not None
    goals: Goals = goals_of(target, sizes())
    assert goals.reached((4,))
    assert not replace(goals, goals=(replace(goals.goals[0], limit=959),)).reached((4,))


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"num_drop": 2}, r"prune.target: says how much goes, and so does prune.num_drop"),
        ({"ratio": 0.5}, r"prune.target: says how much goes, and so does prune.ratio"),
        ({"drop": [1]}, r"prune.target: has no effect beside prune.drop"),
    ],
)
def test_another_amount_beside_a_target_is_refused(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_to({"params": 100}, **prune)


def test_a_target_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="names nothing to reach; give params, memory_gb, ms_per_token or speedup"):
        prune_to({})
