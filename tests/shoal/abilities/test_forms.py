"""Forms: the same content in other words, and none of the reworded ones in training text."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from shoal.abilities import Item, items, training_texts
from shoal.abilities.item import Form
from shoal.abilities.knowledge import RELATIONS, FactForm, examples_of, facts_in
from shoal.abilities.reasoning import spelled
from shoal.abilities.texts import FORMS

NAMES = [(ability, form.name) for ability, forms in FORMS.items() for form in forms]
SETTINGS: dict[str, dict[str, Any]] = {"retrieval": {"num_pairs": 10}, "knowledge": {}, "reasoning": {"num_steps": 2}}
ONES = [spelled(value) for value in range(40)]


def made(ability: str, form: str | None, num_items: int = 24) -> list[Item]:
    return items(ability, split="eval", num_items=num_items, seed=0, form=form, **SETTINGS[ability])


@pytest.mark.parametrize(("ability", "name"), NAMES)
def test_a_form_changes_neither_content_nor_identity_nor_place_of_the_answer(ability: str, name: str) -> None:
    plain, other = made(ability, None), made(ability, name)
    assert [(item.id, item.answer, len(item.options)) for item in other] == [
        (item.id, item.answer, len(item.options)) for item in plain
    ]
    assert len({item.id for item in other}) == len(other)
    for before, after in zip(plain, other, strict=True):
        assert not after.context.endswith((" ", "\n"))
        assert all(option.startswith(" ") for option in after.options)
        assert len(set(after.options)) == len(after.options)
        final = str(before.params["final"])
        assert final in after.gold or spelled(int(final)) in after.gold
    is_first = name == FORMS[ability][0].name
    assert ([item.context for item in other] == [item.context for item in plain]) == is_first


def test_there_are_six_forms_of_every_ability_and_both_kinds_of_them() -> None:
    for forms in FORMS.values():
        assert len({form.name for form in forms}) == len(forms) >= 6
        assert Counter(form.reworded for form in forms).keys() == {True, False}
        assert min(Counter(form.reworded for form in forms).values()) >= 3
        assert not forms[0].reworded


@pytest.mark.parametrize("ability", FORMS)
def test_reworded_forms_take_turns_and_no_trained_form_is_among_them(ability: str) -> None:
    others = [form.name for form in FORMS[ability] if form.reworded]
    count, forms = 4 * len(others), (*others, FORMS[ability][0].name)
    by_form = {name: [item.context for item in made(ability, name, count)] for name in forms}
    asked = [item.context for item in made(ability, "reworded", count)]
    places = [[name for name, contexts in by_form.items() if contexts[index] == asked[index]] for index in range(count)]
    assert all(len(names) == 1 for names in places)
    assert Counter(names[0] for names in places) == dict.fromkeys(others, 4)
    half = len(others)
    assert [names[0] for names in places[:half]] != [names[0] for names in places[half : 2 * half]]


def test_no_example_of_a_fact_shows_its_answer() -> None:
    for name in RELATIONS:
        for subject, target in facts_in("eval", name):
            assert target not in [other for _, other in examples_of(name, subject, target)]


def test_look_ups_hold_every_pair_and_ask_for_the_right_one() -> None:
    for form in FORMS["retrieval"]:
        for item in made("retrieval", form.name):
            values = re.findall(r"\b\d{4}\b", item.context)
            assert len(values) == len(set(values)) == 10
            assert values[int(item.params["gold_position"])] == item.params["final"]
            assert str(item.params["key"]) in "\n".join(item.context.splitlines()[-2:])


def test_worked_sums_are_right_in_every_form() -> None:
    for form in FORMS["reasoning"]:
        for item in items("reasoning", split="eval", num_items=12, seed=0, kind="arithmetic", form=form.name):
            numbers = [
                ONES.index(word) if word in ONES else word for word in re.findall(r"[a-z]+(?:-[a-z]+)?|\d+", item.gold)
            ]
            found = [int(word) for word in numbers if str(word).isdecimal()]
            start, *steps, final = found
            totals = [start]
            for first, second, after in zip(*[iter(steps)] * 3, strict=True):
                assert totals[-1] in (first, second)
                assert abs(after - totals[-1]) == (second if first == totals[-1] else first)
                totals.append(after)
            assert len(totals) == 3
            assert final == totals[-1]


def test_spelled_numbers() -> None:
    words = {0: "zero", 7: "seven", 19: "nineteen", 20: "twenty", 21: "twenty-one", 40: "forty", 99: "ninety-nine"}
    assert {value: spelled(value) for value in words} == words


@pytest.mark.prove
def test_training_text_has_every_trained_form_and_no_reworded_one() -> None:
    text = "\n\n".join(training_texts(num_texts=600, seed=3))
    for ability, forms in FORMS.items():
        for form in forms:
            found = [tell for tell in telling(form) if re.search(tell, text)]
            assert bool(found) == (not form.reworded), (ability, form.name, found)
    paraphrases = [f"{relation.paraphrase.format('{subject}')} {{target}}" for relation in RELATIONS.values()]
    assert not [words for words in paraphrases if re.search(pattern(words), text)]


def telling(form: Form) -> list[str]:
    """Patterns of the templates that are this form's own."""
    others = {text for forms in FORMS.values() for other in forms if other != form for text in other.templates}
    own = [text for text in form.templates if text not in others and len(re.sub(r"\{\w+\}|\W", "", text)) >= 4]
    if form.name == "statement":  # whose words are the relations' alone
        own = [relation.prompt.format("{subject}") for relation in RELATIONS.values()]
    if form.name == "question" and isinstance(form, FactForm):  # stories are asked so too
        own = [f"Question: {relation.question.format('{subject}')}\nAnswer:" for relation in RELATIONS.values()]
    if form.name == "record":
        own = [
            f"{relation.kinds[0].capitalize()}: {{subject}}\n{relation.kinds[1]}:" for relation in RELATIONS.values()
        ]
    return [pattern(text) for text in own if "{pairs}" not in text]


def pattern(template: str) -> str:
    parts = re.split(r"\{\w+\}", template.replace("{{", "\0").replace("}}", "\1"))
    return r".{1,300}?".join(re.escape(part.replace("\0", "{").replace("\1", "}")) for part in parts)
