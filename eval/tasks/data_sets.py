"""Descriptions of the data sets that tasks are made of: one YAML file with a `dataset:` key each.

A description says where rows come from (the Hub, a local folder, one of shoal's generators) and how a question, its
options and its answer are read out of one. documents.py reads the rows, protocols.py makes a task of the data set under
every protocol, so that all ask the same items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from yaml import YAMLError

from shoal.atomic_files import read_text
from shoal.errors import UserError
from shoal.recipe.messages import checked
from shoal.recipe.section import Positive, Section, Text
from shoal.task_words import Column
from shoal.yaml_text import read_yaml

INSTRUCTED = "instructed"
"""Generator whose items have a rule each."""
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


NUM_EXAMPLES = 32
"""Rows of the training split that few-shot prompts draw from: its first ones."""


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
    """How its items relate to training text: in = in a wording that such text may have, reworded = in one that
    it never has, out = an ability that it never shows, public = a public benchmark. None = not said where items
    are bundled, public where rows are read."""
    reworded_of: Text | None = None
    """Part whose items, by id, its own ask again in another wording, as its tasks call it before the protocol; {} in it
    stands for its own part. Only in the column reworded."""
    protocols: tuple[TaskProtocol, ...] = ("loglikelihood", "continuation", "generation")
    """Protocols under which it is asked, each a task."""
    under: dict[TaskProtocol, Under] = field(default_factory=dict)
    """Keys that have another value under one protocol: {generation: {num_fewshot: 3}}."""
    family: str | None = None
    """Name of a curve over levels, of tasks that differ in their level only; needs parts that are numbers."""
    tags: tuple[Text, ...] = ()
    """Groups: names under which all its tasks can be asked for."""
    parts: Parts | None = None
    """Parts, each with a task per protocol; None = it is one."""
    level: int | None = None
    """Number at which the dial stands, of a data set without parts; parts that are numbers have theirs."""
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
    match: Literal["starts", "contains", "exact", "number", "last", "stated", "rule"] = "starts"
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
        if self.parts is not None:  # what is wrong shows in them
            parts_of(self)
            return
        protocols = set(self.protocols)
        reads_rows = self.bundled is None and protocols and "rolling" not in protocols
        idle = sorted(self.under.keys() - protocols)
        # question with options, open question, running text: by which of these keys there are
        given = tuple(getattr(self, key) is not None for key in ("options", "answer", "answers"))
        for is_wrong, rule in (
            ((self.bundled is None) == (self.items is None), "needs either bundled, or items (with or without hub)"),
            (
                reads_rows and given not in ((True, True, False), (False, False, True)),
                "needs options and answer, or answers of an open question",
            ),
            (reads_rows and self.options is None and "loglikelihood" in protocols, "loglikelihood needs options"),
            ((self.beginnings is None) != (self.ending is None), "beginnings and ending belong together; set both"),
            (
                "rolling" in protocols and (self.page is None or len(protocols) > 1),
                "the protocol rolling needs page, and excludes other protocols",
            ),
            (
                self.reworded_of is not None and self.column != "reworded",
                f"reworded_of needs column: reworded (got column: {self.column or 'none'})",
            ),
            (
                self.match == "rule" and self.bundled != INSTRUCTED,
                f"match: rule needs bundled: {INSTRUCTED}, which has items with rules; choose another match",
            ),
            (self.chance is not None and "generation" not in protocols, "chance applies only to written answers"),
            (isinstance(self.chance, tuple), "chance is a list, but there are no parts; give one number"),
            (
                self.level is None and any(map(self.family_under, protocols)),
                "family needs parts with numbers as values",
            ),
            (idle, f"under names {', '.join(idle)}, which protocols does not list; remove it, or add it there"),
        ):
            if is_wrong:
                raise ValueError(rule)
        if self.chance is not None:
            share(str(self.chance))

    @property
    def place(self) -> str:
        """Folder in eval.data_dir."""
        return self.folder or self.dataset

    def family_under(self, protocol: TaskProtocol) -> str | None:
        """Curve over levels to which its task under ``protocol`` belongs."""
        return self.under.get(protocol, Under()).family or self.family

    def shots_under(self, protocol: TaskProtocol) -> int:
        """Few-shot examples that its task under ``protocol`` shows."""
        own = self.under.get(protocol, Under()).num_fewshot
        return self.num_fewshot if own is None else own

    def reworded_under(self, protocol: TaskProtocol) -> str:
        """Task under ``protocol`` that asks the same items in a wording that training text may have; empty = none."""
        return f"{self.reworded_of}_{protocol}" if self.reworded_of else ""


def parts_of(data: DataSet) -> list[DataSet]:
    """The parts of a data set, each as one of its own, with its value wherever {} stands; itself where it has none."""
    parts, chances = data.parts, data.chance
    if parts is None:
        return [_part(data, data.dataset, data.level, chances)]
    if not isinstance(chances, tuple):
        chances = (chances,) * len(parts.values)
    if len(chances) != len(parts.values):
        raise ValueError(f"chance names {len(chances)} numbers for {len(parts.values)} parts; give one for each")
    named = parts.names or tuple(f"{data.dataset}_{parts.named.format(value)}" for value in parts.values)
    return [_part(data, *part) for part in zip(named, parts.values, chances, strict=True)]


def _part(data: DataSet, name: str, value: int | str | None, chance: Any) -> DataSet:
    hub, setting = data.hub, data.parts and data.parts.setting
    return replace(
        data,
        dataset=name,
        folder=data.place,
        parts=None,
        level=value if isinstance(value, int) else None,
        column=data.column or ("public" if data.bundled is None else None),
        reworded_of=data.reworded_of and data.reworded_of.format(value),
        settings={**data.settings, setting: value} if setting else data.settings,
        hub=hub and replace(hub, name=hub.name and hub.name.format(value)),
        items=data.items and data.items.format(value),
        chance=None if chance is None else share(str(chance).format(value)),
    )


def share(chance: str | float) -> float:
    """A number from 0 to below 1, which may be written as a fraction.

    Raises:
        ValueError: it is none.
    """
    try:
        number = float(Fraction(str(chance).replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(f"chance is {chance!r}; give a number from 0 to below 1, or a fraction such as 1/4")
    return number


def yaml_files(folder: Path) -> Stamps:
    """Name, time and size of every YAML file in a folder and below it: what is read of them is kept while these stay,
    and no longer, since a notebook asks again after a file was edited."""
    stats = ((file, file.stat()) for file in sorted(folder.rglob("*.yaml")))
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats)


def read_data_sets(folder: Path) -> dict[str, DataSet]:
    """The data sets that are described in a folder and below it, by name; each part is one of its own.

    Raises:
        UserError: a description that is wrong, or two of one name.
    """
    return _data_sets_in(folder, yaml_files(folder))


@cache
def _data_sets_in(folder: Path, files: Stamps) -> dict[str, DataSet]:
    described: dict[str, DataSet] = {}
    for file in (Path(name) for name, *_ in files):
        text = read_text(file).removeprefix("\ufeff")
        if not any(line.startswith("dataset:") for line in text.splitlines()):
            continue
        try:
            data = checked(DataSet, read_yaml(text), source=str(file))
        except YAMLError as error:
            raise UserError(f"{file}: is not valid YAML: {error}") from error
        for part in parts_of(data):
            if part.dataset in described:
                raise UserError(f"{file}: dataset {part.dataset!r} is described in another file there too; rename one")
            described[part.dataset] = part
    return described
