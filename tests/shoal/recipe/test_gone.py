"""A key of an older recipe is answered with what to write now."""

from __future__ import annotations

import pytest

from shoal.errors import UserError
from shoal.recipe import gone
from shoal.recipe.recipe import parse_recipe


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ({"prune": {"leaves": 3}}, "prune.leaves"),
        ({"distill": {"losses": [{"kind": "phlogiston"}]}}, "distill.losses.phlogiston"),
        ({"distill": {"trainable": "by_magic"}}, "distill.trainable.by_magic"),
    ],
)
def test_a_removed_key_kind_or_value_says_since_when_and_what_instead(
    raw: dict, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gone.GONE, place, "write something else")
    with pytest.raises(UserError, match=r"removed before 0\.1; write something else") as refused:
        parse_recipe({"model": "demo:smollm2-135m", **raw})
    assert len(str(refused.value).splitlines()) == 1


def test_a_row_is_one_sentence_that_names_a_remedy() -> None:
    assert list(gone.GONE) == sorted(gone.GONE)
    for place, words in gone.GONE.items():
        if "/" not in place:  # a file's name, which is looked for later
            with pytest.raises(UserError):
                parse_recipe({"model": "demo:smollm2-135m", **_said(place)})
        assert not words.endswith("."), place


def _said(place: str) -> dict:
    first, *rest = place.split(".")
    value: object = 1
    for key in reversed(rest):
        value = {key: value}
    return {first: value}
