"""Data sets that tasks are made of: one description each, read from the Hub, from a local folder, or made on the spot.

A description is a YAML file with a `dataset:` key. It says where rows come from and how a question, its options and its
answer are read out of one; protocols.py makes a task of it under every protocol, so that all ask the same items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from shoal.abilities.item import digest
from shoal.errors import UserError
from shoal.recipe.section import Positive, Section, Text
from shoal.recipe.yaml import YAMLError, read_yaml

from .rows import Doc, Row, as_docs

TaskProtocol = Literal["loglikelihood", "continuation", "generation", "worked", "rolling"]
NUM_ITEMS = 200
"""Bundled items of a task that does not say how many."""
NUM_EXAMPLES = 32
"""Rows of the training split that few-shot prompts draw from: its first ones."""


@dataclass(frozen=True)
class HubData(Section):
    """Where the Hub has the rows."""

    path: Text
    items: Text
    """The split that is scored."""
    name: str | None = None
    """The configuration; {} in it stands for the part."""
    examples: str | None = None
    """The split that few-shot examples come from."""
    part_column: str | None = None
    """Where one configuration holds what others hold apart: the column that tells them apart."""


@dataclass(frozen=True)
class Parts(Section):
    """The tasks a data set falls into: by a number (the dial), or by name."""

    values: Annotated[tuple[int | str, ...], Field(min_length=1)]
    named: Text = "{}"
    """What is put between the data set's name and the protocol's."""
    setting: str | None = None
    """The setting of bundled items that takes the value."""


@dataclass(frozen=True)
class DataSet(Section):
    """One data set. Templates and expressions are jinja's, over the fields of a row."""

    dataset: Text
    about: Text
    """What it asks, in one line."""
    ability: Text
    protocols: tuple[TaskProtocol, ...] = ("loglikelihood", "continuation", "generation")
    version: Text = "1.0"
    family: str | None = None
    """Tasks that differ in their level only, for curves over it; needs parts that are numbers."""
    tags: tuple[Text, ...] = ()
    """Names under which all its tasks can be asked for."""
    parts: Parts | None = None
    bundled: Text | None = None
    """Generator of shoal.abilities, or bundled text of shoal.data.sources, of the rows; else hub or data_dir."""
    settings: dict[str, Any] = field(default_factory=dict)
    num_items: Positive | None = None
    """So many bundled items; None = 200."""
    hub: HubData | None = None
    folder: str | None = None
    """Where eval.data_dir has it; None = the data set's name."""
    items: str | None = None
    """The file in that folder that is scored, JSON lines; {} in it stands for the part."""
    examples: str | None = None
    """The file in that folder that few-shot examples come from."""
    shots: tuple[dict[str, Any], ...] = ()
    """Rows for few-shot examples, written here."""
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    shuffled: bool = True
    """In the order of a hash of their content, so that the first items are a fair sample."""
    keep: str | None = None
    """Expression that is false for rows to leave out, for known defects of the source."""
    question: Text = "{{question}}"
    """Template of the bare question."""
    context: Text | None = None
    """Template of what stands before the answer; None = Question: ... Answer:"""
    options: str | None = None
    """Expression for the list of options."""
    answer: str | None = None
    """Expression for the right option: its position from 0, its text or its letter."""
    beginnings: str | None = None
    """Expression for texts, one per option, after which the likelihood of one and the same ending is taken."""
    ending: str | None = None
    answers: str | None = None
    """Expression for the accepted answers of an open question."""
    worked: str | None = None
    """Template of the worked answer."""
    page: str | None = None
    """Template of running text."""
    metric: Literal["acc", "acc_norm"] = "acc_norm"
    """How options are compared: by likelihood, or by likelihood per character."""
    lettered: bool = True
    """Written answers choose among lettered options; false = they answer the open question."""
    chance: str | float | tuple[str | float, ...] | None = None
    """Share of written answers that a guesser has right who takes one of the possible answers that the prompt names: a
    number or a fraction such as 1/4, {} in it standing for the part, or a list of one for every part. None = 0, and for
    lettered options one over their number."""
    match: Literal["starts", "contains", "exact", "number", "stated"] = "starts"
    """When written text counts as right, see shoal.abilities.matching."""
    shows_work: bool = False
    """Few-shot examples of written answers show the worked answer."""
    stop: tuple[Text, ...] = ("\n",)
    max_new_tokens: Positive = 16

    def __post_init__(self) -> None:
        where = [name for name in ("bundled", "items") if getattr(self, name) is not None]
        if len(where) != 1:
            raise ValueError("needs either bundled, or items (a file in eval.data_dir) with or without hub")
        if self.bundled is None and "rolling" not in self.protocols and self.protocols:
            if (self.options is None) == (self.answers is None):
                raise ValueError("needs options and answer, or answers of an open question")
            if (self.options is None) != (self.answer is None):
                raise ValueError("options and answer belong together; set both")
            if self.options is None and "loglikelihood" in self.protocols:
                raise ValueError("the protocol loglikelihood needs options; leave it out of protocols")
        if (self.beginnings is None) != (self.ending is None):
            raise ValueError("beginnings and ending belong together; set both")
        if "rolling" in self.protocols and (self.page is None or len(self.protocols) > 1):
            raise ValueError("the protocol rolling needs page, and no other protocol beside it")
        if self.chance is not None and "generation" not in self.protocols:
            raise ValueError("chance is that of written answers; leave it out without the protocol generation")
        parts = parts_of(self)
        if isinstance(self.chance, tuple) and len(self.chance) != len(parts):
            raise ValueError(f"chance names {len(self.chance)} numbers for {len(parts)} parts; give one for each")
        for part in parts:
            _ = part.chance
        if self.family is not None and not (self.parts and all(isinstance(v, int) for v in self.parts.values)):
            raise ValueError("family needs parts whose values are numbers")

    @property
    def place(self) -> str:
        """Its folder in eval.data_dir."""
        return self.folder or self.dataset


@dataclass(frozen=True)
class Part:
    """One part of a data set, which is a task under each of its protocols."""

    data: DataSet
    value: int | str | None = None

    @property
    def name(self) -> str:
        """What its tasks are called before the protocol's name."""
        if self.value is None or self.data.parts is None:
            return self.data.dataset
        return f"{self.data.dataset}_{self.data.parts.named.format(self.value)}"

    @property
    def level(self) -> int | None:
        """What the dial stands at."""
        return self.value if isinstance(self.value, int) and self.data.family is not None else None

    @property
    def chance(self) -> float | None:
        """What guessing reaches in writing, where the description says it.

        Raises:
            ValueError: it is no share.
        """
        given = self.data.chance
        if isinstance(given, tuple):
            given = given[self.data.parts.values.index(self.value) if self.data.parts and self.value is not None else 0]
        if given is None:
            return None
        text = str(given).format(self.value)
        try:
            share = float(Fraction(text))
        except (ValueError, ZeroDivisionError):
            share = math.nan
        if not 0 <= share < 1:
            raise ValueError(f"chance is {text!r}; give a number from 0 to below 1, or a fraction such as 1/4")
        return share

    @property
    def items(self) -> str:
        """The file that is scored."""
        return (self.data.items or "").format(self.value)

    @property
    def hub(self) -> HubData | None:
        """Where the Hub has it."""
        found = self.data.hub
        return replace(found, name=found.name and found.name.format(self.value)) if found else None


def parts_of(data: DataSet) -> list[Part]:
    """The parts of a data set; one where it has none."""
    return [Part(data, value) for value in (data.parts.values if data.parts else (None,))]


@cache
def read_data_sets(folder: Path) -> dict[str, DataSet]:
    """The descriptions in a folder and below it, by name.

    Raises:
        UserError: a description that is wrong, or two of one name.
    """
    found: dict[str, DataSet] = {}
    description = TypeAdapter(DataSet)  # takes longer to make than a file to read
    for file in sorted(folder.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if not any(line.startswith("dataset:") for line in text.splitlines()):
            continue
        try:
            data = description.validate_python(read_yaml(text))
        except YAMLError as error:
            raise UserError(f"{file}: is not valid YAML: {error}") from error
        except ValidationError as error:
            raise UserError("\n".join(f"{file}: {_problem(one)}" for one in error.errors())) from error
        if data.dataset in found:
            raise UserError(
                f"{file}: dataset {data.dataset!r} is described in another file of {folder} too; rename one"
            )
        found[data.dataset] = data
    return found


def _problem(found: Any) -> str:
    """One of pydantic's errors in a line, with the key that a wrong one may be meant for."""
    *sections, key = found["loc"] or ("",)
    place = ".".join(map(str, found["loc"]))
    if found["type"] != "unexpected_keyword_argument":
        return f"{place}: {found['msg']} (got {found['input']!r})"
    section = {"hub": HubData, "parts": Parts}.get(str(sections[0]), DataSet) if sections else DataSet
    known = [one.name for one in fields(section)]
    close = get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"{place}: unknown key; " + (
        f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
    )


# --- reading ------------------------------------------------------------------------------------------------------


class MissingFiles(UserError):
    """Files that eval.data_dir lacks: ``files`` by their path in it, each with the data set that is read from it."""

    def __init__(self, data_dir: Path, files: Mapping[str, DataSet]) -> None:
        self.files = dict(files)
        lacking = [f"{path} ({data.dataset!r}; {_what_is_there(data_dir / path)})" for path, data in files.items()]
        hub = [data.dataset for data in files.values() if data.hub]
        whole = f"leave eval.data_dir out to read {', '.join(dict.fromkeys(hub))} from the Hub"
        super().__init__(
            f"eval.data_dir: {str(data_dir)!r} lacks {', '.join(lacking)}; put {'it' if len(files) == 1 else 'them'} "
            f"there (shoal's configs/tasks/README.md says what they hold), "
            + (f"{whole}, or leave their tasks out" if hub else "or leave their tasks out")
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
    from datasets import Dataset

    docs = {split: list(found) for split, found in _docs(part, data_dir, with_examples=with_examples).items()}
    if part.data.shuffled and part.data.bundled is None:
        docs["items"].sort(key=lambda doc: doc["id"])
    return {split: Dataset.from_list(found) for split, found in docs.items()}


def has_examples(part: Part, data_dir: Path | None) -> bool:
    """Whether few-shot examples would be there."""
    data = part.data
    if data.bundled is not None:
        return "rolling" not in data.protocols
    return bool(data.shots) or bool(data.examples if data_dir is not None else data.hub and data.hub.examples)


def _docs(part: Part, data_dir: Path | None, *, with_examples: bool) -> dict[str, Iterator[Doc]]:
    if part.data.bundled is not None:
        return {split: iter(found) for split, found in _bundled(part).items()}
    where, rows = _rows(part, data_dir, with_examples=with_examples)
    if part.data.shots and with_examples:
        rows["examples"] = list(part.data.shots)
    rows = {split: found if split == "items" else found[:NUM_EXAMPLES] for split, found in rows.items()}
    return {split: as_docs(part, found, f"{where} ({split})") for split, found in rows.items()}


def _bundled(part: Part) -> dict[str, list[Doc]]:
    from shoal.abilities import GENERATORS
    from shoal.data.sources import BUNDLED

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
    return _generated(data.bundled, data.num_items or NUM_ITEMS, json.dumps(settings, sort_keys=True))


@cache
def _generated(kind: str, num_items: int, settings: str) -> dict[str, list[Doc]]:
    """The documents of a generator; kept, because the tasks of all protocols ask for the same ones."""
    from shoal.abilities import items

    make = partial(items, kind, seed=0, **json.loads(settings))
    scored, shown = make(split="eval", num_items=num_items), make(split="train", num_items=NUM_EXAMPLES)
    return {
        split: [
            {
                "id": item.id,
                "context": item.context,
                "question": item.question,
                "options": [option.strip() for option in item.options],
                "answer": item.answer,
                "answers": [str(item.params["final"])],
                "worked": str(item.params.get("worked", item.gold.strip())),
            }
            for item in found
        ]
        for split, found in (("items", scored), ("examples", shown))
    }


def _rows(part: Part, data_dir: Path | None, *, with_examples: bool) -> tuple[str, dict[str, list[Row]]]:
    """Where the rows are from, in words, and the rows by split."""
    data, hub = part.data, part.hub
    if data_dir is not None:
        files = {"items": part.items, **({"examples": data.examples} if data.examples and with_examples else {})}
        return f"{data_dir / data.place}", local_rows(data, data_dir, files)
    if hub is None:
        raise UserError(
            f"eval.tasks: {part.name!r} is not on the Hub; set eval.data_dir to a folder with "
            f"{data.place}/{part.items}, or leave the task out"
        )
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
    return {split: _json_lines(folder / name) for split, name in files.items()}


def _json_lines(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
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
    from datasets import load_dataset

    splits = {"items": hub.items, **({"examples": hub.examples} if hub.examples and with_examples else {})}
    try:
        loaded: Any = {split: load_dataset(hub.path, hub.name, split=name) for split, name in splits.items()}
    except Exception as error:  # the Hub, the network and `datasets` raise a dozen unrelated types here
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        raise UserError(
            f"eval.tasks: {part.name!r} cannot be read from the Hub ({hub.path}: {type(error).__name__}: {reason}). "
            f"Check the network, or set eval.data_dir to a folder with {part.data.place}/{part.items}"
        ) from error
    return {split: [dict(row) for row in rows] for split, rows in loaded.items()}
