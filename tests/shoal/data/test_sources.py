"""Where text comes from, and how it becomes rows in which documents cannot see each other.

Covers: shoal.data.packing, shoal.data.streams.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from packed_rows import labels_of
from tiny import KINDS, starting_tokenizer, tiny_model, tiny_moe, tiny_tokenizer

from shoal.data import sources
from shoal.data.bundled import BUNDLED
from shoal.data.chat import Chat
from shoal.data.general_text import ENCYCLOPAEDIA
from shoal.data.packing import IGNORED, PLANES, PackedRows, read_rows
from shoal.data.sources import documents_of as in_memory
from shoal.data.sources import load_texts, opened, sources_fingerprint, texts_fingerprint
from shoal.data.streams import Layout, pack, row_texts
from shoal.errors import UserError
from shoal.recipe.distill import Packing
from shoal.recipe.section import DataSource, Messages, PromptCompletion

TEXTS = ["Erste Zeile.\nZweite.", "Ein zweites Dokument mit Ümläuten.", "3"]
BOS, EOS, PAD = 256, 257, 258


# --- sources


@pytest.mark.prove
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_source_is_the_same_every_time(name: str) -> None:
    if name == "encyclopaedia" and not any(importlib.metadata.distributions(name=ENCYCLOPAEDIA[0])):
        pytest.skip(f"{ENCYCLOPAEDIA[0]} is not installed, which this text is read from")
    texts = load_texts(DataSource(name))
    assert len(texts) > 5
    assert texts == BUNDLED[name]()


def test_a_cache_that_cannot_be_is_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cached(_: Path) -> Any:
        raise FileNotFoundError(2, "No such file or directory", "/proc/x")

    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    monkeypatch.setattr(sources, "_file_rows", cached)
    with pytest.raises(UserError, match="the file is not the cause; set HF_HOME and HF_DATASETS_CACHE"):
        load_texts(DataSource(str(tmp_path / "a.jsonl")))


def test_text_that_takes_seconds_to_make_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    made = []

    def make() -> list[str]:
        made.append(1)
        return TEXTS

    monkeypatch.setitem(BUNDLED, "docstrings", make)
    for _ in range(3):
        sources._bundled.cache_clear()
        assert load_texts(DataSource("docstrings")) == TEXTS
    assert len(made) == 1
    (file,) = (tmp_path / "text").iterdir()
    file.write_text('["torn')
    sources._bundled.cache_clear()
    assert load_texts(DataSource("docstrings")) == TEXTS
    monkeypatch.setattr(sources, "origin", lambda: "other versions")
    sources._bundled.cache_clear()
    assert load_texts(DataSource("docstrings")) == TEXTS
    assert len(made) == 3
    sources._bundled.cache_clear()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the file's ending names."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_every_kind_of_table_is_read(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"x.{ending}", [{"id": f"n{n}", "story": text} for n, text in enumerate(TEXTS[:2])])
    assert load_texts(DataSource(str(path), column="story")) == TEXTS[:2]


def test_folder_with_splits_gives_the_files_of_one(tmp_path: Path) -> None:
    for name in ("test", "train-00000-of-00002", "train-00001-of-00002", "training"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert load_texts(DataSource(str(tmp_path))) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert load_texts(DataSource(str(tmp_path), split="test")) == ["test"]
    (tmp_path / "._part.jsonl").write_bytes(b"\0\5\26\7")  # of macOS, next to each file on a disk that is not its own
    for file in tmp_path.glob("t*.jsonl"):
        file.rename(file.with_name(f"part-{file.name}"))
    assert len(load_texts(DataSource(str(tmp_path)))) == 4


@pytest.mark.parametrize(("setting", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_unreachable_hub_is_explained_within_seconds(monkeypatch: pytest.MonkeyPatch, setting: str, value: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", setting == "HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"huggingface_hub.constants.{setting}", value)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"data 'python_doc': cannot be read .*; did you mean 'python_docs'\?"):
        load_texts(DataSource("python_doc"))
    assert time.monotonic() - start < 10


# --- in memory


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
    documents = in_memory(rows)
    for _ in range(2):
        assert [item.messages if isinstance(item, Chat) else item for item in documents] == expected


def test_of_conversations_alone_the_assistant_is_learnt_unless_all_is_asked_for() -> None:
    assert in_memory([{"messages": TURNS}]).source.assistant_only
    assert not in_memory([{"messages": TURNS}], loss_on="all").source.assistant_only


def test_tool_descriptions_are_those_of_every_row_that_has_them() -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS, "tools": [{"name": "add"}]}]
    assert [chat.tools for chat in in_memory(rows) if isinstance(chat, Chat)] == [None, [{"name": "add"}]]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"text": "a", "messages": TURNS, "prompt": "q", "completion": "a"}, Messages(messages="messages")),
        ({"text": "a", "prompt": "q", "completion": "a"}, PromptCompletion(prompt="prompt", completion="completion")),
        ({"text": "a", "prompt": "q"}, "text"),
    ],
)
def test_a_file_and_a_caller_s_rows_have_the_same_columns(tmp_path: Path, row: dict[str, Any], found: Any) -> None:
    file = write_rows(tmp_path / "x.jsonl", [row])
    assert opened(DataSource(str(file))).column == in_memory([row]).source.column == found
    assert opened(DataSource(str(file), column="other")).column == "other"


def test_a_column_of_a_source_without_columns_is_refused() -> None:
    with pytest.raises(UserError, match=r"data 'python_docs': holds texts without columns; remove column"):
        load_texts(DataSource("python_docs", column="text"))


# --- identity


def test_fingerprint_of_texts_sees_content_order_and_borders() -> None:
    prints = {texts_fingerprint(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["a", "c"])}
    assert len(prints) == 5


def test_fingerprint_of_sources_sees_settings_and_content(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "folder" / "x.jsonl", [{"text": "a"}])
    seen = [
        sources_fingerprint([DataSource(str(file))]),
        sources_fingerprint([DataSource(str(file), weight=2)]),
        sources_fingerprint([DataSource(str(file.parent))]),
        sources_fingerprint([DataSource("python_docs")]),
    ]
    write_rows(file, [{"text": "b"}])
    seen += [sources_fingerprint([DataSource(str(path))]) for path in (file, file.parent)]
    write_rows(file.parent / "y.jsonl", [{"text": "c"}])
    seen += [sources_fingerprint([DataSource(str(file.parent))])]
    assert len(set(seen)) == len(seen)
    assert sources_fingerprint([DataSource("python_docs")]) == seen[3]


# --- packing


def packed(
    *sources: tuple[float, list[str]],
    length: int = 16,
    num_tokens: int = 160,
    seed: int = 0,
    packing: Packing = "wrapped",
    folder: Path | None = None,
    with_sources: bool = False,
    groups: list[int] | None = None,
) -> PackedRows:
    named = [(DataSource(f"source{n}", weight=weight), texts) for n, (weight, texts) in enumerate(sources)]
    return pack(
        named,
        tiny_tokenizer(),
        sequence_length=length,
        num_tokens=num_tokens,
        seed=seed,
        packing=packing,
        layout=Layout(folder, with_sources=with_sources, groups=groups),
    )


def documents_of(rows: PackedRows) -> list[list[int]]:
    """Token lists between the positions that are 0, by the definition of position_ids."""
    documents: list[list[int]] = []
    for ids, positions in zip(rows.input_ids_NS.tolist(), rows.position_ids_NS.tolist(), strict=True):
        assert positions[0] == 0
        for token, position in zip(ids, positions, strict=True):
            if position == 0:
                documents.append([])
            assert position == len(documents[-1])
            documents[-1].append(token)
    return documents


def test_every_token_is_kept_in_order_and_ends_with_the_end_token() -> None:
    texts = [f"document {n} " * (n % 5 + 1) for n in range(30)]
    tokenizer = tiny_tokenizer()
    total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    rows = packed((1, texts), num_tokens=total, length=32)
    stream = rows.input_ids_NS.flatten()[:total].tolist()
    found, start = [], 0
    for end in (index for index, token in enumerate(stream) if token == EOS):
        found.append(tokenizer.decode(stream[start:end]))
        start = end + 1
    assert start == total
    assert sorted(found) == sorted(texts)
    assert found != texts, "the order is shuffled"


def test_labels_are_the_tokens_except_where_a_document_starts() -> None:
    rows = packed((1, TEXTS))
    starts = rows.position_ids_NS == 0
    assert starts.any()
    assert (labels_of(rows)[starts] == IGNORED).all()
    assert torch.equal(labels_of(rows)[~starts], rows.input_ids_NS[~starts].long())
    assert torch.equal(rows[3]["labels"], labels_of(rows)[3])


def test_positions_restart_at_every_document_and_every_row_and_counts_add_up() -> None:
    rows = packed((1, ["a" * 5]), (1, ["b" * 40, "c"]))
    assert sum(count["tokens"] for count in rows.counts.values()) == rows.input_ids_NS.numel()
    documents = documents_of(rows)
    assert all(len({*document} - {EOS}) <= 1 for document in documents), "two texts in one document"
    borders = sum(count["documents"] + count["split"] for count in rows.counts.values())
    assert borders in (len(documents), len(documents) + 1), "a document cut by the very end has no second half"


def test_rows_that_go_on_with_a_document_begin_with_the_start_token_again() -> None:
    texts = ["a" * 40, "b" * 3, "c" * 25]
    rows = pack([(DataSource("x"), texts)], starting_tokenizer(), sequence_length=16, num_tokens=None, seed=0)
    found = documents_of(rows)
    assert all(document[0] == BOS or {*document} == {PAD} for document in found)
    assert not rows[1]["labels"][rows.position_ids_NS[1] == 0].ne(IGNORED).any(), "the start token is not learnt"
    assert sorted(text for _, text in row_texts(rows, starting_tokenizer()) if text) == sorted(texts)
    assert rows.counts["x"]["tokens"] + rows.counts["x"]["padding"] == rows.input_ids_NS.numel()


def test_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    texts = [f"{n} und mehr" for n in range(50)]
    first, again, other = packed((1, texts)), packed((1, texts)), packed((1, texts), seed=1)
    assert torch.equal(first.input_ids_NS, again.input_ids_NS)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_end_token_is_not_doubled_where_the_tokenizer_adds_it() -> None:
    class Adding:
        bos_token_id, eos_token_id = None, EOS

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1, 2, EOS] for _ in texts]}

    rows = pack([(DataSource("x"), TEXTS)], Adding(), sequence_length=6, num_tokens=6, seed=0)
    assert rows.input_ids_NS.tolist() == [[1, 2, EOS, 1, 2, EOS]]


@pytest.mark.parametrize("kind", [*KINDS, "moe"])
def test_documents_in_a_row_cannot_see_each_other(kind: str) -> None:
    model = tiny_moe() if kind == "moe" else tiny_model(kind)
    rows = packed((1, ["x" * 6, "y" * 12, "z" * 9]), length=48, num_tokens=96)
    input_ids, position_ids = rows.input_ids_NS.long(), rows.position_ids_NS.long()
    starts = [index for index in range(48) if position_ids[0, index] == 0]
    assert len(starts) >= 3
    first, last = starts[1], starts[2]
    changed = input_ids.clone()
    changed[0, first:last] = 7
    with torch.inference_mode():
        before = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        after = model(input_ids=changed, position_ids=position_ids, use_cache=False).logits
        alone = model(input_ids=input_ids[:1, first:last], use_cache=False).logits
    same = torch.ones(2, 48, dtype=torch.bool)
    same[0, first:last] = False
    if kind == "moe":  # an expert works through its tokens of all rows together, which rounds differently
        torch.testing.assert_close(before[same], after[same], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])
    torch.testing.assert_close(before[0, first:last], alone[0], rtol=1e-4, atol=1e-5)


# --- whole documents


MANY = ["".join(chr(97 + (n * 7 + i) % 26) for i in range(n % 11 + 1)) for n in range(60)]


def test_best_fit_keeps_documents_whole_and_marks_the_padding() -> None:
    texts = ["abcd", "efghij", "klmn"]  # no sum of their lengths fills a row
    rows = packed((1, texts), num_tokens=16 * 12, packing="bfd")
    assert rows.supervised_NS is not None
    whole = {(*tiny_tokenizer()(text)["input_ids"], EOS) for text in texts}
    padding = learnt = 0
    for document in documents_of(rows):
        if set(document) == {258}:  # the padding token
            padding += len(document)
        else:
            assert tuple(document) in whole
            learnt += len(document) - 1
    count = rows.counts["source0"]
    assert count["padding"] == padding > 0
    assert count["tokens"] + padding == rows.input_ids_NS.numel()
    assert count["supervised"] == learnt == (labels_of(rows) != IGNORED).sum()
    assert count["split"] == 0
    assert padding < 0.15 * rows.input_ids_NS.numel()


@pytest.mark.parametrize("packing", ["wrapped", "bfd"])
def test_groups_of_sources_share_no_row_and_have_their_shares(packing: Packing) -> None:
    sources = [(1.0, ["a" * 7] * 7), (1.0, ["b" * 29] * 2), (6.0, ["c" * 7] * 5)]
    rows, fewer = (
        packed(*sources, num_tokens=16 * number, packing=packing, with_sources=True, groups=[1, 0, 1])
        for number in (400, 90)
    )
    assert rows.sources_NS is not None
    learnt = labels_of(rows) != IGNORED
    in_row = [set(row[own].tolist()) for row, own in zip(rows.sources_NS, learnt, strict=True)]
    assert all(found == {1} or found <= {0, 2} for found in in_row)
    assert any(found == {0, 2} for found in in_row), "sources of one group go together"
    assert sum(found == {1} for found in in_row) == pytest.approx(400 / 8, abs=1)
    assert [row[0].item() == 1 for row in rows.sources_NS] == [found == {1} for found in in_row]
    for plane in ("input_ids_NS", "position_ids_NS"):
        assert torch.equal(getattr(fewer, plane), getattr(rows, plane)[:90])
    assert torch.equal(labels_of(fewer), labels_of(rows)[:90])


# --- larger than memory


@pytest.mark.parametrize("packing", ["wrapped", "bfd"])
def test_rows_go_to_disk_as_they_are_made(tmp_path: Path, packing: Packing) -> None:
    on_disk = packed((1, MANY), packing=packing, folder=tmp_path)
    in_memory = packed((1, MANY), packing=packing)
    assert on_disk.fingerprint == in_memory.fingerprint == read_rows(tmp_path).fingerprint
    assert on_disk.counts == in_memory.counts == read_rows(tmp_path).counts
    assert torch.equal(labels_of(on_disk), labels_of(in_memory))
    names = {file.stem for file in tmp_path.glob("*.npy")}
    assert names == set(PLANES) - ({"sources", "supervised"} if packing == "wrapped" else {"sources"})


@pytest.mark.parametrize("packing", ["wrapped", "bfd"])
def test_rows_say_of_every_token_which_source_it_is_from_and_are_the_same_without(
    tmp_path: Path, packing: Packing
) -> None:
    """Three sources of one letter each, whose documents go on over the borders of rows."""
    sources = [(weight, [letter * n for n in (3, 40, 9)]) for weight, letter in [(1.0, "a"), (2.0, "b"), (1.0, "c")]]
    rows = packed(*sources, packing=packing, with_sources=True)
    on_disk = packed(*sources, packing=packing, folder=tmp_path, with_sources=True)
    assert rows.sources_NS is not None
    assert on_disk.sources_NS is not None
    assert torch.equal(rows.sources_NS, on_disk.sources_NS)
    token = {tiny_tokenizer()(letter)["input_ids"][0]: number for number, letter in enumerate("abc")}
    mixed = 0
    for row in range(len(rows)):
        found = rows[row]
        named = zip(found["input_ids"].tolist(), found["sources"].tolist(), strict=True)
        letters = [(token[letter], source) for letter, source in named if letter in token]
        assert all(expected == source for expected, source in letters)
        mixed += len({source for _, source in letters}) > 1
    assert mixed, "what this is about"
    plain = packed(*sources, packing=packing)
    assert plain.sources_NS is None
    assert "sources" not in plain[0]
    assert plain.fingerprint == rows.fingerprint
    assert plain.counts == rows.counts


@pytest.mark.parametrize("packing", ["wrapped", "bfd"])
def test_without_a_budget_every_document_is_packed_once(packing: Any) -> None:
    texts = [str(number) * (number + 1) for number in range(9)]  # no document is longer than a row
    documents = in_memory(texts)
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
