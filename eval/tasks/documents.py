"""Documents of a data set as lm-eval takes them: a generator's items, or rows from the Hub or a local folder, out of
which templates of its description read question, options and answer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from jinja2 import StrictUndefined, Undefined
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.abilities import ALL_SCORED, GENERATORS, items
from shoal.abilities.item import digest
from shoal.abilities.matching import LETTERS
from shoal.atomic_files import read_text
from shoal.data.bundled import BUNDLED
from shoal.errors import UserError
from shoal.recipe.evaluate import Eval

from .data_sets import NUM_EXAMPLES, DataSet, HubData
from .names import FEW_EXAMPLES, described_data, described_tasks, local_data, task_folders

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
"""One row of a data set, as it is stored."""
Doc = dict[str, Any]
"""What is asked: id, question, context, options, answer (position of the right one), answers (accepted), worked."""
NUM_ITEMS = 200
"""Items that a generator makes for a task that does not say how many."""


def read_splits(data: DataSet, data_dir: Path | None, *, with_examples: bool, **_: Any) -> Any:
    """The splits `items` and, if asked for, `examples`, as lm-eval documents; lm-eval passes what it likes.

    Raises:
        UserError: data that is not there or empty, or a row without a question or with an answer outside its options.
    """
    splits = _docs(data, data_dir, with_examples=with_examples)
    if data.bundled is None:  # in the order of a hash of their content, so that the first ones are a fair sample
        splits["items"].sort(key=lambda doc: doc["id"])
    return {split: Dataset.from_list(docs) for split, docs in splits.items()}


def refuse_wrong_rows(settings: Eval) -> None:
    """Refuse, of described tasks, more few-shot examples than are there, and rows of the user's own that cannot be
    asked."""
    folder, folders = local_data(settings.data_dir), task_folders(settings.include_path)
    (described, tags), own = described_tasks(folders), described_data(folders[2:])
    members = (member for name in settings.tasks for member in tags.get(name, (name,)))
    for name, (data, protocol) in ((member, described[member]) for member in members if member in described):
        shots = data.shots_under(protocol) if settings.num_fewshot is None else settings.num_fewshot
        is_asked = settings.num_fewshot or data.dataset in own  # a description of ours takes what examples there are
        is_counted = data.bundled or data.shots or (is_asked and not has_examples(data, folder))  # else its file tells
        most = NUM_EXAMPLES if data.bundled else len(data.shots)
        if is_counted and shots > most:
            raise UserError(FEW_EXAMPLES.format(name, most, shots))
        if folder is not None and data.items is not None and data.dataset in own:
            rows = local_rows(data, folder, {"items": data.items})["items"]
            list(_as_docs(data, rows, f"{folder / data.place} (items)"))


def has_examples(data: DataSet, data_dir: Path | None) -> bool:
    """Whether few-shot examples would be there."""
    if data.bundled is not None:
        return "rolling" not in data.protocols and data.bundled not in ALL_SCORED
    return bool(data.shots) or bool(data.examples if data_dir is not None else data.hub and data.hub.examples)


def _docs(data: DataSet, data_dir: Path | None, *, with_examples: bool) -> dict[str, list[Doc]]:
    if data.bundled is not None:
        return _bundled(data, with_examples=with_examples)
    if data_dir is not None:
        files = {"items": data.items, **({"examples": data.examples} if data.examples and with_examples else {})}
        where, rows = str(data_dir / data.place), local_rows(data, data_dir, files)
    else:
        assert data.hub is not None, "checked when tasks are loaded"
        where, rows = data.hub.path, _hub_rows(data, data.hub, with_examples=with_examples)
    if data.shots and with_examples:
        rows["examples"] = list(data.shots)
    if "examples" in rows:
        rows["examples"] = rows["examples"][:NUM_EXAMPLES]
    return {split: list(_as_docs(data, split_rows, f"{where} ({split})")) for split, split_rows in rows.items()}


def _bundled(data: DataSet, *, with_examples: bool) -> dict[str, list[Doc]]:
    assert data.bundled is not None
    if data.bundled in BUNDLED:
        return {"items": [{"id": digest(text)[:16], "page": text} for text in BUNDLED[data.bundled]()]}
    if data.bundled not in GENERATORS:
        known = ", ".join([*GENERATORS, *BUNDLED])
        raise UserError(f"data set {data.dataset!r}: bundled is {data.bundled!r}; choose one of {known}")
    written = json.dumps(data.settings, sort_keys=True)
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
            **({"rule": str(item.params["rule"])} if "rule" in item.params else {}),
        }
        for item in items(kind, split=split, num_items=num_items, seed=0, **json.loads(settings))
    ]


def local_rows(data: DataSet, data_dir: Path, files: Mapping[str, str]) -> dict[str, list[Row]]:
    """The rows of ``files`` (split -> name) of one data set in ``data_dir``.

    Raises:
        UserError: a file is missing, empty, or no JSON lines.
    """
    rows = {}
    for split, file in ((split, data_dir / data.place / name) for split, name in files.items()):
        if not file.is_file():
            raise UserError(f"eval.data_dir: {file} is missing; put it there, or remove the tasks of {data.dataset}")
        rows[split] = list(_json_lines(file, file.stat().st_mtime_ns, file.stat().st_size))
    return rows


@lru_cache(maxsize=2)  # lm-eval's 57 subjects of MMLU read the same two files one after the other
def _json_lines(file: Path, _changed_at: int, _size: int) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"it is {type(row).__name__}")
        except ValueError as error:
            raise UserError(f"{file}:{number}: is not a JSON object ({error}); write one per line") from error
        rows.append(row)
    return rows


def _hub_rows(data: DataSet, hub: HubData, *, with_examples: bool) -> dict[str, list[Row]]:
    splits = {"items": hub.items, **({"examples": hub.examples} if hub.examples and with_examples else {})}
    try:
        loaded: Any = {split: load_dataset(hub.path, hub.name, split=name) for split, name in splits.items()}
    except Exception as error:  # the Hub, the network and `datasets` raise a dozen unrelated types here
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"eval.tasks: {data.dataset!r} cannot be read from the Hub ({hub.path}: {type(error).__name__}: {reason}). "
            f"Check the network, or set eval.data_dir to a folder with {data.place}/{data.items}"
        ) from error
    return {split: [dict(row) for row in rows] for split, rows in loaded.items()}


def bbh_options(text: str, target: str) -> list[str]:
    """The options of a BBH question: those it lists, or the pair its target is one of."""
    listed = text.partition("Options:")[2]
    options = [line.strip().removeprefix("- ") for line in listed.splitlines() if line.strip()]
    pairs = [["True", "False"], ["Yes", "No"], ["yes", "no"], ["valid", "invalid"]]
    pair = next((pair for pair in pairs if target in pair), [])
    return [option.split(") ", 1)[1] if option.startswith("(") else option for option in options] or pair


def _without_marks(text: str) -> str:
    """HellaSwag's text without the [title], [step] marks of WikiHow, cleaned as lm-eval does it."""
    cleaned = text.strip().replace(" [title]", ". ")
    while (start := cleaned.find("[")) >= 0 and (end := cleaned.find("]", start)) >= 0:
        cleaned = cleaned[:start] + cleaned[end + 1 :]
    return cleaned.replace("  ", " ")


def _values_beside(pairs: Sequence[Sequence[str]], position: int) -> list[str]:
    """The value at ``position`` among three others, in the order of a hash."""
    gold = pairs[position][1]
    others = sorted((value for _, value in pairs if value != gold), key=lambda value: digest(gold, value))
    return sorted([gold, *others[:3]], key=digest)


@cache
def _jinja() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "without_marks": _without_marks,
        # GSM8K's worked answer without its <<48/2=24>> marks
        "without_calculator": partial(re.compile(r"(?s)<<.*?(?:>>|\Z)").sub, ""),
        "bbh_options": bbh_options,
        "as_json": lambda pairs: json.dumps(dict(pairs)),
        "values_beside": _values_beside,
    }
    environment.globals["LETTERS"] = LETTERS
    return environment


def _as_docs(data: DataSet, rows: list[Row], where: str) -> Iterator[Doc]:
    """The documents that ``rows`` describe, in their order; ``where`` they are from, in words, is for messages."""
    jinja = _jinja()
    if not rows:
        raise UserError(f"eval.tasks: {data.dataset!r}: {where} holds no rows; a task needs at least one item")
    texts = {key: getattr(data, key) for key in ("question", "context", "ending", "worked", "page")}
    if data.page is not None:
        texts["question"] = None
    expressions = {key: getattr(data, key) for key in ("options", "answer", "answers", "beginnings")}
    compiled = partial(jinja.compile_expression, undefined_to_none=False)
    try:
        templates = {key: jinja.from_string(text) for key, text in texts.items() if text is not None}
        values = {key: compiled(text) for key, text in expressions.items() if text}
        keeps = jinja.compile_expression(data.keep or "true")
    except TemplateError as error:
        raise UserError(f"data set {data.dataset!r}: its description has a wrong template ({error})") from error
    letters = "loglikelihood" in data.protocols or (data.lettered and "generation" in data.protocols)
    left_out = 0
    for number, row in enumerate(rows, 1):
        try:
            if not keeps(**row):
                left_out += 1
                continue
            doc: Doc = {key: template.render(**row) for key, template in templates.items()}
            doc |= {key: _defined(expression(**row), key) for key, expression in values.items()}
            doc = _finished(doc, len(LETTERS) if letters else None)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise UserError(
                f"eval.tasks: {data.dataset!r}: {where}, row {number} cannot be read ({error}; its fields are "
                f"{', '.join(row)}); correct the data or its description, or remove the row"
            ) from error
        yield doc
    if left_out:
        log.info("%s: skips %d of %d rows, since not (%s)", where, left_out, len(rows), data.keep)


def _defined(value: Any, key: str) -> Any:
    if isinstance(value, Undefined):
        raise LookupError(f"no value for {key}")
    return list(value) if not isinstance(value, str | int | float) else value


def _finished(doc: Doc, most_options: int | None) -> Doc:
    """The document with its identity and everything the protocols ask for; ValueError for what cannot be asked."""
    if "page" in doc:
        if not doc["page"].strip():
            raise ValueError("its text is empty")
        return {"id": digest(doc["page"])[:16], **doc}
    doc.setdefault("context", f"Question: {doc['question']}\nAnswer:")
    if "options" in doc:
        options = doc["options"]
        if not isinstance(options, list) or not all(option not in ("", None) for option in options):
            raise ValueError(f"its options are {options!r}, not a list of texts")
        if most_options is not None and len(options) > most_options:
            raise ValueError(f"{len(options)} options are more than the {most_options} letters")
        doc["options"] = [str(option) for option in options]
        doc["answer"] = _position(doc["answer"], doc["options"])
        doc["answers"] = [doc["options"][doc["answer"]]]
    else:
        answers = doc["answers"]
        doc["answers"] = [str(answer) for answer in (answers if isinstance(answers, list) else [answers])]
    doc.setdefault("worked", doc["answers"][0])
    return {"id": digest(doc["context"], *doc.get("options", doc["answers"]))[:16], **doc}


def _position(answer: Any, options: list[str]) -> int:
    """Position from 0 of the right option, of which ``answer`` is the text, the position or the letter."""
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    position = answer
    if isinstance(answer, str):
        text = answer.strip().strip("()")
        position = int(text) if text.isdecimal() else LETTERS.find(text) if len(text) == 1 else -1
    if isinstance(position, float) and position.is_integer():  # as tables with gaps hold whole numbers
        position = int(position)
    if not isinstance(position, int) or not 0 <= position < len(options):
        raise ValueError(f"the answer {answer!r} is not one of its {len(options)} options")
    return position
