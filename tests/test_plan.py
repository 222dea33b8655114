"""How layers are chosen, and which choices are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.artifact import Importance, Provenance
from shoal.compress.plan import check_choice, choose_layers
from shoal.edits import Merge, SkipAttention
from shoal.errors import UserError
from shoal.recipe import Prune

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
    return choose_layers(Prune(**prune), num_layers=NUM_LAYERS, importance=scores)


def test_explicit_list_is_sorted_and_needs_no_importance() -> None:
    assert choose(drop=(4, 1)) == ((1, 4), "2 of 6 layers named in the recipe")


def test_explicit_list_overrides_the_default_protection_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    drop, reason = choose(drop=(5, 0))
    assert drop == (0, 5)
    assert reason.endswith("among them layers 0, 5, which an automatic choice would protect")
    assert "layers 0, 5" in caplog.text


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


def test_ratio_is_not_rounded_down_by_floating_point() -> None:
    scores = Importance(Provenance({}), 100, 1, {"block_influence": tuple(float(i) for i in range(100))}, {})
    drop, _ = choose_layers(Prune(ratio=0.29), num_layers=100, importance=scores)
    assert len(drop) == 29


def test_contiguous_takes_the_cheapest_run_without_a_protected_layer() -> None:
    drop, reason = choose(importance(), num_drop=2, contiguous=True)
    assert drop == (2, 3)
    assert reason == "the run of 2 of 6 layers with the lowest angular (0.1) of 3 possible; layers 0, 5 protected"
    assert choose(importance(), num_drop=2, contiguous=True, protect=(2,))[0] == (4, 5)


def test_a_metric_of_runs_can_choose_single_layers() -> None:
    assert choose(importance(), num_drop=2, metric="angular")[0] == (1, 2)


def test_importance_read_from_disk_gives_the_same_choice(tmp_path: Path) -> None:
    importance().write(tmp_path / "importance.json")
    loaded = Importance.read(tmp_path / "importance.json")
    for prune in ({"num_drop": 3}, {"num_drop": 3, "contiguous": True}):
        assert choose(loaded, **prune) == choose(importance(), **prune)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"drop": ()}, r"prune.drop: is empty"),
        ({"drop": (-1,)}, r"prune.drop: -1 is negative; .* the last one is 5"),
        ({"drop": (6,)}, r"prune.drop: 6 is no layer of this model; its layers are 0..5"),
        ({"drop": (2, 2)}, r"prune.drop: names layer 2 twice"),
        ({"drop": tuple(range(6))}, r"prune.drop: names all 6 layers; keep at least one"),
        ({"drop": (1, 2), "protect": (2,)}, r"names layer 2, which prune.protect=\[2\] forbids"),
        ({"protect": (9,), "num_drop": 1}, r"prune.protect: 9 is no layer of this model"),
        ({}, r"give prune.drop, prune.num_drop, prune.ratio or prune.edits"),
        ({"ratio": 0.1}, r"prune.ratio=0.1: is less than one of 6 layers; give at least 0.167"),
        ({"num_drop": 6}, r"prune.num_drop=6: would drop all 6 layers; drop at most 5"),
        ({"num_drop": 5}, r"asks to drop 5 layers, but only 4 of 6 are not protected \(\[0, 5\]\)"),
        (
            {"num_drop": 4, "protect": (3,), "contiguous": True},
            r"no run of 4 .* protected layers \[3\]; the longest has 3",
        ),
        ({"num_drop": 1, "metric": "block_influense"}, r"is not in importance.json; did you mean block_influence\?"),
        ({"num_drop": 1, "metric": "xyz"}, r"it has angular or block_influence. To add it, name it in measure.metrics"),
        (
            {"num_drop": 1, "metric": "block_influence", "contiguous": True},
            r"needs a metric of runs; use angular, or set",
        ),
    ],
)
def test_impossible_choice_is_refused(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(importance(), **prune)


def test_automatic_choice_without_importance_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs importance.json; run `shoal measure` first"):
        choose(num_drop=2)


def test_importance_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"was measured on a model of 4 layers, this one has 6"):
        choose(importance(4), num_drop=1)


MERGE = Merge("merge", (2, 3))
SKIP = SkipAttention("skip_attention", (1,))


def test_layers_that_a_merge_takes_in_are_dropped_and_told() -> None:
    assert choose(edits=(MERGE, SKIP)) == (
        (3,),
        "layers 2, 3 merged into one (laco); attention of layer 1 zeroed",
    )
    drop, reason = choose(drop=(5,), edits=(MERGE,))
    assert drop == (3, 5)
    assert (
        reason
        == "1 of 6 layers named in the recipe, among them layer 5, which an automatic choice would protect"
        + ("; layers 2, 3 merged into one (laco)")
    )


def test_edited_layers_are_not_chosen_automatically() -> None:
    assert choose(importance(), num_drop=2)[0] == (2, 4)
    assert choose(importance(), num_drop=2, edits=(SkipAttention("skip_attention", (2,)),))[0] == (1, 4)
    assert choose(importance(), num_drop=1, contiguous=True, edits=(MERGE,))[0] == (1, 3)


def test_empty_drop_list_is_no_mistake_beside_edits() -> None:
    assert choose(drop=(), edits=(SKIP,)) == ((), "attention of layer 1 zeroed")


def test_edits_that_this_model_cannot_take_are_refused() -> None:
    with pytest.raises(UserError, match=r"prune.edits.1: 6 is no layer of this model; its layers are 0..5"):
        choose(edits=(SKIP, SkipAttention("skip_attention", (6,))))
    with pytest.raises(UserError, match=r"drop and edits together remove all 6 layers"):
        choose(drop=(0, 1, 2, 3, 4), edits=(Merge("merge", (4, 5)),))
    check_choice(Prune(edits=(SKIP,)), num_layers=NUM_LAYERS)
    with pytest.raises(UserError, match=r"1 is no layer"):
        check_choice(Prune(edits=(SKIP,)), num_layers=1)
