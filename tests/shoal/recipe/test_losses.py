"""Settings of loss terms: how a recipe names them, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import UserError
from shoal.recipe.losses import (
    DKD,
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


def losses(*terms: dict[str, Any]) -> tuple[LossTerm, ...]:
    return parse_recipe({"model": "m", "run_dir": "r", "distill": {"losses": list(terms)}}).distill.losses


def refusal(*terms: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as refused:
        losses(*terms)
    return str(refused.value).replace("recipe: distill.losses", "losses").split("\n")


@pytest.mark.slow
def test_every_kind_is_read_from_a_recipe_with_its_defaults_and_written_back() -> None:
    kinds = (*LOGIT_TERMS, HiddenStates)
    assert [term().kind for term in kinds] == list(KINDS)
    assert len(set(KINDS)) == len(kinds) == 11
    for term, kind in zip(kinds, KINDS, strict=True):
        (read,) = losses({"kind": kind})
        assert read == term()
        assert losses(as_dict(read)) == (read,)


def test_forward_kl_is_the_default() -> None:
    assert parse_recipe({"model": "m", "run_dir": "r"}).distill.losses == (ForwardKL(),)


ONE_OF = ", ".join(map(repr, KINDS))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"kind": "forwardkl"},
            f"losses.0.kind: must be one of {ONE_OF} (got 'forwardkl'; did you mean 'forward_kl'?)",
        ),
        (
            {"kind": "hidden_state"},
            f"losses.0.kind: must be one of {ONE_OF} (got 'hidden_state'; did you mean 'hidden_states'?)",
        ),
        ({"kind": "kl"}, f"losses.0.kind: must be one of {ONE_OF} (got 'kl')"),
        ({"weight": 1}, f"losses.0: needs a kind: one of {', '.join(KINDS)}"),
        ({"kind": "jsd", "bta": 0.5}, "losses.0.bta: unknown key; did you mean 'beta'?"),
        ({"kind": "jsd", "alpha": 0.5}, "losses.0.alpha: unknown key; known keys are kind, weight, temperature, beta"),
        ({"kind": "jsd", "beta": 0}, "losses.0.beta: must be greater than 0 (got 0)"),
        ({"kind": "skewed_forward_kl", "alpha": 1}, "losses.0.alpha: must be less than 1 (got 1)"),
        ({"kind": "forward_kl", "temperature": 0}, "losses.0.temperature: must be greater than 0 (got 0)"),
        ({"kind": "forward_kl", "weight": -1}, "losses.0.weight: must be greater than or equal to 0 (got -1)"),
        ({"kind": "forward_kl", "weight": float("nan")}, "losses.0.weight: must be a finite number (got nan)"),
        ({"kind": "taid", "start": 0.5, "end": 0.2}, "losses.0.start: must not be above end, 0.2 (got 0.5)"),
        (
            {"kind": "taid", "start": 0, "end": 0},
            "losses.0.end: the target would stay the student itself, which trains nothing; set it above 0",
        ),
        (
            {"kind": "dkd", "alpha": 0, "beta": 0},
            "losses.0.alpha: is 0 and so is beta, the term would always be 0; give one of them a value above 0",
        ),
        ({"kind": "hidden_states", "layers": []}, "losses.0.layers: must have at least 1 item (got [])"),
        ({"kind": "hidden_states", "layers": [1, 1]}, "losses.0.layers: names 1 twice; name each once"),
        ({"kind": "hidden_states", "layers": [-1]}, "losses.0.layers.0: must be greater than or equal to 0 (got -1)"),
    ],
)
def test_wrong_term_is_refused_with_its_path_and_remedy(term: dict[str, Any], message: str) -> None:
    assert refusal(term) == [message]


def test_losses_that_train_nothing_are_refused() -> None:
    message = "losses: every weight is 0, nothing would be trained; give one a weight above 0"
    assert refusal({"kind": "jsd", "weight": 0}, {"kind": "cross_entropy", "weight": 0}) == [message]


def test_one_term_given_twice_is_refused_and_two_of_one_kind_are_not() -> None:
    twice = contradictions((ForwardKL(), CrossEntropy(), ForwardKL(weight=0.5)), "here")
    assert twice == ["here.2: is the forward_kl at 0 again; give it once, with the sum of the weights"]
    assert not contradictions((ForwardKL(), ForwardKL(temperature=2.0), JSD(beta=0.2), JSD(), TAID(), DKD()))


def test_terms_of_one_kind_get_curves_of_their_own() -> None:
    assert term_names((ForwardKL(), CrossEntropy())) == ["forward_kl", "cross_entropy"]
    assert term_names((ForwardKL(), JSD(), ForwardKL(temperature=4.0))) == ["forward_kl_1", "jsd", "forward_kl_2"]


def test_only_a_pure_text_loss_needs_no_teacher() -> None:
    assert not needs_teacher((CrossEntropy(),))
    assert needs_teacher((CrossEntropy(), ForwardKL(weight=0.0)))
    assert needs_teacher((HiddenStates(),))
