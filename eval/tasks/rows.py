"""What a row of a data set says: its question, options and answer, read out by the templates of its description."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from jinja2 import StrictUndefined, Undefined
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.abilities.item import digest
from shoal.abilities.matching import LETTERS
from shoal.errors import UserError

from .data_sets import Part

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
"""One row of a data set, as it is stored."""
Doc = dict[str, Any]
"""What is asked: id, question, context, options, answer (position of the right one), answers (accepted), worked."""


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


def _without_calculator(text: str) -> str:
    """GSM8K's worked answer without its <<48/2=24>> marks."""
    parts = text.split("<<")
    return parts[0] + "".join(part.partition(">>")[2] for part in parts[1:])


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
        "without_calculator": _without_calculator,
        "bbh_options": bbh_options,
        "as_json": lambda pairs: json.dumps(dict(pairs)),
        "values_beside": _values_beside,
    }
    environment.globals["LETTERS"] = LETTERS
    return environment


def as_docs(part: Part, rows: list[Row], where: str) -> Iterator[Doc]:
    """The documents that ``rows`` describe, in their order; ``where`` they are from, in words, is for messages.

    Raises:
        UserError: no rows, one without a field that the description names, or with an answer outside its options.
    """
    data, jinja = part.data, _jinja()
    if not rows:
        raise UserError(f"eval.tasks: {part.name!r}: {where} holds no rows; a task needs at least one item")
    templates = {
        "question": data.question,
        "context": data.context,
        "ending": data.ending,
        "worked": data.worked,
        "page": data.page,
    }
    if data.page is not None:
        del templates["question"]
    expressions = {key: getattr(data, key) or None for key in ("options", "answer", "answers", "beginnings")}
    expression_of = partial(jinja.compile_expression, undefined_to_none=False)
    compiled = _compiled(part, jinja.from_string, templates)
    values = _compiled(part, expression_of, expressions)
    keeps = _compiled(part, jinja.compile_expression, {"keep": data.keep or "true"})["keep"]
    asks_by_letter = "loglikelihood" in data.protocols or (data.lettered and "generation" in data.protocols)
    left_out = 0
    for number, row in enumerate(rows, 1):
        at = f"eval.tasks: {part.name!r}: {where}, row {number}"
        try:
            if not keeps(**row):
                left_out += 1
                continue
            doc: Doc = {key: template.render(**row) for key, template in compiled.items()}
            doc |= {key: _defined(expression(**row), key) for key, expression in values.items()}
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise UserError(
                f"{at} cannot be read ({error}; its fields are {', '.join(row)}); correct the data or its description"
            ) from error
        doc = _finished(doc, at)
        if asks_by_letter and len(doc.get("options", ())) > len(LETTERS):
            raise UserError(
                f"{at}: {len(doc['options'])} options are more than the {len(LETTERS)} letters; leave the row out, or "
                f"name protocols in {data.dataset} that ask without letters (continuation)"
            )
        yield doc
    if left_out:
        log.info("%s: %d of %d rows are left out, since not (%s)", where, left_out, len(rows), data.keep)


def _defined(value: Any, key: str) -> Any:
    if isinstance(value, Undefined):
        raise LookupError(f"no value for {key}")
    return list(value) if not isinstance(value, str | int | float) else value


def _finished(doc: Doc, at: str) -> Doc:
    """The document with its identity and everything the protocols ask for."""
    if "page" in doc:
        if not doc["page"].strip():
            raise UserError(f"{at}: its text is empty; correct the data, or leave the row out")
        return {"id": digest(doc["page"])[:16], **doc}
    doc.setdefault("context", f"Question: {doc['question']}\nAnswer:")
    if "options" in doc:
        if not isinstance(doc["options"], list):
            raise UserError(
                f"{at}: its options are {doc['options']!r}, which is no list; name a column of lists in its "
                "description, or write a list of columns"
            )
        doc["options"] = ["" if option is None else str(option) for option in doc["options"]]
        if "" in doc["options"]:
            raise UserError(f"{at}: option {doc['options'].index('')} is empty; correct the data, or leave the row out")
        doc["answer"] = _position(doc["answer"], doc["options"], at)
        doc["answers"] = [doc["options"][doc["answer"]]]
    else:
        answers = doc["answers"]
        doc["answers"] = [str(answer) for answer in (answers if isinstance(answers, list) else [answers])]
        if not doc["answers"]:
            raise UserError(f"{at} has no answer; correct the data")
    doc.setdefault("worked", doc["answers"][0])
    return {"id": digest(doc["context"], *doc.get("options", doc["answers"]))[:16], **doc}


def _compiled(part: Part, compile_text: Callable[[str], Any], texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Key of the description -> what its text compiles to, where there is one."""
    compiled = {}
    for key, text in texts.items():
        if text is not None:
            try:
                compiled[key] = compile_text(text)
            except TemplateError as error:
                raise UserError(
                    f"eval.tasks: {part.name!r}: {key} in its description is no template ({error}): {text!r}"
                ) from error
    return compiled


def _position(answer: Any, options: list[str], at: str) -> int:
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
        raise UserError(
            f"{at}: the answer {answer!r} is none of its {len(options)} options; correct the data, or answer in the "
            "description"
        )
    return position
