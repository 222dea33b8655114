"""A word of another tool is answered with the key that it is here, in a recipe and by `shoal explain`.

Covers: shoal.recipe.not_together.
"""

from __future__ import annotations

import dataclasses

import pytest
from transformers import TrainingArguments

from shoal.errors import UserError
from shoal.launch.help.explain import explanation
from shoal.recipe.distill import Distill, OnPolicy, Recorded
from shoal.recipe.evaluate import Eval
from shoal.recipe.field_words import FIELD_WORDS, TRAINING_ARGUMENTS
from shoal.recipe.not_together import IS_SO, NOT_TOGETHER, WORDS, contradictions, not_together
from shoal.recipe.recipe import parse_recipe


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"output_dir": "x"}, "output_dir: unknown key; here it is run_dir"),
        ({"distill": {"learning_rate": 1e-4}}, "unknown key; here it is distill.trainer.learning_rate"),
        ({"distill": {"max_seq_length": 512}}, "unknown key; here it is distill.sequence_length"),
        ({"num_drop": 3}, "num_drop: unknown key; it is a key elsewhere: "),
    ],
)  # fmt: skip
def test_an_unknown_key_of_a_recipe_is_answered_in_the_words_of_a_recipe(raw: dict, told: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe({"model": "demo:smollm2-135m", **raw})
    assert told in str(refused.value)


def test_ten_known_keys_are_named_at_most() -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe({"model": "demo:smollm2-135m", "distill": {"qqqqqqqqqqqq": 1}})
    known = str(refused.value).partition("known keys are ")[2].split(", ")
    assert len(known) == 10 + 1
    assert known[-1] == "..."


def test_explain_knows_them_too() -> None:
    with pytest.raises(UserError, match=r"no key 'lora_target'; here it is distill\.lora\.target_modules"):
        explanation("lora_target")


def test_a_row_of_the_table_is_refused_with_reason_and_remedy() -> None:
    both = Distill(on_policy=OnPolicy(), teacher=Recorded())
    (told,) = not_together(both)
    assert told in NOT_TOGETHER
    assert told.startswith(
        "distill.on_policy: recorded teachers cannot score text that the student has yet to write; set "
    )
    assert [*contradictions(both)] == [told]
    assert IS_SO.keys() == WORDS.keys()
    assert not [*not_together(Distill()), *not_together(Eval())]


def test_the_names_of_training_arguments_are_those_of_the_installed_library() -> None:
    assert {field.name for field in dataclasses.fields(TrainingArguments)} == TRAINING_ARGUMENTS


def test_every_word_is_a_key_that_can_be_explained() -> None:
    for key in {*FIELD_WORDS.values()}:
        if not key.startswith("distill.trainer."):
            assert explanation(key), key


def test_no_word_is_a_key_of_its_own_place() -> None:
    assert not [word for word, key in FIELD_WORDS.items() if key.rpartition(".")[2] == word]
