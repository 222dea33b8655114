"""The table of what can be taken out of a layer.

Covers: shoal.components.
"""

from typing import Any, get_args

import pytest
from architectures import tiny_model

from shoal.components import REMOVED, Component, ComponentPart, LayerEdit
from shoal.compress.edits.layer_edits import KINDS, components_of, in_force, layer_edits, stored_name
from shoal.recipe.measure import Operator


def test_every_part_has_a_row_and_is_an_operator_of_sweeps() -> None:
    assert set(KINDS) == set(get_args(ComponentPart)) > set(get_args(Operator))


def test_an_operator_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no operator 'neuron'"):
        components_of("neuron", tiny_model("llama"))


def test_components_become_one_edit_per_layer_and_part() -> None:
    taken = (
        Component((4,), "kv_group", 1),
        *(Component((layer,), "mlp") for layer in (2, 1)),
        *(Component((4,), "head", head) for head in (2, 0)),
        Component((2,), "attention"),
    )
    assert layer_edits(taken, tiny_model("llama", num_key_value_heads=2)) == (
        (1, LayerEdit("mlp")),
        (2, LayerEdit("attention")),
        (2, LayerEdit("mlp")),
        (4, LayerEdit("head", (0, 2, 3))),
    )


def test_a_donor_is_left_to_whoever_has_it() -> None:
    model: Any = tiny_model("llama")
    with in_force(model, [(1, LayerEdit("donor"))]):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_answers_of_sweeps_are_found_by_the_names_they_were_stored_under() -> None:
    model = tiny_model("llama", num_key_value_heads=2)
    for taken, name in (
        ((), "()"),
        ((Component((5, 3)),), "((3, Removed()), (5, Removed()))"),
        ((Component((2,), "attention"),), "((2, Silenced(half='attention')),)"),
        ((Component((2,), "mlp"), Component((2,), "head", 1)), "((2, Masked(heads=(1,))), (2, Silenced(half='mlp')))"),
        ((Component((0,), "kv_group", 1),), "((0, Masked(heads=(2, 3))),)"),
        ((Component((4,), "donor"),), "((4, Swapped()),)"),
        ((Component((1,), "skip_prompt"),), "((1, Skipped(at='prompt')),)"),
        ((Component((1,), "skip_written"),), "((1, Skipped(at='written')),)"),
    ):
        assert stored_name(layer_edits(taken, model)) == name
    assert LayerEdit("layer") == REMOVED
