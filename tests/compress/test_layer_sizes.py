"""What layers are said to take is what the student written without them takes, by its files and by its modules.

Plans by target: as few layers, in the order of the metric, as reach every limit.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from sweep_results import importance as swept_importance
from tiny import tiny_checkpoint
from unequal_layers import LENGTH, OUTSIDE, PARAMETERS, SCORES, TOKEN_BYTES, sizes

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance, Removal
from shoal.artifacts.plan import Plan
from shoal.components import Component
from shoal.compress.apply import apply_plan
from shoal.compress.layer_sizes import LayerSizes, goals_of, layer_sizes
from shoal.compress.plan import choose_changes, stand_in
from shoal.errors import UserError
from shoal.models.checkpoint_files import read_shards
from shoal.models.load import load_model
from shoal.recipe.recipe import parse_recipe

DROP = (1, 3)
UNLIKE = ("deepseek_v3", "qwen3_next", "nemotron_h", "jamba", "lfm2_moe")
"""Families whose layers differ: a dense first layer, experts, linear attention, state spaces, layers without cache."""


def written(teacher: Path, out: Path, num_layers: int, drop: tuple[int, ...] = DROP) -> int:
    """Bytes of the tensors in the files of a student without these layers."""
    apply_plan(teacher, Plan(Provenance({}), num_layers, drop, "named by the test"), out)
    return sum(tensor.end - tensor.start for shard in read_shards(out) for tensor in shard.tensors.values())


def left(sizes: LayerSizes, layers: tuple[int, ...], whole: int) -> int:
    return whole - sum(layers[layer] for layer in DROP)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNLIKE)
def test_sizes_of_unlike_layers_are_those_of_the_students_files(family: str, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    architectures.tiny_model(family).save_pretrained(teacher)
    sizes = layer_sizes(teacher)
    num_bytes = written(teacher, tmp_path / "student", sizes.num_layers)
    student = layer_sizes(tmp_path / "student")
    assert len(set(sizes.layer_parameters)) > 1
    keep = [layer for layer in range(sizes.num_layers) if layer not in DROP]
    assert sizes.stored.of(keep) == num_bytes
    assert left(sizes, sizes.layer_parameters, sizes.cost.num_parameters) == student.cost.num_parameters
    for batch_size, num_tokens in ((1, 20), (3, 60)):
        read = tuple(sizes.layer_read(layer, batch_size, num_tokens) for layer in range(sizes.num_layers))
        assert left(sizes, read, sizes.read(batch_size, num_tokens)) == student.read(batch_size, num_tokens)
        cache = tuple(batch_size * sizes.layer_cache(layer, num_tokens) for layer in range(sizes.num_layers))
        assert left(sizes, cache, sizes.cache(batch_size, num_tokens)) == student.cache(batch_size, num_tokens)


def test_a_layer_takes_its_slices_of_the_tensors_that_hold_one_for_every_layer(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    architectures.tiny_model("gemma3n_text").save_pretrained(teacher)
    sizes, drop = layer_sizes(teacher), (0, 1)
    assert sizes.stored.of(range(2, 6)) == written(teacher, tmp_path / "student", sizes.num_layers, drop)
    student = layer_sizes(tmp_path / "student").cost
    for own, whole, rest in (
        (sizes.layer_parameters, sizes.cost.num_parameters, student.num_parameters),
        (sizes.layer_active, sizes.cost.active_parameters, student.active_parameters),
    ):
        assert whole - sum(own[layer] for layer in drop) == rest


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
def test_sizes_are_those_of_the_loaded_student(family: str, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    sizes = layer_sizes(teacher)
    num_bytes = written(teacher, tmp_path / "student", sizes.num_layers)
    parameters = sum(parameter.numel() for parameter in load_model(tmp_path / "student").parameters())
    assert left(sizes, sizes.layer_parameters, sizes.cost.num_parameters) == parameters
    keep = [layer for layer in range(sizes.num_layers) if layer not in DROP]
    assert (sizes.stored.of(keep), num_bytes) == (2 * parameters, 2 * parameters)


# --- targets ------------------------------------------------------------------------------------------------------


def prune_to(target: dict[str, Any], **prune: Any) -> Any:
    return parse_recipe({"model": "m", "run_dir": "r", "prune": {"target": target} | prune}).prune


def choose(target: dict[str, Any], scores: Importance | None = None, **prune: Any) -> tuple[tuple[int, ...], str]:
    settings = prune_to(target, **prune)
    goals = goals_of(settings.target, sizes())
    choice = choose_changes(settings, num_layers=6, importance=scores or measured(), goals=goals)
    return choice.drop, choice.reason


def measured(**changes: Any) -> Importance:
    return replace(Importance(Provenance({}), 6, 100, {"block_influence": SCORES}, {}), **changes)


def reached(target: dict[str, Any], drop: tuple[int, ...]) -> bool:
    """By the definition, from the tables of the model alone."""
    keep = [layer for layer in range(6) if layer not in drop]
    parameters = OUTSIDE + sum(PARAMETERS[layer] for layer in keep)

    def cache(layers: Any, batch: int, length: int) -> int:
        return batch * sum(TOKEN_BYTES[layer] * length or 16 for layer in layers)

    def read(layers: Any) -> int:
        weights = sum(PARAMETERS[layer] // (5 if PARAMETERS[layer] > 100 else 1) for layer in layers)
        return 2 * (OUTSIDE + weights) + cache(layers, *served)

    served = target.get("batch_size", 1), target.get("sequence_length", LENGTH)
    memory = target.get("memory_gb")
    return (
        parameters <= target.get("params", parameters)
        and (not memory or 2 * parameters + cache(keep, *served) <= memory * 2**30)
        and Fraction(read(range(6)), read(keep)) >= Fraction(target.get("speedup", 0))
    )


MEMORY = {"memory_gb": 2400 / 2**30, "batch_size": 3, "sequence_length": 50}


@pytest.mark.parametrize(
    "target",
    [
        {"params": 1200},
        {"params": 600},
        {"speedup": 1.25},
        MEMORY,
        {**MEMORY, "speedup": 1.2},
        {"params": 1100, "speedup": 1.2},
    ],
    ids=lambda target: "+".join(target),
)
@pytest.mark.parametrize("protect", [(), (0, -1)])
def test_the_plan_is_the_shortest_beginning_of_the_order_that_reaches_every_target(
    target: dict[str, Any], protect: tuple[int, ...]
) -> None:
    order = sorted(set(range(6)) - {layer % 6 for layer in protect}, key=SCORES.__getitem__)
    prefixes = [tuple(sorted(order[:count])) for count in range(1, min(len(order), 5) + 1)]
    expected = next((prefix for prefix in prefixes if reached(target, prefix)), None)
    if expected is None:
        with pytest.raises(UserError, match=r"^prune\.target: is not reached by .*; the nearest is "):
            choose(target, protect=list(protect))
        return
    drop, reason = choose(target, protect=list(protect))
    assert drop == expected
    assert ", for " in reason
    assert "(asked: " in reason


def test_runs_and_orders_reach_a_target_too() -> None:
    runs = ((0.1, 0.5, 0.6, 0.2, 0.7, 0.3), (0.5, 0.6, 0.4, 0.8, 0.9), (0.9, 0.7, 0.8, 0.95))
    drop, _ = choose({"params": 700}, measured(runs={"angular": runs}), contiguous=True, protect=[0, -1])
    assert drop == (1, 2), "no single layer does, and 2, 3, which are cheaper, do not"
    removals = tuple(Removal(Component((layer,)), 0.1 * layer) for layer in (3, 0, 2, 1))
    scores = measured(orders={"sleb": removals})
    assert choose({"params": 920}, scores, metric="sleb", protect=[0])[0] == (2, 3)
    with pytest.raises(UserError, match=r"the 3 removals of the order of sleb"):
        choose({"params": 500}, scores, metric="sleb", protect=[0])


def test_what_is_spared_is_passed_over() -> None:
    swept = swept_importance()
    goals = goals_of(prune_to({"params": 1200}).target, sizes())
    assert swept.num_layers == 6
    settings = prune_to({"params": 1200}, metric="block_influence", spare=["retrieval"])
    scores = replace(swept, layers={"block_influence": SCORES})
    choice = choose_changes(settings, num_layers=6, importance=scores, goals=goals)
    assert "no significant loss on" in choice.reason
    assert goals.reached(choice.drop)


def test_a_stand_in_reaches_the_target_before_there_are_scores() -> None:
    settings = prune_to({"params": 800})
    goals = goals_of(settings.target, sizes())
    assert stand_in(settings, num_layers=6, goals=goals).drop == (2, 3, 4)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"params": 1265}, r"is reached without dropping a layer: params 1,265"),
        ({"memory_gb": 1}, r"is reached without dropping a layer: memory_gb .* \(asked: 1\)"),
    ],
)
def test_a_target_that_the_model_reaches_is_refused(target: dict[str, Any], message: str) -> None:
    assert choose(target | {"speedup": 1.1})[0]
    with pytest.raises(UserError, match=message):
        choose(target)


def test_what_no_choice_reaches_is_refused_before_anything_is_measured() -> None:
    settings = prune_to({"params": 200}, protect=[])
    goals = goals_of(settings.target, sizes())
    with pytest.raises(UserError, match=r"is not reached by dropping every layer that may be dropped; the nearest is"):
        stand_in(settings, num_layers=6, goals=goals)
    unknown = replace(sizes(), cost=replace(sizes().cost, cache=None))
    memory = prune_to({"memory_gb": 1}).target
    with pytest.raises(UserError, match=r"memory_gb: the cache of this family is only known by running it"):
        goals_of(memory, unknown)


def test_another_amount_beside_a_target_is_refused() -> None:
    with pytest.raises(UserError, match=r"prune: num_drop and target exclude each other; give one of them"):
        prune_to({"params": 100}, num_drop=2)
    with pytest.raises(UserError, match=r"prune.target: batch_size and sequence_length need memory_gb or speedup"):
        prune_to({"params": 100, "batch_size": 2})
