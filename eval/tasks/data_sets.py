"""Descriptions of the data sets that tasks are made of: one YAML file with a `dataset:` key each.

A description says where rows come from (the Hub, a local folder, one of shoal's generators) and how a question, its
options and its answer are read out of one. documents.py reads the rows, protocols.py makes a task of the data set under
every protocol, so that all ask the same items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from yaml import YAMLError

from shoal.atomic_files import read_text
from shoal.errors import UserError
from shoal.recipe.section import Positive, Section, Text
from shoal.task_words import Column
from shoal.yaml_text import read_yaml

TaskProtocol = Literal["loglikelihood", "continuation", "generation", "worked", "rolling"]
Stamps = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class HubData(Section):
    """Where the Hub has the rows."""

    path: Text
    """Repository of the data set."""
    items: Text
    """Split that is scored."""
    name: str | None = None
    """Configuration; {} in it stands for the part."""
    examples: str | None = None
    """Split that few-shot examples come from."""
    part_column: str | None = None
    """Column that tells apart, within one configuration, what other configurations hold."""


@dataclass(frozen=True)
class Parts(Section):
    """The tasks a data set falls into: by a number (the dial), or by name."""

    values: Annotated[tuple[int | str, ...], Field(min_length=1)]
    """Numbers or names, one for each part."""
    named: Text = "{}"
    """Text between the data set's name and the protocol's; {} in it stands for the value."""
    names: tuple[Text, ...] | None = None
    """Names of the parts' tasks before the protocol's name, one for each value, instead of the data set's name and
    ``named``."""
    setting: str | None = None
    """Setting of the generator that takes the value."""

    def __post_init__(self) -> None:
        if self.names is not None and len(self.names) != len(self.values):
            raise ValueError(f"names has {len(self.names)} entries for {len(self.values)} values; give one for each")


@dataclass(frozen=True)
class Under(Section):
    """Keys of a data set that have another value under one protocol; None = the data set's."""

    family: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None


@dataclass(frozen=True)
class DataSet(Section):
    """One data set. Templates and expressions are jinja's, over the fields of a row."""

    dataset: Text
    """Name, with which those of its tasks begin."""
    about: Text
    """One line on what it asks."""
    ability: Text
    """Ability under which reports list its tasks: retrieval, knowledge, reasoning ..."""
    column: Column | None = None
    """How its items relate to healing text: in = in a form (wording, carrier) that such text may have, twin = in one
    that it never has, out = an ability that it never shows, public = a public benchmark. None = not said where items
    are bundled, public where rows are read."""
    twin_of: Text | None = None
    """Part whose items, by id, its own ask again in another form, as its tasks call it before the protocol; {} in it
    stands for its own part. Only in the column twin."""
    protocols: tuple[TaskProtocol, ...] = ("loglikelihood", "continuation", "generation")
    """Protocols under which it is asked, each a task."""
    under: dict[TaskProtocol, Under] = field(default_factory=dict)
    """Keys that have another value under one protocol: {generation: {num_fewshot: 3}}."""
    version: Text = "1.0"
    """Version of its tasks; scores of two versions are not compared."""
    family: str | None = None
    """Name of a curve over levels, of tasks that differ in their level only; needs parts that are numbers."""
    tags: tuple[Text, ...] = ()
    """Groups: names under which all its tasks can be asked for."""
    parts: Parts | None = None
    """Parts, each with a task per protocol; None = it is one."""
    bundled: Text | None = None
    """Generator of shoal.abilities that makes its items, or bundled text of shoal.data.sources; None = rows are read
    from eval.data_dir or the Hub."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the generator."""
    num_items: Positive | None = None
    """Items that the generator makes; None = 200."""
    hub: HubData | None = None
    """Place on the Hub; None = it is not there."""
    folder: str | None = None
    """Folder in eval.data_dir; None = the data set's name."""
    items: str | None = None
    """File in that folder that is scored, JSON lines; {} in it stands for the part."""
    examples: str | None = None
    """File in that folder that few-shot examples come from."""
    shots: tuple[dict[str, Any], ...] = ()
    """Rows for few-shot examples, written here."""
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    """Few-shot examples before every question."""
    shuffled: bool = True
    """Order of a hash of the items' content, so that the first ones are a fair sample; false = as they come."""
    keep: str | None = None
    """Expression that is false for rows to leave out, for known defects of the source."""
    question: Text = "{{question}}"
    """Template of the bare question."""
    context: Text | None = None
    """Template of the text before the answer; None = Question: ... Answer:"""
    options: str | None = None
    """Expression for the list of options."""
    answer: str | None = None
    """Expression for the right option: its position from 0, its text or its letter."""
    beginnings: str | None = None
    """Expression for texts, one per option, after which the likelihood of one and the same ending is taken."""
    ending: str | None = None
    """Template of that ending."""
    answers: str | None = None
    """Expression for the accepted answers of an open question."""
    worked: str | None = None
    """Template of the worked answer."""
    page: str | None = None
    """Template of running text."""
    metric: Literal["acc", "acc_norm"] = "acc_norm"
    """Measure by which options are compared: likelihood, or likelihood per character."""
    lettered: bool = True
    """Choice among lettered options in written answers; false = they answer the open question."""
    chance: str | float | tuple[str | float, ...] | None = None
    """Share of written answers that a guesser has right who takes one of the possible answers that the prompt names: a
    number or a fraction such as 1/4, {} in it standing for the part, or a list of one for every part. None = 0, and for
    lettered options one over their number."""
    match: Literal["starts", "contains", "exact", "number", "last", "stated"] = "starts"
    """Rule by which written text counts as right, see TEXT_MATCHES in protocols.py."""
    shows_work: bool = False
    """Worked answers in the few-shot examples of written answers."""
    expects_work: bool = False
    """Worked answer as the written answer that reports expect and few-shot examples show; false = the short one."""
    stop: tuple[Text, ...] = ("\n",)
    """Texts that end a written answer."""
    max_new_tokens: Positive = 16
    """Tokens of a written answer at most."""

    def __post_init__(self) -> None:
        if (self.bundled is None) == (self.items is None):
            raise ValueError("needs either bundled, or items (a file in eval.data_dir) with or without hub")
        if self.bundled is None and "rolling" not in self.protocols and self.protocols:
            if (self.options is None) == (self.answers is None):
                raise ValueError("needs options and answer, or answers of an open question")
            if (self.options is None) != (self.answer is None):
                raise ValueError("options and answer belong together; set both")
            if self.options is None and "loglikelihood" in self.protocols:
                raise ValueError("the protocol loglikelihood needs options; leave it out of protocols")
        if self.twin_of is not None and self.column != "twin":
            raise ValueError(f"twin_of needs column: twin (got column: {self.column or 'none'})")
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
        if any(part.level is None and part.family(protocol) for part in parts for protocol in self.protocols):
            raise ValueError("family needs parts whose values are numbers")
        if idle := sorted(self.under.keys() - set(self.protocols)):
            raise ValueError(f"under names {', '.join(idle)}, which protocols does not; leave it out, or add it there")

    @property
    def place(self) -> str:
        """Folder in eval.data_dir."""
        return self.folder or self.dataset


@dataclass(frozen=True)
class Part:
    """One part of a data set, which is a task under each of its protocols."""

    data: DataSet
    value: int | str | None = None

    @property
    def name(self) -> str:
        """What its tasks are called before the protocol's name."""
        parts = self.data.parts
        if self.value is None or parts is None:
            return self.data.dataset
        if parts.names is not None:
            return parts.names[parts.values.index(self.value)]
        return f"{self.data.dataset}_{parts.named.format(self.value)}"

    @property
    def level(self) -> int | None:
        """Number at which the dial stands."""
        return self.value if isinstance(self.value, int) else None

    def family(self, protocol: TaskProtocol) -> str | None:
        """Curve over levels to which its task under ``protocol`` belongs."""
        return self._under(protocol).family or self.data.family

    def num_fewshot(self, protocol: TaskProtocol) -> int:
        """Few-shot examples that its task under ``protocol`` shows."""
        number = self._under(protocol).num_fewshot
        return self.data.num_fewshot if number is None else number

    def _under(self, protocol: TaskProtocol) -> Under:
        return self.data.under.get(protocol, Under())

    @property
    def chance(self) -> float | None:
        """Share that guessing reaches in writing, where the description says it.

        Raises:
            ValueError: it is no share.
        """
        data, chance = self.data, self.data.chance
        if isinstance(chance, tuple):
            chance = chance[data.parts.values.index(self.value) if data.parts and self.value is not None else 0]
        if chance is None:
            return None
        text = str(chance).format(self.value)
        try:
            share = float(Fraction(text))
        except (ValueError, ZeroDivisionError):
            share = math.nan
        if not 0 <= share < 1:
            raise ValueError(f"chance is {text!r}; give a number from 0 to below 1, or a fraction such as 1/4")
        return share

    @property
    def column(self) -> Column | Literal[""]:
        """How its items relate to healing text; empty = not said."""
        return self.data.column or ("public" if self.data.bundled is None else "")

    def twin_of(self, protocol: TaskProtocol) -> str:
        """Task under ``protocol`` that asks the same items in a form that healing text may have; empty = none."""
        if not self.data.twin_of:
            return ""
        return f"{self.data.twin_of.format(self.value)}_{protocol}"

    @property
    def items(self) -> str:
        """File that is scored."""
        return (self.data.items or "").format(self.value)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths in eval.data_dir of the rows and of the examples that are shown unasked."""
        data = self.data
        shown = data.examples and any(self.num_fewshot(protocol) for protocol in data.protocols)
        return (f"{data.place}/{self.items}", *([f"{data.place}/{data.examples}"] if shown else []))

    @property
    def hub(self) -> HubData | None:
        """Place on the Hub."""
        hub = self.data.hub
        return replace(hub, name=hub.name and hub.name.format(self.value)) if hub else None


def parts_of(data: DataSet) -> list[Part]:
    """The parts of a data set; one where it has none."""
    return [Part(data, value) for value in (data.parts.values if data.parts else (None,))]


def yaml_files(folder: Path) -> Stamps:
    """Name, time and size of every YAML file in a folder and below it: what is read of them is kept while these stay,
    and no longer, since a notebook asks again after a file was edited."""
    stats = ((file, file.stat()) for file in sorted(folder.rglob("*.yaml")))
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats)


def read_data_sets(folder: Path) -> dict[str, DataSet]:
    """The descriptions in a folder and below it, by name.

    Raises:
        UserError: a description that is wrong, or two of one name.
    """
    return _data_sets_in(folder, yaml_files(folder))


@cache
def _data_sets_in(folder: Path, files: Stamps) -> dict[str, DataSet]:
    described: dict[str, DataSet] = {}
    description = TypeAdapter(DataSet)  # takes longer to make than a file to read
    for file in (Path(name) for name, *_ in files):
        text = read_text(file)
        if not any(line.startswith("dataset:") for line in text.splitlines()):
            continue
        try:
            data = description.validate_python(read_yaml(text))
        except YAMLError as error:
            raise UserError(f"{file}: is not valid YAML: {error}") from error
        except ValidationError as error:
            raise UserError("\n".join(f"{file}: {_problem(problem)}" for problem in error.errors())) from error
        if data.dataset in described:
            raise UserError(
                f"{file}: dataset {data.dataset!r} is described in another file of {folder} too; rename one"
            )
        described[data.dataset] = data
    return described


def _problem(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in a line, with the key that a wrong one may be meant for."""
    *sections, key = error["loc"] or ("",)
    place = ".".join(map(str, error["loc"]))
    if error["type"] != "unexpected_keyword_argument":
        return f"{place}: {error['msg']} (got {error['input']!r})"
    section = {"hub": HubData, "parts": Parts, "under": Under}.get(str(sections[0]), DataSet) if sections else DataSet
    known = [setting.name for setting in fields(section)]
    close = get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"{place}: unknown key; " + (
        f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
    )
