"""What edits mean for a plan, and which lists of edits contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import UserError
from shoal.recipe.edits import contradictions, edited_layers, first_change, in_words, insertions, removed_layers
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import as_dict

BASE = {"model": "m", "run_dir": "d"}


def edits_of(*raw: dict[str, Any]) -> Any:
    return parse_recipe({**BASE, "prune": {"edits": raw}}).prune.edits


SKIP = {"kind": "skip_attention", "layers": [3, 1]}
MASK = {"kind": "head_mask", "layer": 2, "heads": [0, 5]}
MERGE = {"kind": "merge", "layers": [4, 5, 6]}
REPLACE = {"kind": "replace", "layers": [8, 9]}
INSERT = {"kind": "insert", "after": [7, 2]}
SWAP = {"kind": "swap", "layers": [7], "donor": "other", "weight": 0.5, "parts": ["head"]}


def test_merges_and_replacements_remove_all_but_their_first_layer() -> None:
    edits = edits_of(SKIP, REPLACE, MERGE)
    assert removed_layers(edits) == (5, 6, 9)
    assert [edited_layers(edit) for edit in edits] == [(3, 1), (8, 9), (4, 5, 6)]


def test_first_change_is_the_lowest_layer_that_is_not_the_teachers() -> None:
    assert first_change((5,), edits_of(SKIP)) == 1
    assert first_change((0,), edits_of(SKIP)) == 0
    assert first_change((5,), ()) == 5
    assert first_change((), edits_of(MASK, SWAP)) == 2
    assert first_change((), edits_of(INSERT)) == 3  # where the first new one stands
    assert first_change((5,), edits_of({**SWAP, "parts": ["embeddings"]})) == 0


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (SKIP, "attention of layers 3, 1 zeroed"),
        ({"kind": "skip_mlp", "layers": [3]}, "MLP of layer 3 zeroed"),
        (MASK, "heads 0, 5 of layer 2 zeroed"),
        ({"kind": "kv_group_mask", "layer": 2, "groups": [1]}, "key-value groups 1 of layer 2 zeroed"),
        (SWAP, "layer 7 and head swapped with other at weight 0.5"),
        (MERGE, "layers 4, 5, 6 merged into one (laco)"),
        (REPLACE, "layers 8, 9 replaced by one trained layer"),
        ({**REPLACE, "init": "lesa"}, "layers 8, 9 replaced by one trained layer (started from lesa)"),
        (INSERT, "2 new after layers 7, 2 (zero)"),
    ],
)
def test_edit_in_words(edit: dict[str, Any], words: str) -> None:
    assert in_words(edits_of(edit)[0]) == words


def test_insertions_are_told_in_order_and_remove_nothing() -> None:
    edits = edits_of(INSERT, {**INSERT, "after": [4], "init": "copy"}, SKIP)
    assert insertions(edits) == (2, 4, 7)
    assert removed_layers(edits) == ()
    assert list(contradictions(edits_of(INSERT), (2,))) == [
        "0.after: names layer 2, which prune.drop removes; take it out of one of them"
    ]


def test_a_replacement_that_starts_as_it_always_did_is_the_same_edit_as_ever() -> None:
    """Results of before have no `init`, and stand."""
    assert "init" not in as_dict(edits_of(REPLACE)[0])
    assert as_dict(edits_of({**REPLACE, "init": "mean"})[0])["init"] == "mean"


def test_different_edits_may_share_a_layer() -> None:
    raw = (SKIP, {"kind": "skip_mlp", "layers": [1]}, {**SWAP, "layers": [1]}, {**MASK, "layer": 1})
    assert len(edits_of(*raw)) == 4


def test_edits_survive_a_round_trip_through_json() -> None:
    edits = edits_of(SKIP, MASK, MERGE, REPLACE, SWAP, INSERT)
    prune = parse_recipe({**BASE, "prune": {"edits": edits}}).prune
    assert edits_of(*as_dict(prune)["edits"]) == edits


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        ([{"kind": "merge", "layers": [4, 6]}], r"edits\.0\.layers: must be neighbours in increasing order"),
        ([{"kind": "replace", "layers": [5, 4]}], r"edits\.0\.layers: must be neighbours in increasing order"),
        ([{"kind": "replace", "layers": [5]}], r"edits\.0\.layers: must have at least 2 items"),
        ([{"kind": "skip_mlp", "layers": [4, 4]}], r"edits\.0\.layers: names 4 twice"),
        ([{**INSERT, "after": [3, 3]}], r"edits\.0\.after: names 3 twice"),
        ([INSERT, {**INSERT, "after": [2]}], r"edits\.1\.after: names layer 2, as insert at 0 does"),
        ([MERGE, {**INSERT, "after": [5]}], r"edits\.1\.after: names layer 5, as merge at 0 does"),
        ([{**INSERT, "init": "random"}], r"edits\.0\.init: must be 'zero', 'copy', 'mean' or 'lesa'"),
        ([{**MASK, "heads": [1, 1]}], r"edits\.0\.heads: names 1 twice"),
        ([{"kind": "kv_group_mask", "layer": 1, "groups": [0, 0]}], r"edits\.0\.groups: names 0 twice"),
        ([MERGE, {"kind": "skip_mlp", "layers": [6]}], r"edits\.1\.layers: names layer 6, as merge at 0 does"),
        ([SKIP, {**SKIP, "layers": [3]}], r"edits\.1\.layers: names layer 3, as skip_attention at 0 does"),
        (
            [SKIP, {"kind": "skip_mlp", "layers": list(SKIP["layers"])}, SKIP],
            r"edits\.2\.layers: names layer \d, as skip_attention at 0 does",
        ),
        (
            [{**SWAP, "layers": [1], "parts": ["norm"]}, {**SWAP, "layers": [2], "parts": ["norm"]}],
            r"edits\.1\.parts: names norm, as swap at 0 does; name it once",
        ),
        ([{**MERGE, "weights": [1, 0, 0]}], r"edits\.0\.weights: have no effect on laco"),
        ([{**MERGE, "method": "weighted", "weights": [0.5, 0.5]}], r"edits\.0\.weights: 2 for 3 layers"),
        ([{**MERGE, "method": "weighted", "weights": [0.5, 0.5, 0.5]}], r"edits\.0\.weights: add up to 1.5"),
        (
            [{"kind": "skip", "layers": [1]}],
            r"edits\.0\.kind: must be one of .*'skip_attention'.*\(got 'skip'; did you mean 'skip_mlp'\?\)",
        ),
        ([{"layers": [1]}], r"edits\.0: needs a kind"),
        ([{**SKIP, "laiers": [1]}], r"edits\.0\.laiers: unknown key; did you mean 'layers'\?"),
        ([{"kind": "swap", "layers": [1]}], r"edits\.0\.donor: is required"),
        ([{**SWAP, "parts": ["tail"]}], r"edits\.0\.parts\.0: must be 'embeddings', 'norm' or 'head' \(got 'tail'\)"),
        ([{**REPLACE, "num_tokens": 0}], r"edits\.0\.num_tokens: must be greater than 0"),
    ],
)
def test_edits_that_contradict_themselves_are_refused(edits: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe: prune\.{problem}"):
        parse_recipe({**BASE, "prune": {"edits": edits}})


def test_edit_of_a_dropped_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"prune\.edits\.0\.layers: names layer 3, which prune\.drop removes"):
        parse_recipe({**BASE, "prune": {"drop": [3], "edits": [SKIP]}})
    assert list(contradictions(edits_of(SKIP), (2,))) == []
