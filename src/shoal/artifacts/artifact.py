"""What a stage hands on: typed JSON with a schema number and the provenance of what made it.

Every artifact carries `provenance.inputs`, a flat mapping of everything that shaped it (fingerprints and settings). Two
runs are the same run exactly when these mappings are equal, and a refusal can name the field that differs.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ConfigDict, ValidationError

from shoal.atomic_files import fingerprint, refuse_endless, strict_json, write_text
from shoal.errors import UserError, explained_paths
from shoal.recipe.section import adapter

Json = Any
ABSENT = "absent"
COLUMNS = 9
"""Columns of a table in a console; the first are the ones that tell most."""
NUMBER = "{:.4g}".format


def _environment() -> dict[str, Json]:
    from shoal.runtime import environment  # takes seconds, and what is read has its own

    return environment()


def given_path(path: object, source: str) -> Path:
    """The path that the function ``source`` is given; refused is what is none."""
    if not isinstance(path, str | Path):
        raise UserError(f"{source}: path: is {type(path).__name__}; give a path")
    return Path(path).expanduser()


@dataclass(frozen=True)
class Provenance:
    """What made an artifact, where and when."""

    inputs: dict[str, Json]
    """Fingerprints and settings by name: `model`, `data`, `prune.drop`, ..."""
    environment: dict[str, Json] = field(default_factory=_environment)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    model: str = ""
    """The recipe's `model`, or what one in memory was loaded as; empty where nobody has said."""

    @property
    def fingerprint(self) -> str:
        """A short hash of the inputs."""
        return fingerprint(self.inputs)


@dataclass(frozen=True)
class Artifact:
    """A JSON file of the run directory. Subclasses are frozen dataclasses whose fields are the file's keys.

    What is not `internal` in the file is public: within a number of the schema fields are added, never taken out.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # fields that nobody knows are passed over
    FILE: ClassVar[str] = ""
    NUMBER: ClassVar[int] = 1
    """Of the schema; a new one where a public field is taken out or means something else."""
    INTERNAL: ClassVar[tuple[str, ...]] = ()
    """Fields that may change with every version: in the file they stand below `internal`."""

    provenance: Provenance

    @classmethod
    def schema(cls) -> str:
        """Family and number of the file: `shoal/plan/1`."""
        return f"shoal/{cls.__name__.lower()}/{cls.NUMBER}"

    def body(self) -> dict[str, Json]:
        """The content of the file: all fields, and values computed from them for readers of the file."""
        return adapter(type(self)).dump_python(self, mode="json")

    def place(self, path: str | Path) -> Path:
        """The file that save writes; raises as that does."""
        with explained_paths():
            path, own, held = self._file(path), self.schema().rpartition("/")[0] + "/", ""
            if path.exists() and not (path.is_file() and (held := _schema_of(path)).startswith(own)):
                held = held or "something else than a result"
                raise UserError(f"{path}: holds {held}, not {self.schema()}; give another path, or delete the file")
        return path

    def save(self, path: str | Path) -> None:
        """Write the complete file to ``path``; if this is a folder, under the usual name in it.

        Raises:
            UserError: ``path`` is an existing file with other content.
        """
        path, body = self.place(path), self.body()
        origin = body.pop("provenance")
        internal = {"inputs": origin["inputs"], "environment": origin["environment"]}
        internal |= {name: body.pop(name) for name in self.INTERNAL}
        made = {
            "created": self.provenance.created,
            "shoal": self.provenance.environment.get("shoal", ""),
            "model": self.provenance.model,
            "fingerprint": self.provenance.fingerprint,
        }
        body = {"schema": self.schema(), "made": made, **body, "internal": internal}
        write_text(path, json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the result from ``path``, a file or a run directory.

        Raises:
            UserError: the file is missing, is not JSON, or has another schema, wrong fields or contradictory values.
        """
        refuse_endless(path := cls._file(path))
        try:
            body = strict_json(path.read_text(encoding="utf-8"))
            refuse_schema(body, cls.schema())
            made, internal = (part if isinstance(part := body.get(key), dict) else {} for key in ("made", "internal"))
            body |= {name: internal[name] for name in cls.INTERNAL if name in internal}
            origin: dict[str, Json] = {"environment": {}, "created": ""}  # what is read was not made now
            origin |= {name: part[name] for part in (made, internal) for name in part if name != "shoal"}
            artifact = cls._whole({**cls.completed(body, path), "provenance": origin})
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; run the stage that makes it first") from error
        except _Newer as error:
            raise UserError(f"{path}: {error}; update shoal") from error
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path}: {_problem(error)}; delete it and run its stage again") from error
        return artifact

    @classmethod
    def require(cls, given: Any, name: str) -> None:
        """Raise UserError if ``given`` is not a valid object of this class; messages call it ``name``."""
        if not isinstance(given, cls):
            raise UserError(f"{name}: is {type(given).__name__}; give {cls.__name__}, or {cls.__name__}.load(...)")
        try:
            cls._whole(vars(given))
        except ValueError as error:
            raise UserError(f"{name}: {_problem(error)}; make it again") from error

    @classmethod
    def _whole(cls, fields: dict[str, Json]) -> Self:
        artifact = adapter(cls).validate_python(fields)
        if (problem := next(artifact.contradictions(), None)) is not None:
            raise ValueError(problem)
        return artifact

    @classmethod
    def _file(cls, path: str | Path) -> Path:
        path = given_path(path, f"shoal.{cls.__name__}.load")
        return path / cls.FILE if cls.FILE and path.is_dir() else path

    @classmethod
    def completed(cls, body: dict[str, Json], path: Path) -> dict[str, Json]:
        """The content of the file at ``path``, completed from the files next to it."""
        return body

    def contradictions(self) -> Iterator[str]:
        """Sentences `place: problem` for fields that contradict each other."""
        yield from ()


class _Newer(ValueError):
    """A file of a later number."""


def _schema_of(path: Path) -> str:
    """What the file at ``path`` says it is; empty if it is no result."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["schema"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""


def refuse_schema(body: Any, expected: str) -> None:
    """Refuse the content of a file that is of another family or number than ``expected``."""
    said = body.get("schema") if isinstance(body, dict) else None
    family, _, number = expected.rpartition("/")
    found, _, own = said.rpartition("/") if isinstance(said, str) else ("", "", "")
    if found == family and own.isdecimal() and int(own) > int(number):
        made = body.get("made")
        version = made.get("shoal", "") if isinstance(made, dict) else ""
        raise _Newer(f"was written by a newer shoal {version} ({said}, this one reads {expected})")
    if said != expected:
        raise ValueError(f"has the schema {said!r} instead of {expected}")


def _problem(error: Exception) -> str:
    """What is wrong with a file that could not be read."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {reprlib.repr(first['input'])})"
    is_text = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError)
    return f"is not valid JSON ({error})" if is_text else str(error)


def differences(expected: dict[str, Json], actual: dict[str, Json]) -> list[str]:
    """A sentence for every field in which two sets of inputs differ: both values, or whose files are not the same."""
    return [
        _in_words(key, expected.get(key, ABSENT), actual.get(key, ABSENT))
        for key in sorted(expected.keys() | actual.keys())
        if _plain(expected.get(key, ABSENT)) != _plain(actual.get(key, ABSENT))
    ]


def _in_words(key: str, here: Json, there: Json) -> str:
    if ABSENT not in (here, there):  # two hashes would tell nobody anything
        if key == "tasks":
            return "the task files, or the code that generates their items, differ"
        if key.endswith(" (files)"):
            return f"the files of {key.removesuffix(' (files)')} differ"
    said, made = ("not set" if value == ABSENT else repr(value) for value in (here, there))
    return f"{key} is {said} in this recipe but {made} there"


def _plain(value: Json) -> Json:
    return json.loads(json.dumps(value, default=str))


if TYPE_CHECKING:
    from pandas import DataFrame


class Tabular:
    """A result that prints as a table: at most 15 lines in a console, more in a notebook, all in to_pandas()."""

    def title(self) -> str:
        """The line above the table."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows, by column."""
        raise NotImplementedError

    def to_pandas(self) -> DataFrame:
        """The table as a pandas DataFrame."""
        from pandas import DataFrame

        return DataFrame(self.rows())

    def __repr__(self) -> str:
        frame = self._filled()
        shown = frame.iloc[:, :COLUMNS]
        told = shown.to_string(index=False, max_rows=10, max_colwidth=40, float_format=NUMBER)
        more = frame.shape != shown.shape or len(frame) > 10
        return f"{self.title()}\n{told}" + (f"\n[{len(frame)} x {frame.shape[1]}: to_pandas()]" if more else "")

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.title())}</p>{self._filled().to_html(index=False, max_rows=60, float_format=NUMBER)}"

    def _filled(self) -> DataFrame:
        """The frame with nothing where no value is."""
        frame = self.to_pandas()
        return frame.astype(object).where(frame.notna(), "")
