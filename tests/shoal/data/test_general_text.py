"""Text that comes with Python and its packages: prose, each paragraph once, and nothing that evaluation asks for."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import pytest
from cases import cases
from evaluations import load_tasks

from shoal.abilities import GENERATORS
from shoal.data import general_text
from shoal.data.contamination import find_overlap
from shoal.data.general_text import QUESTIONS, docstrings, instructions, python_docs, readmes
from shoal.errors import UserError
from shoal.eval.harness.samples import item_texts
from shoal.eval.tasks.names import described_tasks, task_folders

CASES = cases(__file__)

GENERAL = {"docstrings": docstrings, "readmes": readmes, "instructions": instructions}


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    found = {name: read() for name, read in GENERAL.items()}
    assert len(found["instructions"]) > 5000
    return found


def paragraphs(documents: list[str]) -> list[str]:
    """All paragraphs, without their line breaks."""
    found = [" ".join(paragraph.split()) for text in documents for paragraph in text.split("\n\n")]
    return [paragraph for paragraph in found if paragraph]


def test_python_docs_train_and_held_out_share_no_paragraph() -> None:
    train, held_out = python_docs(held_out=False), python_docs(held_out=True)
    assert not set(paragraphs(train)) & set(paragraphs(held_out))
    assert sum(map(len, train)) > 200_000
    assert sum(map(len, held_out)) > 20_000
    assert all(text.strip() for text in train + held_out)


@pytest.mark.prove
def test_no_paragraph_is_held_out_or_stands_twice(texts) -> None:
    held_out = set(paragraphs(python_docs(held_out=True)))
    for name in ("docstrings", "readmes"):
        found = [re.sub(r"^[\w.]+: ", "", paragraph) for paragraph in paragraphs(texts[name])]
        assert not set(found) & held_out, name
        assert len(found) == len(set(found)), name
    answers = [text.split("\n\n", 1)[1] for text in texts["instructions"]]
    assert not set(answers) & held_out
    assert len(answers) == len(set(answers))


def test_what_is_held_out_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept_back = next(p for p in paragraphs(python_docs(held_out=True)) if general_text._prose(p) and len(p) > 150)
    source = f'"""{kept_back}"""\n\ndef f():\n    """{kept_back}\n\n    {"And what nobody held back. " * 8}"""\n'
    with_library(monkeypatch, tmp_path, {"a.py": source})
    assert docstrings() == [f"f: {('And what nobody held back. ' * 8).strip()}"]


@pytest.mark.prove
def test_no_item_of_a_bundled_task_stands_in_the_text(texts) -> None:
    described, _ = described_tasks(task_folders(None))
    parts = {data.dataset: name for name, (data, _) in described.items() if data.bundled}  # all protocols ask the same
    assert {described[name][0].bundled for name in parts.values()} >= {*GENERATORS, "python_docs_heldout"}
    tasks = load_tasks([*parts.values()])
    items = item_texts(tasks, {name: len(task.eval_docs) for name, task in tasks.items()})
    found = find_overlap(items, (text for documents in texts.values() for text in documents))
    assert {task: overlap.examples for task, overlap in found.items() if overlap.found} == {}


@pytest.mark.slow
def test_instructions_are_questions_about_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    part_of_python(monkeypatch, {"numpy": "numpy"}, Path(sysconfig.get_paths()["stdlib"]) / "asyncio")
    wordings = [re.escape(wording).replace(r"\{\}", r"`([\w.]+)`(?: of \w+)?") for wording in QUESTIONS]
    asked = [[re.fullmatch(w, text.split("\n\n")[0]) for w in wordings] for text in instructions()]
    assert len(asked) > 300
    for of_text in asked:
        (found,) = filter(None, of_text)
        assert "._" not in f".{found[1]}"
    shares = [sum(bool(of_text[index]) for of_text in asked) / len(asked) for index in range(len(wordings))]
    assert min(shares) > 0.5 / len(wordings)


@pytest.mark.parametrize(("paragraph", "prose"), CASES)
def test_prose_is_told_from_everything_else(paragraph: str, prose: str) -> None:
    assert general_text._prose(paragraph) == prose


def with_library(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    """Python's library is these files, and no package is installed."""
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    part_of_python(monkeypatch, {}, folder)


def part_of_python(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], library: Path) -> None:
    """Text comes from these packages and this library alone."""
    monkeypatch.setattr(general_text, "PACKAGES", packages)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(general_text, "_documented", general_text._documented.__wrapped__)


def test_a_machine_without_any_text_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_library(monkeypatch, tmp_path, {"a.py": "x = 1\n"})
    for name, read in GENERAL.items():
        with pytest.raises(UserError, match=rf"data '{name}': .* hold no text on this machine; install shoal's"):
            read()
