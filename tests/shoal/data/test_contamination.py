"""Evaluation items in training text are found, whatever their case, punctuation and place."""

from __future__ import annotations

import random

import pytest
from evaluations import load_tasks
from tiny import tiny_tokenizer

from shoal.data.contamination import COMMON, FEWEST_WORDS, NUM_WORDS, Overlap, as_data, find_overlap, words_of
from shoal.data.streams import pack, row_texts
from shoal.eval.harness.samples import item_texts
from shoal.recipe.section import DataSource

VOCABULARY = [f"word{n}" for n in range(300)]


def sentence(seed: int, num_words: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=num_words)


def by_definition(items: list[str], documents: list[str], n: int = NUM_WORDS) -> list[int]:
    """Items with an n-gram (or, if shorter, themselves) in a document, by comparing strings."""
    spaced = [f" {' '.join(words_of(document))} " for document in documents]
    found = []
    for index, item in enumerate(items):
        words = words_of(item)
        size = min(n, len(words))
        grams = [f" {' '.join(words[start : start + size])} " for start in range(len(words) - size + 1)]
        if any(gram in document for gram in grams for document in spaced):
            found.append(index)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_what_is_found_is_what_comparing_strings_finds(seed: int) -> None:
    drawn = random.Random(seed)
    items = [" ".join(sentence(seed * 100 + n, drawn.randint(FEWEST_WORDS, 40))) for n in range(40)]
    documents = [" ".join(sentence(50_000 + seed * 100 + n, 60)) for n in range(30)]
    for index in drawn.sample(range(40), 15):
        words, host = words_of(items[index]), drawn.randrange(30)
        size = drawn.randint(min(len(words), 10), min(len(words), 16))
        start = drawn.randint(0, len(words) - size)
        documents[host] += " " + " ".join(words[start : start + size]) + " end"
    expected = by_definition(items, documents)
    assert 5 < len(expected) < 16
    assert find_overlap({"task": items}, documents)["task"] == Overlap(40, 40, len(expected), tuple(expected))


def test_case_punctuation_and_unicode_forms_do_not_hide_an_item() -> None:
    item = "The quick brown fox, which is caf\u00e9-born, jumps over the \ufb01rst lazy dog!"
    document = "... THE QUICK; brown fox -- WHICH is cafe\u0301 born jumps (over) the first lazy dog and sleeps"
    assert find_overlap({"t": [item]}, [document])["t"].found == 1


def test_an_item_too_short_to_mean_anything_is_not_compared() -> None:
    short = " ".join(sentence(0, FEWEST_WORDS - 1))
    assert find_overlap({"t": [short, "", "!"]}, [short])["t"] == Overlap(3, 0, 0, ())
    whole = " ".join(sentence(0, FEWEST_WORDS))
    assert find_overlap({"t": [whole]}, [f"so {whole} it is"])["t"].found == 1


def test_the_wording_that_all_items_of_a_task_share_is_no_overlap() -> None:
    frame = " ".join(sentence(0, 20))
    items = [f"{frame} {' '.join(sentence(n, 4))}" for n in range(1, COMMON + 2)]
    assert find_overlap({"t": items}, [frame])["t"] == Overlap(COMMON + 1, COMMON + 1, 0, ())
    assert find_overlap({"t": items[:COMMON]}, [frame])["t"].found == COMMON


def test_tasks_are_counted_apart_and_kept_as_json() -> None:
    one, other = " ".join(sentence(1, 20)), " ".join(sentence(2, 20))
    found = find_overlap({"a": [one, other], "b": [other], "empty": []}, [f"see {other}"])
    assert as_data(found) == {
        "a": {"items": 2, "compared": 2, "found": 1, "examples": (1,)},
        "b": {"items": 1, "compared": 1, "found": 1, "examples": (0,)},
        "empty": {"items": 0, "compared": 0, "found": 0, "examples": ()},
    }


def test_packed_rows_are_looked_through_as_they_are_trained_on() -> None:
    item = " ".join(sentence(4, 15))
    rows = pack(
        [(DataSource("x"), ["something else", f"so {item} it is"])],
        tiny_tokenizer(),
        sequence_length=256,
        num_tokens=512,
        seed=0,
    )
    texts = [text for _, text in row_texts(rows, tiny_tokenizer())]
    assert {"something else", f"so {item} it is"} <= set(texts)
    assert find_overlap({"t": [item, "five other words of nothing"]}, texts)["t"].found == 1


def test_items_of_tasks_are_their_questions_with_the_right_answer() -> None:
    tasks = load_tasks(("knowledge_continuation", "retrieval_generation", "reasoning_worked"))
    texts = item_texts(tasks, {"knowledge_continuation": 3, "retrieval_generation": 2, "reasoning_worked": 2})
    assert [len(items) for items in texts.values()] == [3, 2, 2]
    for name, items in texts.items():
        for item, doc in zip(items, tasks[name].eval_docs, strict=False):
            assert item.startswith(tasks[name].doc_to_text(doc))
    task, doc = tasks["knowledge_continuation"], next(iter(tasks["knowledge_continuation"].eval_docs))
    assert texts["knowledge_continuation"][0].endswith(task.doc_to_choice(doc)[task.doc_to_target(doc)])
    found = find_overlap(texts, ["before", f"so {texts['knowledge_continuation'][1]} it is"])
    assert {name: overlap.found for name, overlap in found.items()} == {
        "knowledge_continuation": 1,
        "retrieval_generation": 0,
        "reasoning_worked": 0,
    }
