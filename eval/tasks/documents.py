"""Documents of a data set as lm-eval takes them: its rows from the Hub or a local folder, or a generator's items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from shoal.abilities import ALL_SCORED, GENERATORS, items
from shoal.abilities.item import digest
from shoal.atomic_files import read_text
from shoal.data.bundled import BUNDLED
from shoal.errors import UserError
from shoal.formatting import listed

from .data_sets import DataSet, HubData, Part
from .rows import Doc, Row, as_docs

NUM_ITEMS = 200
"""Items that a generator makes for a task that does not say how many."""
NUM_EXAMPLES = 32
"""Rows of the training split that few-shot prompts draw from: its first ones."""
LEAVE_OUT = "leave their tasks out"
"""What a user can do about data that cannot be had."""


class UnreadHub(UserError):
    """Rows that could not be had from the Hub."""


class MissingFiles(UserError):
    """Files that eval.data_dir lacks: ``files`` by their path in it, each with the data set that is read from it.

    ``on_hub`` says whether the Hub has all that is asked, ``instead`` what else the user can do.
    """

    def __init__(
        self, data_dir: Path, files: Mapping[str, DataSet], *, on_hub: bool = False, instead: str = LEAVE_OUT
    ) -> None:
        self.files = dict(files)
        lacking = [f"{path} ({data.dataset!r}; {_what_is_there(data_dir / path)})" for path, data in files.items()]
        from_hub = f"leave eval.data_dir out to read {listed(dict.fromkeys(data.dataset for data in files.values()))}"
        super().__init__(
            f"eval.data_dir: {str(data_dir)!r} lacks {', '.join(lacking)}; put {'it' if len(files) == 1 else 'them'} "
            f"there (shoal's configs/tasks/README.md says what they hold), "
            + (f"{from_hub} from the Hub, " if on_hub else "")
            + f"or {instead}"
        )


def _what_is_there(file: Path) -> str:
    """What lies where a missing file should be."""
    if not file.parent.is_dir():
        return "there is no such folder"
    return (
        f"its folder holds {', '.join(sorted(other.name for other in file.parent.glob('*.jsonl'))) or 'no .jsonl file'}"
    )


def read_splits(part: Part, data_dir: Path | None, *, with_examples: bool, **_: Any) -> Any:
    """The splits `items` and, if asked for, `examples`, as lm-eval documents; lm-eval passes what it likes.

    Raises:
        UserError: data that is not there or empty, or a row without a question or with an answer outside its options.
    """
    splits = {split: list(docs) for split, docs in _docs(part, data_dir, with_examples=with_examples).items()}
    if part.data.shuffled and part.data.bundled is None:
        splits["items"].sort(key=lambda doc: doc["id"])
    return {split: Dataset.from_list(docs) for split, docs in splits.items()}


def has_examples(part: Part, data_dir: Path | None) -> bool:
    """Whether few-shot examples would be there."""
    data = part.data
    if data.bundled is not None:
        return "rolling" not in data.protocols and data.bundled not in ALL_SCORED
    return bool(data.shots) or bool(data.examples if data_dir is not None else data.hub and data.hub.examples)


def _docs(part: Part, data_dir: Path | None, *, with_examples: bool) -> dict[str, Iterator[Doc]]:
    if part.data.bundled is not None:
        return {split: iter(docs) for split, docs in _bundled(part, with_examples=with_examples).items()}
    where, rows = _rows(part, data_dir, with_examples=with_examples)
    if part.data.shots and with_examples:
        rows["examples"] = list(part.data.shots)
    if "examples" in rows:
        rows["examples"] = rows["examples"][:NUM_EXAMPLES]
    return {split: as_docs(part, split_rows, f"{where} ({split})") for split, split_rows in rows.items()}


def _bundled(part: Part, *, with_examples: bool) -> dict[str, list[Doc]]:
    data = part.data
    assert data.bundled is not None
    if data.bundled in BUNDLED:
        return {"items": [{"id": digest(text)[:16], "page": text} for text in BUNDLED[data.bundled]()]}
    if data.bundled not in GENERATORS:
        raise UserError(
            f"data set {data.dataset!r}: bundled is {data.bundled!r}; choose one of "
            f"{', '.join([*GENERATORS, *BUNDLED])}"
        )
    settings = dict(data.settings)
    if data.parts and data.parts.setting:
        settings[data.parts.setting] = part.value
    written = json.dumps(settings, sort_keys=True)
    parts = {"items": _generated(data.bundled, "eval", data.num_items or NUM_ITEMS, written)}
    return parts | ({"examples": _generated(data.bundled, "train", NUM_EXAMPLES, written)} if with_examples else {})


@cache
def _generated(kind: str, split: str, num_items: int, settings: str) -> list[Doc]:
    """The documents of a generator; kept, because the tasks of all protocols ask for the same ones."""
    return [
        {
            "id": item.id,
            "context": item.context,
            "question": item.question,
            "options": [option.strip() for option in item.options],
            "answer": item.answer,
            "answers": [str(item.params["final"])],
            "worked": str(item.params.get("worked", item.gold.strip())),
        }
        for item in items(kind, split=split, num_items=num_items, seed=0, **json.loads(settings))
    ]


def _rows(part: Part, data_dir: Path | None, *, with_examples: bool) -> tuple[str, dict[str, list[Row]]]:
    """Where the rows are from, in words, and the rows by split."""
    data, hub = part.data, part.hub
    if data_dir is not None:
        files = {"items": part.items, **({"examples": data.examples} if data.examples and with_examples else {})}
        return f"{data_dir / data.place}", local_rows(data, data_dir, files)
    assert hub is not None, "refused where tasks are loaded"
    return hub.path, _hub_rows(part, hub, with_examples=with_examples)


def local_rows(data: DataSet, data_dir: Path, files: Mapping[str, str]) -> dict[str, list[Row]]:
    """The rows of ``files`` (split -> name) of one data set in ``data_dir``.

    Raises:
        MissingFiles: the folder or files in it are missing.
        UserError: a file is empty, or no JSON lines.
    """
    folder = data_dir / data.place
    missing = [name for name in files.values() if not (folder / name).is_file()]
    if missing:
        raise MissingFiles(data_dir, {f"{data.place}/{name}": data for name in missing})
    stats = {split: (folder / name, (folder / name).stat()) for split, name in files.items()}
    return {split: list(_json_lines(file, stat.st_mtime_ns, stat.st_size)) for split, (file, stat) in stats.items()}


@lru_cache(maxsize=2)  # lm-eval's 57 subjects of MMLU read the same two files one after the other
def _json_lines(file: Path, _changed_at: int, _size: int) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: is no JSON ({error.msg}); write one object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: is {type(row).__name__}, not an object; write one object per line")
        rows.append(row)
    if not rows:
        raise UserError(f"{file}: holds no rows; a task needs at least one item, so replace the file or leave it out")
    return rows


def _hub_rows(part: Part, hub: HubData, *, with_examples: bool) -> dict[str, list[Row]]:
    splits = {"items": hub.items, **({"examples": hub.examples} if hub.examples and with_examples else {})}
    try:
        loaded: Any = {split: load_dataset(hub.path, hub.name, split=name) for split, name in splits.items()}
    except Exception as error:  # the Hub, the network and `datasets` raise a dozen unrelated types here
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        raise UnreadHub(
            f"eval.tasks: {part.name!r} cannot be read from the Hub ({hub.path}: {type(error).__name__}: {reason})"
        ) from error
    return {split: [dict(row) for row in rows] for split, rows in loaded.items()}
