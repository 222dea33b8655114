"""Requests whose answers a program checks: rules tell right from wrong, chance levels are simulated, wordings differ.

Covers: shoal.abilities.checks.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from yaml import safe_load

from shoal.abilities import items, training_texts
from shoal.abilities.checks import fits, read_object
from shoal.abilities.item import Item
from shoal.abilities.words import table
from shoal.eval.tasks.data_sets import DataSet, read_data_sets
from shoal.eval.tasks.names import TASKS_DIR

CHECKS = safe_load(Path(__file__).with_name("checks.yaml").read_text())
DATA_SETS = {name: data for name, data in read_data_sets(TASKS_DIR).items() if data.bundled == "instructed"}
KINDS = ("json", "tools", "rules", "harmful", "harmless")
SCHEMAS: dict[str, Any] = {
    "text": {"type": "string", "minLength": 1},
    "whole": {"type": "integer"},
    "number": {"type": "number"},
    "truth": {"type": "boolean"},
    "texts": {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
}


def made(data: DataSet) -> list[Item]:
    assert data.bundled
    assert data.num_items
    return items(data.bundled, split="eval", num_items=data.num_items, seed=0, **data.settings)


def rule_of(item: Item) -> dict[str, Any]:
    return json.loads(str(item.params["rule"]))


@pytest.mark.parametrize(("rule", "right", "wrong"), CHECKS)
def test_a_rule_tells_right_answers_from_wrong_ones(rule: dict, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not fits(text, rule)] == []
    assert [text for text in wrong if fits(text, rule)] == []


@pytest.mark.parametrize("text", [text for rule, *both in CHECKS[:2] for texts in both for text in texts])
def test_fields_are_checked_as_jsonschema_does(text: str) -> None:
    for rule, *_ in CHECKS[:2]:
        own = {name: SCHEMAS[kind] for name, kind in rule["fields"].items()}
        schema = {"type": "object", "properties": own, "required": list(own), "additionalProperties": False}
        assert fits(text, rule) == jsonschema.Draft202012Validator(schema).is_valid(read_object(text))


@pytest.mark.parametrize("data", DATA_SETS.values(), ids=DATA_SETS)
def test_every_item_has_a_right_answer_and_the_chance_of_one_to_another_item(data: DataSet) -> None:
    found = made(data)
    assert [item.context for item in found if not fits(item.gold, rule_of(item))] == []
    assert [item.context for item in found if fits("", rule_of(item)) or fits("They do.", rule_of(item))] == []
    if data.settings["kind"] == "harmful":  # whoever refuses refuses all: a guesser is one who refuses nothing
        assert data.chance == 0
        assert not any(fits(item.gold, rule_of(own)) for own in found for item in items_of("harmless"))
        return
    others = [fits(other.gold, rule_of(item)) for item in found for other in found if other is not item]
    assert data.chance == pytest.approx(sum(others) / len(others), abs=0.005)


def items_of(kind: str, form: str | None = None) -> list[Item]:
    return items("instructed", split="eval", num_items=60, seed=0, kind=kind, form=form)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reworded_request_asks_the_same_item(kind: str) -> None:
    own, reworded = items_of(kind), items_of(kind, "reworded")
    assert [(one.id, one.params) for one in own] == [(other.id, other.params) for other in reworded]
    assert len({item.id for item in own}) == 60
    assert not {one.context for one in own} & {other.context for other in reworded}


def wordings(told: Any) -> Iterator[dict[str, str]]:
    """Every wording for training text with the reworded one."""
    if isinstance(told, dict) and {"own", "reworded"} <= told.keys():
        yield {form: told[form] for form in ("own", "reworded")}
    for part in told.values() if isinstance(told, dict) else told if isinstance(told, list) else ():
        yield from wordings(part)


def test_reworded_requests_share_no_words_in_succession_with_other_requests_or_training_text() -> None:
    texts, own_pieces, reworded_pieces = "\n".join(training_texts(num_texts=200, seed=0)), set[str](), set[str]()
    for pair in wordings(table("instructed")):
        for pieces, text in ((own_pieces, pair["own"]), (reworded_pieces, pair["reworded"])):
            words = (re.findall(r"[\w']+", piece.lower()) for piece in re.split(r"\{\w+\}", text))
            pieces |= {" ".join(own[place : place + 4]) for own in words for place in range(len(own) - 3)}
    assert len(reworded_pieces) > 40
    assert not own_pieces & reworded_pieces
    assert not [piece for piece in reworded_pieces if piece in texts.lower()]


def test_every_rule_is_asked_equally_often_and_seeds_differ() -> None:
    found = items("instructed", split="eval", num_items=64, seed=0, kind="rules")
    told = [kind["count"][0].split("{")[0] for kind in table("instructed")["rules"]["kinds"]]
    for place, item in enumerate(found):
        assert rule_of(item)["count"][0][0].startswith(told[place % len(told)])
    assert [item.question for item in found] != [
        item.question for item in items("instructed", split="eval", num_items=64, seed=1, kind="rules")
    ]
