"""Data sets in memory: which columns are read, what is refused, and packing that goes through them once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_tokenizer

from shoal.data.chat import Chat
from shoal.data.in_memory import documents_of
from shoal.data.sources import pack
from shoal.errors import UserError

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["one", " ", "two"], ["one", None, "two"]),
        ([{"text": "one", "id": 1}, {"text": None, "id": 2}], ["one", None]),
        (Dataset.from_dict({"text": ["one", "two"]}), ["one", "two"]),
        ([{"messages": TURNS, "text": "not this"}], [TURNS]),
        (Dataset.from_dict({"messages": [TURNS, TURNS]}), [TURNS, TURNS]),
        ([{"prompt": "Why?", "completion": "So."}], [TURNS]),
        ([{"prompt": TURNS[:1], "completion": TURNS[1:]}], [TURNS]),
    ],
)
def test_the_columns_of_the_field_are_read_in_every_pass(rows: Any, expected: list[Any]) -> None:
    documents = documents_of(rows)
    for _ in range(2):
        assert [item.messages if isinstance(item, Chat) else item for item in documents] == expected


def test_of_conversations_the_assistant_is_learnt_unless_all_is_asked_for() -> None:
    assert documents_of([{"messages": TURNS}]).source.assistant_only
    assert not documents_of([{"messages": TURNS}], loss_on="all").source.assistant_only
    assert documents_of([{"messages": TURNS, "tools": []}]).source.tools == "tools"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"data 'dataset': is empty; give texts"),
        ("one text", r"data 'dataset': is str; give a list of texts"),
        (7, r"data 'dataset': is int; give a list of texts"),
        (iter(["one"]), r"data 'dataset': can be gone through only once; make a list of it"),
        ([{"question": "x", "answer": "y"}], r"has the columns question, answer; it needs `messages`"),
        ([3], r"data 'dataset' row 0: is int, neither a text nor a row with columns"),
        (["one", 3], r"data 'dataset' row 1: is int, neither a text nor a row with columns"),
        ([{"text": "one"}, {"text": 3}], r"data 'dataset' row 1: holds int, not text; give strings"),
        ([{"text": "one"}, {"words": 3}], r"data 'dataset' row 1: has no column 'text'; it has words"),
        ([{"messages": "Why?"}], r"data 'dataset' row 0: column 'messages' holds str, not a list of turns"),
    ],
)
def test_what_is_no_data_set_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(documents_of(rows))


def test_the_assistant_is_not_to_be_learnt_of_plain_text() -> None:
    with pytest.raises(UserError, match=r"data 'dataset': loss_on: assistant needs conversations"):
        documents_of(["one"], loss_on="assistant")


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_without_a_budget_every_document_is_packed_once(packing: Any) -> None:
    texts = [str(number) * (number + 1) for number in range(9)]  # no document is longer than a row
    documents = documents_of(texts)
    rows = pack(
        [(documents.source, documents)], tiny_tokenizer(), sequence_length=16, num_tokens=None, seed=0, packing=packing
    )
    (counts,) = rows.counts.values()
    assert counts["documents"] == 9
    assert counts["repeats"] == counts["truncated"] == 0
    assert counts["tokens"] == sum(len(text) + 1 for text in texts)
    assert counts["tokens"] + counts["padding"] == rows.input_ids_NS.numel()
    assert rows.supervised_NS is not None
    ids = rows.input_ids_NS[torch.logical_or(rows.supervised_NS, rows.position_ids_NS == 0)].tolist()
    written = tiny_tokenizer().decode([token for token in ids if token != 258])
    assert sorted(written) == sorted("".join(texts) + "</s>" * 9)
