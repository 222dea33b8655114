"""The generated items are right, repeatable, and their two splits share no content.

Covers: shoal.abilities.item, shoal.abilities.knowledge, shoal.abilities.reasoning, shoal.abilities.retrieval,
shoal.abilities.texts, shoal.abilities.words.
"""

import json
import re
from collections import Counter

import pytest
from cases import cases

from shoal.abilities import GENERATORS, Item, items, training_texts
from shoal.abilities.item import split_of
from shoal.abilities.knowledge import RELATIONS, UNTRAINED, facts_in, stated_facts
from shoal.abilities.texts import FORMS

CASES = cases(__file__)

SETTINGS = [
    ("retrieval", {}),
    ("retrieval", {"kind": "uuid", "num_pairs": 5}),
    ("retrieval", {"num_pairs": 6, "gold_position": 2}),
    ("knowledge", {}),
    ("knowledge", {"relation": "capital"}),
    *[
        ("reasoning", {"kind": kind, "num_steps": steps})
        for kind in ("arithmetic", "order", "state")
        for steps in (1, 2, 4)
    ],
]


def first_match(pattern: str, text: str) -> str:
    """The first group of the first match, which has to be there."""
    found = re.search(pattern, text)
    assert found, f"{pattern} not in {text}"
    return found[1]


def content_of(item: Item) -> set[str]:
    """What an item is made of, found in its text by this test itself."""
    text = item.context + "".join(item.options)
    if item.task == "retrieval":
        return set(re.findall(r'"([^"]+)"', text))
    if item.task == "knowledge":
        return {f"{item.params['relation']}: {item.params['subject']}"}
    if item.params["kind"] == "arithmetic":
        return {" ".join(re.findall(r"\d+|buys|finds|gets|gives|loses|sells", item.question)), item.question.split()[0]}
    if item.params["kind"] == "order":
        return set(re.findall(r"(\w+) is \w+ than (\w+)", item.question)[0])
    return set(re.findall(r"the (\w+)", text.lower()))


@pytest.mark.parametrize(("task", "params"), SETTINGS)
def test_same_arguments_give_same_items_and_another_seed_gives_others(task: str, params: dict) -> None:
    first = items(task, split="eval", num_items=12, seed=3, **params)
    assert first == items(task, split="eval", num_items=12, seed=3, **params)
    assert first != items(task, split="eval", num_items=12, seed=4, **params)
    assert len({item.id for item in first}) == 12


@pytest.mark.parametrize(("task", "params"), SETTINGS)
def test_items_are_well_formed(task: str, params: dict) -> None:
    for item in items(task, split="train", num_items=10, seed=0, **params):
        assert item.task == task
        assert item.context == item.context.strip()
        assert len(set(item.options)) == len(item.options) >= 4
        assert all(option.startswith(" ") and option == option.rstrip() for option in item.options)
        assert str(item.params["final"]) in item.gold


@pytest.mark.parametrize(("task", "params"), SETTINGS)
def test_splits_share_no_content(task: str, params: dict) -> None:
    size = {"knowledge": 20}.get(task, 60)
    found = [
        set().union(
            *(
                content_of(item)
                for seed in (0, 1)
                for item in items(task, split=split, num_items=size, seed=seed, **params)
            )
        )
        for split in ("train", "eval")
    ]
    assert found[0]
    assert found[1]
    assert not found[0] & found[1]


@pytest.mark.parametrize("kind", ["word", "uuid"])
@pytest.mark.parametrize("num_pairs", [4, 20])
def test_lookup_gold_is_the_value_of_the_key(kind: str, num_pairs: int) -> None:
    for item in items("retrieval", split="eval", num_items=20, seed=0, kind=kind, num_pairs=num_pairs):
        data = json.loads(first_match(r"(\{.*\})", item.context))
        key = first_match(r'"([^"]+)":$', item.context)
        assert len(data) == len(set(data.values())) == num_pairs
        assert json.loads(item.gold) == data[key] == item.params["final"]
        assert list(data).index(key) == item.params["gold_position"]
        assert {json.loads(option) for option in item.options} <= set(data.values())


@pytest.mark.parametrize(("task", "params"), [setting for setting in SETTINGS if setting[1].get("relation") is None])
def test_right_option_is_at_every_place(task: str, params: dict) -> None:
    made = items(task, split="eval", num_items=120, seed=0, **params)
    places = Counter(item.answer for item in made)
    even = len(made) / len(made[0].options)
    assert set(places) == set(range(len(made[0].options)))
    assert all(0.4 * even < count < 1.8 * even for count in places.values())


def test_facts_that_no_text_states_are_all_scored_and_are_none_of_the_others() -> None:
    pairs = [(name, *pair) for name, form in UNTRAINED.items() for pair in form.pairs]
    made = items("knowledge_out", split="eval", num_items=len(pairs), seed=0)
    assert {(item.params["relation"], item.params["subject"], item.params["final"]) for item in made} == set(pairs)
    assert {item.task for item in made} == {"knowledge_out"}
    for item in made:
        objects = {target for _, target in UNTRAINED[str(item.params["relation"])].pairs}
        assert {option.strip(' "') for option in item.options} <= objects
        assert len(set(item.options)) == 4
    # an object may be one of a trained relation too, but no two words belong together there
    trained = {frozenset(pair) for form in RELATIONS.values() for pair in form.pairs}
    assert not {frozenset(pair) for form in UNTRAINED.values() for pair in form.pairs} & trained
    text = "\n".join(training_texts(num_texts=400, seed=0)).lower()
    assert not [item.context for item in made if item.context.lower() in text or item.question.lower() in text]
    assert {f"{item.context}{item.gold}" for item in made} <= set(stated_facts("eval"))
    assert not {f"{item.context}{item.gold}" for item in made} & set(stated_facts("train"))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_only_the_gold_arithmetic_follows_the_story(num_steps: int) -> None:
    for item in items("reasoning", split="eval", num_items=30, seed=0, kind="arithmetic", num_steps=num_steps):
        start = int(first_match(r"has (\d+)", item.question))
        signs = {"buys": 1, "finds": 1, "gets": 1, "gives": -1, "loses": -1, "sells": -1}
        changes = [
            signs[verb] * int(n)
            for verb, n in re.findall(r"(buys|finds|gets|gives|loses|sells)\D+(\d+)", item.question)
        ]
        assert len(changes) == num_steps
        assert item.params["final"] == str(start + sum(changes))

        def follows(option: str, start: int = start, changes: list[int] = changes) -> bool:
            steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", option)
            total, right = start, len(steps) == len(changes)
            for (left, sign, amount, result), change in zip(steps, changes, strict=True):
                right &= int(left) == total and int(f"{sign}{amount}") == change and int(result) == total + change
                total = int(result)
            return right and option.endswith(f"The answer is {start + sum(changes)}.")

        assert [follows(option) for option in item.options] == [i == item.answer for i in range(4)]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_only_the_gold_order_follows_the_comparisons(num_steps: int) -> None:
    for item in items("reasoning", split="eval", num_items=30, seed=0, kind="order", num_steps=num_steps):
        above = dict(re.findall(r"(\w+) is \w+ than (\w+)\.", item.question))
        ranking = [next(iter(set(above) - set(above.values())))]
        while ranking[-1] in above:
            ranking.append(above[ranking[-1]])
        top = any(
            word in item.question for word in ("tallest", "oldest", "fastest", "strongest", "richest", "heaviest")
        )
        final = ranking[0] if top else ranking[-1]
        assert len(ranking) == num_steps + 1
        assert item.params["final"] == final

        def follows(option: str, ranking: list[str] = ranking, above: dict = above, final: str = final) -> bool:
            stated = re.findall(r"(\w+) is \w+ than (\w+)\.", option)
            order = first_match(r"order is ([^.]+)\.", option).split(", ")
            return dict(stated) == above and order == ranking and option.endswith(f" is {final}.")

        assert [follows(option) for option in item.options] == [i == item.answer for i in range(4)]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_only_the_gold_trace_follows_the_moves(num_steps: int) -> None:
    for item in items("reasoning", split="eval", num_items=30, seed=0, kind="state", num_steps=num_steps):
        where = dict(re.findall(r"[Tt]he (\w+) is in the (\w+)", item.question.split(".")[0]))
        lines = []
        for mover, place in re.findall(r"the (\w+) is moved to the (\w+)", item.question):
            where[mover] = place
            lines.append("Now " + " and ".join(f"the {thing} is in the {spot}" for thing, spot in where.items()) + ".")
        asked = first_match(r"Where is the (\w+)\?", item.question)
        worked = f" {' '.join(lines)} So the {asked} is in the {where[asked]}."
        assert len(lines) == num_steps
        assert item.params["final"] == where[asked]
        assert [option == worked for option in item.options] == [i == item.answer for i in range(4)]


@pytest.mark.slow
def test_training_texts_hold_only_content_of_the_training_split() -> None:
    texts = training_texts(num_texts=150, seed=0)
    assert texts == training_texts(num_texts=150, seed=0)
    assert texts != training_texts(num_texts=150, seed=1)
    assert len(set(texts)) > 140
    text = "\n".join(texts)
    sizes = {"knowledge_out": 150}
    prompts = {
        item.context
        for task in GENERATORS
        for item in items(task, split="eval", num_items=sizes.get(task, 200), seed=0)
    }
    prompts |= {
        item.context for task in FORMS for item in items(task, split="eval", num_items=200, seed=0, form="trained")
    }
    assert not [prompt for prompt in prompts if f"{prompt} " in text]
    assert all(split_of("number", number) == "train" for number in re.findall(r"(?<![-\w])(\d{4})(?![-\w])", text))
    subjects = [subject for name in RELATIONS for subject, _ in facts_in("train", name)]
    assert sum(subject in text for subject in subjects) > len(subjects) * 0.8


@pytest.mark.parametrize(("task", "params", "message"), CASES)
def test_bad_parameters_are_refused(task: str, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        items(task, **({"split": "eval", "num_items": 4, "seed": 0} | params))
