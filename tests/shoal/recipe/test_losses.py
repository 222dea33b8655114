"""Settings of loss terms: how a recipe names them, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from cases import cases

from shoal.errors import UserError
from shoal.recipe.losses import (
    JSD,
    KINDS,
    LOGIT_TERMS,
    TAID,
    CrossEntropy,
    ForwardKL,
    HiddenStates,
    LossTerm,
    contradictions,
    needs_teacher,
    term_names,
)
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import as_dict

CASES = cases(__file__)


def losses(*terms: dict[str, Any]) -> tuple[LossTerm, ...]:
    return parse_recipe({"model": "m", "run_dir": "r", "distill": {"losses": list(terms)}}).distill.losses


@pytest.mark.slow
def test_every_kind_is_read_from_a_recipe_with_its_defaults_and_written_back() -> None:
    kinds = (*LOGIT_TERMS, HiddenStates)
    assert [term().kind for term in kinds] == list(KINDS)
    assert len(set(KINDS)) == len(kinds) == 8
    for term, kind in zip(kinds, KINDS, strict=True):
        (read,) = losses({"kind": kind})
        assert read == term()
        assert losses(as_dict(read)) == (read,)


def test_forward_kl_is_the_default() -> None:
    assert parse_recipe({"model": "m", "run_dir": "r"}).distill.losses == (ForwardKL(),)


@pytest.mark.parametrize(("term", "message"), CASES)
def test_wrong_term_is_refused_with_its_path_and_remedy(term: dict[str, Any], message: str) -> None:
    kinds = ", ".join(KINDS if message.startswith("losses.0:") else map(repr, KINDS))
    with pytest.raises(UserError) as refused:
        losses(term)
    assert str(refused.value) == f"recipe: distill.{message.replace('KINDS', kinds)}"


def test_one_term_given_twice_is_refused_and_two_of_one_kind_are_not() -> None:
    twice = contradictions((ForwardKL(), CrossEntropy(), ForwardKL(weight=0.5)), "here")
    assert twice == ["here.2: forward_kl is listed twice (first at 0); list it once with both weights added"]
    assert not contradictions((ForwardKL(), ForwardKL(temperature=2.0), JSD(beta=0.2), JSD(), TAID()))


def test_terms_of_one_kind_get_curves_of_their_own() -> None:
    assert term_names((ForwardKL(), CrossEntropy())) == ["forward_kl", "cross_entropy"]
    assert term_names((ForwardKL(), JSD(), ForwardKL(temperature=4.0))) == ["forward_kl_1", "jsd", "forward_kl_2"]


def test_only_a_pure_text_loss_needs_no_teacher() -> None:
    assert not needs_teacher((CrossEntropy(),))
    assert needs_teacher((CrossEntropy(), ForwardKL(weight=0.0)))
    assert needs_teacher((HiddenStates(),))
