"""Where text comes from, and how it becomes rows in which documents cannot see each other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny import KINDS, tiny_model, tiny_tokenizer

from shoal import data
from shoal.data import (
    BUNDLED,
    IGNORED,
    PackedRows,
    load_texts,
    pack,
    python_docs,
    sources_fingerprint,
    texts_fingerprint,
)
from shoal.errors import UserError
from shoal.section import DataSource

TEXTS = ["Erste Zeile.\nZweite.", "Ein zweites Dokument mit Ümläuten.", "3"]
EOS = 257


# --- sources


def paragraphs(documents: list[str]) -> set[str]:
    return {paragraph.strip() for text in documents for paragraph in text.split("\n\n")}


def test_python_docs_train_and_held_out_share_no_paragraph() -> None:
    train, held_out = python_docs(held_out=False), python_docs(held_out=True)
    assert not paragraphs(train) & paragraphs(held_out)
    assert sum(map(len, train)) > 200_000
    assert sum(map(len, held_out)) > 20_000
    assert all(text.strip() for text in train + held_out)


@pytest.mark.parametrize("held_out", [False, True])
def test_python_docs_repeat_no_paragraph(held_out: bool) -> None:
    found = [p.strip() for text in python_docs(held_out=held_out) for p in text.split("\n\n") if p.strip()]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_source_is_the_same_every_time(name: str) -> None:
    texts = load_texts(DataSource(name))
    assert len(texts) > 5
    assert texts == BUNDLED[name]()


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


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("Ümläute\n\nund Absätze\n", encoding="utf-8")
    assert load_texts(DataSource(str(tmp_path / "x.txt"))) == ["Ümläute\n\nund Absätze\n"]


def test_folder_is_read_whole_and_in_order_of_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
    write_rows(tmp_path / "a.parquet", [{"text": "a"}])
    (tmp_path / "c.txt").write_text("c")
    (tmp_path / "README.md").write_text("not this")
    assert load_texts(DataSource(str(tmp_path))) == ["a", "b", "c"]


def test_folder_with_splits_gives_the_files_of_one(tmp_path: Path) -> None:
    for name in ("test", "train-00000-of-00002", "train-00001-of-00002", "training"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert load_texts(DataSource(str(tmp_path))) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert load_texts(DataSource(str(tmp_path), split="test")) == ["test"]


def test_blank_and_missing_texts_are_left_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": "  \n"}, {"text": None}, {"text": "a"}])
    assert load_texts(DataSource(str(path))) == ["a"]


def test_reading_stops_after_enough_characters(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": "abcd"}] * 10)
    assert load_texts(DataSource(str(path)), max_characters=9) == ["abcd"] * 3


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"a": "x", "b": "y"}], "text", r"x.jsonl': has no column 'text'; it has a, b"),
        ([{"text": " "}], "text", r"holds no text in column 'text'; name a source that does"),
        ([{"text": [{"role": "user"}]}], "text", r"column 'text' holds list, not text; name a column of text"),
        ([{"text": 3}], "text", r"column 'text' holds int, not text; name a column of text"),
    ],
)
def test_table_without_the_text_is_refused(tmp_path: Path, rows: list[Any], column: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_texts(DataSource(str(write_rows(tmp_path / "x.jsonl", rows)), column=column))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", r"x.jsonl': the file is empty; name a source that holds text"),
        ("x.txt", b" \n", r"x.txt': holds no text in column 'text'"),
        ("x.txt", b"\xff\xfe", r"x.txt': cannot be read \(UnicodeDecodeError: "),
        ("x.jsonl", b'{"text": "a"}\n{"text', r"x.jsonl': cannot be read \("),
        ("x.parquet", b"not parquet", r"x.parquet': cannot be read \("),
        ("x.pdf", b"%PDF", r"x.pdf': cannot read '.pdf' files; use one of .jsonl, .json, .txt, .csv, .parquet"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_texts(DataSource(str(tmp_path / name)))


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder holds no .jsonl, .json, .txt, .csv, .parquet file"):
        load_texts(DataSource(str(tmp_path)))


@pytest.mark.parametrize("name", ["/nowhere/x", "./x", "~/no such file.txt", "x.jsonl"])
def test_missing_file_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"no such file or folder; bundled sources are python_docs, "):
        load_texts(DataSource(name))


def test_teacher_text_outside_of_distilling_is_refused() -> None:
    with pytest.raises(UserError, match=r"data 'teacher_text': is written while distilling, for distill.data only"):
        load_texts(DataSource("teacher_text"))


@pytest.mark.parametrize(("setting", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_unreachable_hub_is_explained_within_seconds(monkeypatch: pytest.MonkeyPatch, setting: str, value: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", setting == "HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"huggingface_hub.constants.{setting}", value)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"data 'python_doc': cannot be read .*; did you mean 'python_docs'\?"):
        load_texts(DataSource("python_doc"))
    assert time.monotonic() - start < 10


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
        sources_fingerprint([DataSource("teacher_text")]),
        sources_fingerprint([DataSource("python_docs"), DataSource("teacher_text")]),
    ]
    write_rows(file, [{"text": "b"}])
    seen += [sources_fingerprint([DataSource(str(path))]) for path in (file, file.parent)]
    write_rows(file.parent / "y.jsonl", [{"text": "c"}])
    seen += [sources_fingerprint([DataSource(str(file.parent))])]
    assert len(set(seen)) == len(seen)
    assert sources_fingerprint([DataSource("python_docs")]) == seen[3]


def test_fingerprint_of_bundled_sources_is_that_of_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources_fingerprint([DataSource("python_docs")])
    data._bundled.cache_clear()
    monkeypatch.setitem(BUNDLED, "python_docs", lambda: ["other"])
    assert sources_fingerprint([DataSource("python_docs")]) != before
    data._bundled.cache_clear()


# --- packing


def packed(*sources: tuple[float, list[str]], length: int = 16, num_tokens: int = 160, seed: int = 0) -> PackedRows:
    named = [(DataSource(f"source{n}", weight=weight), texts) for n, (weight, texts) in enumerate(sources)]
    return pack(named, tiny_tokenizer(), sequence_length=length, num_tokens=num_tokens, seed=seed)


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


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(1, 1), (16, 1), (17, 2), (160, 10)])
def test_budget_is_rounded_up_to_whole_rows(num_tokens: int, num_rows: int) -> None:
    rows = packed((1, TEXTS), num_tokens=num_tokens)
    assert rows.input_ids_NS.shape == rows.position_ids_NS.shape == rows.labels_NS.shape == (num_rows, 16)
    assert len(rows) == num_rows
    assert rows[0]["input_ids"].dtype == rows[0]["position_ids"].dtype == torch.int64


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


def test_positions_restart_at_every_document_and_every_row() -> None:
    texts = ["a" * 5, "b" * 40]
    for document in documents_of(packed((1, texts))):
        assert len({token for token in document if token != EOS}) <= 1, "two texts in one document"


def test_labels_are_the_tokens_except_where_a_document_starts() -> None:
    rows = packed((1, TEXTS))
    starts = rows.position_ids_NS == 0
    assert starts.any()
    assert (rows.labels_NS[starts] == IGNORED).all()
    assert torch.equal(rows.labels_NS[~starts], rows.input_ids_NS[~starts].long())
    assert torch.equal(rows[3]["labels"], rows.labels_NS[3])


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (0.2, 0.5)])
def test_sources_get_their_share_within_one_document(weights: tuple[float, float]) -> None:
    texts = (["a" * 9] * 7, ["b" * 29] * 2)
    rows = packed(*zip(weights, texts, strict=True), num_tokens=4000)
    for index, letter in enumerate("ab"):
        count = sum(token == ord(letter) - 33 for token in rows.input_ids_NS.flatten().tolist())
        assert tiny_tokenizer()(letter)["input_ids"] == [ord(letter) - 33]
        share = count * (len(texts[index][0]) + 1) / len(texts[index][0])
        assert share == pytest.approx(4000 * weights[index] / sum(weights), abs=60)
        assert rows.counts[f"source{index}"]["tokens"] == pytest.approx(share, abs=2)


def test_counts_add_up() -> None:
    rows = packed((1, ["a" * 5]), (1, ["b" * 40, "c"]))
    assert sum(count["tokens"] for count in rows.counts.values()) == rows.input_ids_NS.numel()
    documents = documents_of(rows)
    borders = sum(count["documents"] + count["split"] for count in rows.counts.values())
    assert borders in (len(documents), len(documents) + 1), "a document cut by the very end has no second half"


def test_small_data_is_repeated_in_another_order() -> None:
    texts = [f"{n:02d}" for n in range(20)]
    rows = packed((1, texts), num_tokens=3 * 20 * 3, length=60)
    epochs = rows.input_ids_NS.tolist()
    decoded = [str(tiny_tokenizer().decode(ids)).split("</s>")[:-1] for ids in epochs]
    assert [sorted(epoch) for epoch in decoded] == [texts] * 3
    assert len({tuple(epoch) for epoch in decoded}) == 3


def test_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    texts = [f"{n} und mehr" for n in range(50)]
    first, again, other = packed((1, texts)), packed((1, texts)), packed((1, texts), seed=1)
    assert torch.equal(first.input_ids_NS, again.input_ids_NS)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_longer_budget_starts_with_the_rows_of_the_shorter() -> None:
    short, long = packed((1, TEXTS), (2, ["x" * 50])), packed((1, TEXTS), (2, ["x" * 50]), num_tokens=800)
    assert torch.equal(short.input_ids_NS, long.input_ids_NS[: len(short)])


def test_end_token_is_not_doubled_where_the_tokenizer_adds_it() -> None:
    class Adding:
        eos_token_id = EOS

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1, 2, EOS] for _ in texts]}

    rows = pack([(DataSource("x"), TEXTS)], Adding(), sequence_length=6, num_tokens=6, seed=0)
    assert rows.input_ids_NS.tolist() == [[1, 2, EOS, 1, 2, EOS]]


def test_source_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="every document tokenises to nothing"):
        packed((1, ["", ""]))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_a_row_cannot_see_each_other(kind: str) -> None:
    model = tiny_model(kind)
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
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])
    torch.testing.assert_close(before[0, first:last], alone[0], rtol=1e-4, atol=1e-5)
