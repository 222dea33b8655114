"""What every section of a recipe is made of: strict keys and types, what each key shapes, data sources."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from functools import cache
from typing import Annotated, Any, Literal, cast, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter
from pydantic_core import CoreSchema, PydanticKnownError
from pydantic_core.core_schema import no_info_before_validator_function

Positive = Annotated[int, Field(gt=0)]
RowLength = Annotated[int, Field(ge=2, description="Tokens of one row, at least 2.")]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NAME_BYTES = 255
"""Bytes of the name of a file or folder, at most."""


def plain_path(text: str) -> str:
    """``text``, which names a path as it is."""
    if not text.strip():
        raise ValueError(f"is blank (got {text!r})")
    if max(len(name.encode()) for name in text.split("/")) > NAME_BYTES:
        raise ValueError(f"is longer than a path can be: {len(text):,} characters; write the path, or texts as a list")
    if found := re.search(r"\$(\w+|\{\w+\})", text):
        raise ValueError(f"holds {found[0]}, and variables are not expanded in paths; write the path (got {text!r})")
    return text


def plain_value(value: Any) -> Any:
    """``value`` as a file would give it, and so what it holds: paths as text, numbers of numpy as Python's, arrays as
    lists."""
    if isinstance(value, Mapping):
        return {key: plain_value(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(own) for own in value]
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    is_array = hasattr(value, "tolist") and not isinstance(value, type)
    return value.tolist() if is_array else value


Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(plain_path)]
"""A path, or what may stand in place of one."""


Index = Annotated[int, Field(strict=True)]
"""The number of a layer, which 1.0 is not."""
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
"""What numpy and torch take for a seed."""


def _once(values: Any) -> Any:
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise ValueError(f"names {twice[0]} twice; name each once")
    return values


Once = AfterValidator(_once)
"""No entry of a list is there twice."""
Layers = Annotated[tuple[Index, ...], Once]
one_or_more = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
"""A word is short for a list of it."""
Dtype = Literal["fast", "stored", "float32", "bfloat16", "float16"]
"""Precision of a model that is run: by name, as its checkpoint stores it, or, fast, what the device multiplies fast in
(see shoal.machine)."""

TOO_LARGE = 2**63
"""What neither numpy nor torch count to."""


class Section:
    """Refuses unknown keys, of which TypeAdapter alone would train with the default, and values of another type.

    Pydantic's own strictness would refuse what YAML has no other way to say: a list for a tuple, 1e6 for 1000000.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        return _strict(handler(source))


def _strict(schema: Any) -> Any:
    """``schema`` whose numbers are given as numbers and whose booleans as booleans: no "1024", no true for 1."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_strict, schema))
    if not isinstance(schema, dict):
        return schema
    inner = {key: _strict(value) for key, value in schema.items()}
    if schema.get("type") == "bool":
        return {**inner, "strict": True}
    if schema.get("type") not in ("int", "float"):
        return inner
    kind = f"{schema['type']}_type"

    def number(value: Any) -> Any:
        if isinstance(value, str | bool):
            raise PydanticKnownError(kind)  # pyright: ignore[reportArgumentType]
        return value

    bounded = inner if schema["type"] == "float" else {"lt": TOO_LARGE, **inner}
    return no_info_before_validator_function(number, cast(CoreSchema, bounded))


class Shapes(Flag):
    """What a setting has a part in, said beside its type: `Annotated[Positive, Shapes.TRAINING]`.

    The settings that shape a result are its identity: with another value of one of them it is made again. Every key of
    a recipe says what it shapes; what a list of sections shapes, all keys of these sections do.
    """

    NOTHING = 0
    """How the work is done, and no number of any result."""
    BY_CONTENT = auto()
    """Results, by what the setting stands for and not by its value: the content of a file, the tasks of a suite. The
    stage that reads it adds this to the identity."""
    IMPORTANCE = auto()
    """importance.json."""
    PLAN = auto()
    """plan.json and student/."""
    SIGNALS = auto()
    """What `shoal record` writes."""
    TEXT = auto()
    """What the teacher writes before training."""
    ROWS = auto()
    """Packed rows of the training text."""
    TRAINING = auto()
    """distill.json and distilled/."""
    SCORES = auto()
    """Scores of tasks: eval/<role>.json, and in measure.sweep those of every variant, which are in importance.json."""
    PERPLEXITY = auto()
    """The score of running text among them."""
    SPEED = auto()
    """eval/speed.json."""
    NUMBERS = IMPORTANCE | PLAN | TEXT | TRAINING | SCORES
    """What comes of running a model."""


RENAMED = {"attn_implementation": "attention"}
"""Key -> its name in identities where that is another: a key that is called anew keeps it, so that what was made before
stands."""


@cache
def types_of(section: Any) -> dict[str, Any]:
    """Key of a class of sections -> its type, with what is said beside it."""
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@cache
def shaped(section: Any) -> dict[str, Shapes | None]:
    """What every key of a class of sections says that it shapes; None = nothing is said."""
    said = {key: getattr(hint, "__metadata__", ()) for key, hint in types_of(section).items()}
    return {key: next((mark for mark in marks if isinstance(mark, Shapes)), None) for key, marks in said.items()}


def shaping_keys(section: Any, result: Shapes, place: str = "") -> list[str]:
    """The names in identities of the keys of a class of sections that shape ``result``, after ``place``."""
    return [place + RENAMED.get(key, key) for key in _keys_shaping(section, result)]


def _keys_shaping(section: Any, result: Shapes) -> list[str]:
    return [key for key, results in shaped(section).items() if results is not None and result in results]


def shaping(section: Section, result: Shapes, place: str = "") -> dict[str, Any]:
    """The settings of ``section`` that shape ``result``, as JSON-ready values by ``place`` and name.

    A section among them is a mapping of its own settings that do. A setting that is left out of recipes where it is off
    (`exclude_if`) is left out here too, so that results made before it existed stand.
    """
    plain, identity = as_dict(section), dict[str, Any]()
    for key in filter(plain.__contains__, _keys_shaping(type(section), result)):
        value = getattr(section, key)
        identity[place + RENAMED.get(key, key)] = shaping(value, result) if isinstance(value, Section) else plain[key]
    return identity


adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)  # it takes longer to make than a recipe to read


def as_dict(section: Any) -> dict[str, Any]:
    """A section (or the recipe) as plain JSON-ready values."""
    return adapter(type(section)).dump_python(section, mode="json")


@dataclass(frozen=True, kw_only=True)
class Conversation(Section):
    """Rows with conversations, rendered with the tokenizer's chat template."""

    tools: Text | None = None
    """Column of tool descriptions for the chat template. Default: `tools`, if a row has it."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens to train on: the assistant's turns with their ends, or all."""


@dataclass(frozen=True, kw_only=True)
class Messages(Conversation):
    """Rows with a list of turns {role, content}."""

    messages: Text
    """Column with the list of turns."""


@dataclass(frozen=True, kw_only=True)
class PromptCompletion(Conversation):
    """Rows with a question and its answer, as texts or lists of turns."""

    prompt: Text
    """Column of questions."""
    completion: Text
    """Column of answers."""


@dataclass(frozen=True, kw_only=True)
class ImageQuestion(Section):
    """Rows with an image, a question and an answer, for models that read images. Only the answer is trained on."""

    image: Text
    """Column with the image file, relative to the folder of a local ``path``."""
    prompt: Text
    """Column of questions."""
    completion: Text
    """Column of answers."""


def _kind_of_column(value: Any) -> str:
    """Which of the types below a column is meant to be: by its keys, as nobody writes the kind."""
    if not isinstance(value, dict):
        return type(value).__name__ if isinstance(value, Conversation | ImageQuestion) else "str"
    if "image" in value:
        return "ImageQuestion"
    return "PromptCompletion" if {"prompt", "completion"} & set(value) else "Messages"


Column = Annotated[
    Annotated[Text | None, Tag("str")]
    | Annotated[Messages, Tag("Messages")]
    | Annotated[PromptCompletion, Tag("PromptCompletion")]
    | Annotated[ImageQuestion, Tag("ImageQuestion")],
    Discriminator(_kind_of_column),
]
"""What the rows of a source hold, and where."""


AUTO = "auto"
"""The path that stands for the text of shoal.data.default_text."""


@dataclass(frozen=True)
class DataSource(Section):
    """Source of text, and its share of the tokens."""

    path: Place
    """Bundled name (`shoal list data`), local file, folder, or Hub data set. Files: .jsonl, .json, .txt (one document),
    .csv, .parquet; of a folder, the files named after ``split``, else all. `auto`: public text from the Hub, or bundled
    text for a small model or without the Hub; a run directory keeps its first choice."""
    column: Column = None
    """Column of text, or of conversations: {messages: NAME} or {prompt: NAME, completion: NAME}. Default: `messages`,
    else `prompt` and `completion`, else `text`."""
    split: str = "train"
    """Split of a Hub data set, or of files named after splits."""
    name: str | None = None
    """Configuration name of a Hub data set."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the tokens, relative to the other sources."""

    @property
    def text_settings(self) -> dict[str, Any]:
        """All that says which text the source gives, and nothing of what is done with it; JSON-ready."""
        said = as_dict(self)
        return {field.name: said[field.name] for field in dataclasses.fields(DataSource)}

    @property
    def has_images(self) -> bool:
        """Whether its rows name images."""
        return isinstance(self.column, ImageQuestion)

    @property
    def is_text(self) -> bool:
        """Whether it holds texts, where the columns are known."""
        return not isinstance(self.column, Conversation | ImageQuestion)

    @property
    def is_chat(self) -> bool:
        """Whether it holds conversations, where the columns are known."""
        return isinstance(self.column, Conversation)

    @property
    def assistant_only(self) -> bool:
        """Whether only the assistant's tokens are learnt, where the columns are known."""
        return isinstance(self.column, Conversation) and self.column.loss_on == "assistant"


@dataclass(frozen=True)
class TextSource(DataSource):
    """Source of text without conversations."""

    column: Text | None = None
    """Column with the text. Default: `text`."""


def listed_as(key: str) -> BeforeValidator:
    """One section or a list of them as a list of mappings; a plain string is short for {key: string}."""

    def mappings(value: Any) -> Any:
        given = value if isinstance(value, list | tuple) else [value]
        return [{key: item} if isinstance(item, str) else item for item in given]

    return BeforeValidator(mappings)


Data = Annotated[tuple[TextSource, ...], listed_as("path"), Field(min_length=1)]
"""One source or a list of them."""

LEAST_ITEMS = 8
"""Items below which the percentiles of a bootstrap have too few different resamples behind them."""
