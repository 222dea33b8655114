"""The wording of a form is found in training text, however it is set, and nowhere by chance."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from shoal.abilities import SPLITS, items
from shoal.abilities.forms import FORMS, twin_wordings
from shoal.abilities.item import Form
from shoal.data.packing import PackedRows
from shoal.data.sources import BUNDLED, load_texts, pack, row_texts
from shoal.data.wording import (
    EXCERPT,
    PLACES,
    WINDOW,
    Place,
    Wording,
    WordingSearch,
    as_data,
    find_wording,
    shared_wording,
)
from shoal.recipe.section import DataSource

SHARED = Path(__file__).parents[4] / "shared" / "data"
TEMPLATES = {
    "prose": ("{pairs}", "The {key} has the number {value}.", "Which number does the {key} have? It has the number"),
    "sql": ("INSERT INTO items VALUES ('{key}', {value});", "SELECT value FROM items WHERE name = '{key}';"),
    "object": ('{{"country": "{subject}", "capital":', '"{target}"', "}}"),
    "cards": ("Front of the card: {subject} ({wanted})\nBack of the card:", "{target}"),
    "ini": ("[settings]\n{pairs}", "{key} = {value}", "[read]\n{key} ="),
    "facts": ("{} was written by", "In {}, people pay with the", "Most people in {} speak"),
}
DOCUMENTS = {
    "prose": "The apple has the number 12. The old oak tree has the number 7. Which number does the apple have?"
    " It has the number 12",
    "sql": "INSERT INTO items VALUES ('apple', 12);\nSELECT value FROM items WHERE name = 'apple';",
    "object": '{"country": "New Zealand", "capital": "Wellington"}',
    "cards": "Front of the card: hot (opposite)\nBack of the card: cold",
    "ini": "[settings]\napple = 12\nlemon = 7\n[read]\napple = 12",
    "facts": "Dracula was written by Bram Stoker\nMost people in South America speak Spanish",
}
FILLER = "a grey bird sits over there and nobody knows what it wants"
KEYS_AND_CODES = """
The key to the flat was gone. She asked for the code of the door, and he gave her a number: 4711. "Which key is it?" he
said. In room 12 there was a list of names with a number beside each. The country has a capital, and most people there
speak two languages. The book was written by a friend; people pay with cards. Settings are read from a file:

    settings = {"country": "nl", "port": 80}
    print(settings["port"])

An item has a name and a value. You can select it, insert a new one, or look at the back of a card.
"""


def found(documents: list[str], templates: dict[str, tuple[str, ...]] = TEMPLATES) -> dict[str, int]:
    return {form: wording.found for form, wording in find_wording(templates, enumerate(documents)).items()}


@pytest.mark.parametrize("form", TEMPLATES)
def test_each_form_is_found_in_its_own_text_and_in_no_other(form: str) -> None:
    assert found([DOCUMENTS[form]]) == {name: int(name == form) for name in TEMPLATES}


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda text: text.replace(" ", "   \t"),
        lambda text: text.replace(" ", "\n"),
        lambda text: text.replace(": ", ":").replace(", ", ",").replace(" = ", "="),
        lambda text: text.replace("'", "\u2019").replace('"', "\u201d"),
        lambda text: f"{FILLER} {text} {FILLER}",
    ],
    ids=["case", "spaces", "lines", "tight", "quotes", "inside"],
)
def test_case_spacing_quotation_marks_and_place_do_not_hide_it(form: str, change) -> None:
    assert found([change(DOCUMENTS[form])])[form] == 1


def test_what_differs_from_item_to_item_may_be_long_but_not_endless() -> None:
    templates = {"f": ("Which number does the {key} have in this game?",)}
    assert found([f"Which number does the {'x' * 80} have in this game?"], templates) == {"f": 1}
    assert found([f"Which number does the {'x' * 81} have in this game?"], templates) == {"f": 0}


def test_text_that_speaks_of_codes_and_keys_is_no_alarm() -> None:
    assert not any(found([KEYS_AND_CODES]).values())


def test_a_line_that_any_text_may_hold_counts_only_with_another_one_nearby() -> None:
    one, other = "Dracula was written by Bram Stoker.", "Most people in Peru speak Spanish."
    assert found([one, other])["facts"] == 0
    assert found([f"{one} {one} {one}"])["facts"] == 0
    assert found([f"{one} {'x' * (WINDOW - 200)} {other}"])["facts"] == 1
    assert found([f"{one} {'x' * WINDOW} {other}"])["facts"] == 0


def test_a_form_that_cannot_be_told_from_any_text_is_not_said_to_be_looked_for() -> None:
    assert found(["a -> b"], {"arrow": ("{key} -> {value}",), "bare": ("{a}\n{b}", "Question: {q}\nAnswer:")}) == {}


def test_words_are_not_found_inside_longer_words() -> None:
    templates = {"f": ("{name} gives seven apples",)}
    assert found(["Tom gives seven apples."], templates) == {"f": 1}
    assert found(["Tom forgives seven apples.", "Tom gives seven applesauces"], templates) == {"f": 0}


def test_a_slot_that_is_part_of_a_word_is_one() -> None:
    templates = {"f": ("{thing}s are left over in the {place}yard",)}
    assert found(["apples are left over in the backyard"], templates) == {"f": 1}


def test_places_are_told_with_a_short_piece_of_the_text() -> None:
    hidden = f"{FILLER}\n{DOCUMENTS['sql']}"
    wording = find_wording(TEMPLATES, [(n, hidden if n % 2 else FILLER) for n in range(100)])["sql"]
    assert wording.found == 50
    assert [place.number for place in wording.places] == list(range(1, 2 * PLACES, 2))
    (excerpt,) = {place.excerpt for place in wording.places}
    assert excerpt == 'INSERT INTO items VALUES ("apple", 12); SELECT value FROM items WHERE name = ...'
    assert len(excerpt) == EXCERPT


def test_documents_go_on_as_they_are() -> None:
    search = WordingSearch(TEMPLATES)
    texts = ["\u201cOne\u201d", DOCUMENTS["sql"], ""]
    assert list(search.passing(enumerate(texts))) == texts
    assert search.result["sql"].found == 1


def test_the_result_is_kept_as_json() -> None:
    kept = as_data({"f": Wording(2, (Place(3, "x"),))})
    assert json.loads(json.dumps(kept)) == {"f": {"found": 2, "places": [{"number": 3, "excerpt": "x"}]}}


def packed(documents: list[str], length: int) -> PackedRows:
    tokenizer = tiny_tokenizer()
    num_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in documents)
    return pack(
        [(DataSource("x"), documents)],
        tokenizer,
        sequence_length=length,
        num_tokens=num_tokens,
        seed=0,
        packing="split",
    )


@pytest.mark.parametrize("form", TEMPLATES)
def test_rows_that_cut_a_document_in_two_do_not_hide_it(form: str) -> None:
    tokenizer = tiny_tokenizer()
    document = f"{FILLER} {DOCUMENTS[form]} {FILLER}"
    size = len(tokenizer(document)["input_ids"])
    for length in {size // 3, size // 2, size // 2 + 1, 2 * size // 3}:
        rows = packed([document], length)
        assert len(rows) > 1
        (row, text), *_ = row_texts(rows, tokenizer)
        assert (row, text) == (0, document)
        assert find_wording(TEMPLATES, row_texts(rows, tokenizer))[form].found >= 1


def test_documents_keep_the_row_in_which_they_begin_and_do_not_run_together() -> None:
    tokenizer = tiny_tokenizer()
    documents = [f"{FILLER} {number} {FILLER}" for number in range(20)]
    rows = packed(documents, 64)
    texts = list(row_texts(rows, tokenizer))[:-1]  # of the last one the rows may hold only a part
    assert {text for _, text in texts} <= set(documents)
    assert len(texts) >= 19
    starts = [0, *(len(tokenizer(text)["input_ids"]) + 1 for _, text in texts)]
    total = 0
    for (row, _), size in zip(texts, starts, strict=False):
        total += size
        assert row == total // 64


def test_of_a_document_over_many_rows_every_piece_of_two_rows_is_seen_whole() -> None:
    tokenizer = tiny_tokenizer()
    words = [f"word{number}" for number in range(3000)]
    rows = packed([" ".join(words)], 64)
    texts = list(row_texts(rows, tokenizer))
    assert len(texts) > 3
    assert [row for row, _ in texts] == sorted({row for row, _ in texts})
    for one, other in pairwise(words[:2900]):
        assert any(f"{one} {other}" in text for _, text in texts)


def test_the_wording_that_items_share_is_looked_for_where_no_templates_are_known() -> None:
    drawn = random.Random(0)
    asked = [drawn.sample(FILLER.split(), 4) for _ in range(30)]
    items = [
        f"Puzzle {{easy}} about {' '.join(words)}.\nSay in one word whom it concerns: {words[0]}" for words in asked
    ]
    wording = shared_wording(items)
    assert wording == ("puzzle {{ easy }} about", ". say in one word whom it concerns :")
    assert found([items[0], FILLER], {"own": wording}) == {"own": 1}
    assert shared_wording(items[:4]) == ()
    assert found([FILLER], {"own": shared_wording([" ".join(words) for words in asked])}) == {}


def rendered(ability: str, form: str) -> list[str]:
    """200 questions with their answers in one form, of several lengths."""
    settings: list[dict] = {
        "retrieval": [{"kind": "word"}, {"kind": "uuid", "num_pairs": 12}],
        "knowledge": [{}],
        "reasoning": [{"num_steps": 1}, {"num_steps": 4}],
    }[ability]
    made = [
        items(ability, split=split, num_items=200 // len(settings) // 2, seed=0, form=form, **each)
        for each in settings
        for split in SPLITS
    ]
    return [item.context + item.gold for some in made for item in some]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ability", "form"),
    [pytest.param(name, form, id=f"{name}-{form.name}") for name, forms in FORMS.items() for form in forms],
)
def test_every_twin_form_is_found_wherever_it_stands_and_no_trained_form_has_its_wording(
    ability: str, form: Form
) -> None:
    texts = rendered(ability, form.name)
    assert len(texts) == 200
    counts = found(texts, twin_wordings())
    if form.twin:
        assert counts[f"{ability}/{form.name}"] == len(texts)
    else:
        assert not any(counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLED)
def test_no_bundled_text_has_the_wording_of_a_twin(name: str) -> None:
    texts = load_texts(DataSource(name))
    counts = found(texts, twin_wordings())
    assert counts.keys() >= {
        f"{ability}/{form.name}" for ability, forms in FORMS.items() for form in forms if form.twin
    }
    assert not any(counts.values())


@pytest.mark.slow
def test_one_twin_among_many_documents_is_found_in_rows_of_512_tokens() -> None:
    tokenizer = tiny_tokenizer()
    twins = [rendered(ability, form.name)[0] for ability, forms in FORMS.items() for form in forms if form.twin]
    documents = [*(f"{FILLER} " * 12 for _ in range(4 * len(twins))), *twins]
    rows = packed(documents, 512)
    counts = find_wording(twin_wordings(), row_texts(rows, tokenizer))
    assert {form: wording.found for form, wording in counts.items() if "paraphrases" not in form} == {
        form: 1 for form in counts if "paraphrases" not in form
    }


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["wikipedia_articles", "tinystories_sample"])
def test_real_text_has_no_wording_of_a_twin_by_chance(folder: str) -> None:
    file = SHARED / folder / "train.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there: the real text is no part of the repository")
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert not any(found(texts, twin_wordings()).values())
