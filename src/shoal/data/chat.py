"""Conversations: rendered with the tokenizer's chat template, and which of their tokens the assistant wrote.

Templates with {% generation %} say themselves what the assistant writes. For all others every assistant turn is
rendered twice, up to where it begins and up to its end, and must be found at that place of the whole conversation: a
template that writes a turn differently depending on what follows is refused rather than guessed at.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from shoal.errors import UserError
from shoal.recipe.section import DataSource, Messages, PromptCompletion

ASSISTANT = "assistant"
MARKS_ITSELF = re.compile(r"\{%-?\s*generation\s*-?%\}")
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
REMEDY = "put {% generation %} and {% endgeneration %} around the assistant's text in the template, or set loss_on: all"


@dataclass(frozen=True)
class Chat:
    """One conversation as the chat template takes it."""

    messages: list[dict[str, Any]]
    where: str
    """Source and row of the conversation, for messages."""
    tools: list[Any] | None = None

    @property
    def num_characters(self) -> int:
        """Number of characters: about as many bytes as it takes."""
        return sum(len(str(value)) for message in self.messages for value in message.values())

    @property
    def question(self) -> str | None:
        """Text of the turn that the assistant answers first; None if it answers none."""
        pairs = itertools.pairwise(self.messages)
        return next((_said(turn.get("content")) for turn, answer in pairs if answer["role"] == ASSISTANT), None)


@dataclass(frozen=True)
class ImageRow:
    """A question about an image, and its answer."""

    where: str
    """File and number of the row, for messages."""
    image: Path
    prompt: str
    answer: str
    number: int = 0
    """Its place among all rows of images of a training."""

    @property
    def num_characters(self) -> int:
        """Number of characters of the text."""
        return len(self.prompt) + len(self.answer)


def chat_of(row: Mapping[str, Any], column: Messages | PromptCompletion, where: str) -> Chat | None:
    """The conversation in one row; None where it is empty.

    Raises:
        UserError: no such column, or no list of turns in it.
    """
    if isinstance(column, Messages):
        messages = _turns(column_of(row, column.messages, where), column.messages, where)
    else:
        sides = ((column.prompt, "user"), (column.completion, ASSISTANT))
        messages = [turn for name, role in sides for turn in _side(column_of(row, name, where), name, role, where)]
    tools = row.get("tools") if column.tools is None else column_of(row, column.tools, where)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            name = column.tools or "tools"
            raise UserError(f"data {where}: column {name!r} does not hold JSON ({error}): {tools[:80]!r}") from error
    return Chat(_without_nothing(messages), where, _without_nothing(tools) or None) if messages else None


def _without_nothing(value: Any) -> Any:
    """``value`` without keys that hold None.

    Tables give every row the keys that any row has, and a template would write arguments that nobody gave.
    """
    if isinstance(value, Mapping):
        return {key: _without_nothing(own) for key, own in value.items() if own is not None}
    return [_without_nothing(own) for own in value] if isinstance(value, list) else value


def column_of(row: Any, name: str, where: str) -> Any:
    """What ``row`` has in the column ``name``.

    Raises:
        UserError: no such column, or no row.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"data {where}: the row is {type(row).__name__}, neither a text nor a row with columns")
    if name not in row:
        raise UserError(f"data {where}: has no column {name!r}; it has {', '.join(map(str, row))}")
    return row[name]


def _side(value: Any, column: str, role: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() else []
    return _turns(value, column, where)


def _turns(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(
            f"data {where}: column {column!r} holds {type(value).__name__}, not a list of turns; name a column of "
            "[{role, content}, ...], or a column of text"
        )
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            problem = f"has {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else f"is {type(turn).__name__}"
            raise UserError(f"data {where}: a turn in {column!r} {problem}; every turn needs a role and a content")
        if not isinstance(content := turn.get("content"), str | list | None):
            raise UserError(f"data {where}: the content of a turn in {column!r} is {type(content).__name__}, not text")
        if not any(said for key, said in turn.items() if key != "role") and content is None:
            raise UserError(
                f"data {where}: a turn of {turn['role']!r} in {column!r} has no content; give it text or tool_calls"
            )
    return [{**turn, **({"content": _joined(turn["content"])} if "content" in turn else {})} for turn in value]


def _joined(content: Any) -> Any:
    """Parts that are all text as one text: templates of text models would write the list itself."""
    parts: list[Any] = content if isinstance(content, list) else []
    texts: list[Any] = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    are_all = parts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if are_all else content


def check_template(template: Any, name: str, *, is_fast: bool = True, first: Chat | None = None) -> None:
    """Refuse a tokenizer that cannot render conversations of the source ``name``, of which the ``first`` is tried, or
    that cannot tell which characters a token covers, by which the assistant's are known: then it is not
    ``is_fast``."""
    from transformers.utils.chat_template_utils import render_jinja_template  # loads no torch

    lacks = "" if template else "has no chat template"
    lacks = lacks or ("" if is_fast else "does not report which characters a token covers")
    try:
        render_jinja_template(conversations=[], chat_template=template or "")
        if first is not None and not lacks:
            render_jinja_template(conversations=[first.messages], tools=first.tools, chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        lacks = f"has a chat template that is not valid ({error})"
    except (jinja2.TemplateError, TypeError, OverflowError, MemoryError) as error:
        if first is not None and not isinstance(error, jinja2.UndefinedError | TypeError):  # of a token that it names
            raise _rejected(first, error) from error
    if lacks:
        raise UserError(
            f"data {name!r}: holds conversations, but the model's tokenizer {lacks}; use the tokenizer of an "
            "instruction-tuned model with a tokenizer.json, or render the conversations into a column of text and "
            "name that column"
        )


def nothing_learnt(source: DataSource) -> UserError:
    """The refusal of a source that has content and teaches nothing."""
    if source.has_images:
        words = "no image with its question and answer fits into a row; raise sequence_length"
    elif source.is_chat:
        words = (
            "no conversation has a token to train on (an answer of the assistant, within the row if packing is "
            "bfd); name another column, raise sequence_length, or set loss_on: all"
        )
    else:
        words = "every document is empty after tokenisation; name a source with text"
    return UserError(f"data {source.path!r}: {words}")


def tokenised(chat: Chat, tokenizer: Any, *, assistant_only: bool) -> tuple[list[int], np.ndarray]:
    """Token ids, and which of them are learnt; what comes after the last of those is cut off, as nothing depends on it.

    Raises:
        UserError: the template refuses the conversation, or does not show where the assistant's turns are.
    """
    try:
        return _tokenised(chat, tokenizer, assistant_only=assistant_only)
    except (jinja2.TemplateError, TypeError, OverflowError, MemoryError) as error:
        raise _rejected(chat, error) from error


def _rejected(chat: Chat, error: Exception) -> UserError:
    reason = str(error).strip() or type(error).__name__
    roles = ", ".join(message["role"] for message in chat.messages)
    return UserError(
        f"data {chat.where}: the chat template rejects a conversation of {roles} ({reason}); remove such rows, "
        "or put the turns into the order that the model was trained on"
    )


def template_of_one_day(tokenizer: Any, tools: list[Any] | None = None) -> str:
    """The chat template, which tells the model the same date on all days where it tells it today's: prompts and tokens
    of two days are to be equal."""
    template = tokenizer.get_chat_template(tools=tools)
    return TODAY.sub(lambda called: repr(date(2024, 7, 26).strftime(called[2])), template)


def _tokenised(chat: Chat, tokenizer: Any, *, assistant_only: bool) -> tuple[list[int], np.ndarray]:
    template = template_of_one_day(tokenizer, chat.tools)
    if assistant_only and MARKS_ITSELF.search(template):
        masked: Any = {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, chat_template=template, **masked)
        ids, learnt = encoded["input_ids"], np.array(encoded["assistant_masks"], dtype=bool)
    else:
        text = _render(chat, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, learnt = encoded["input_ids"], np.ones(len(encoded["input_ids"]), dtype=bool)
        if assistant_only:
            learnt = _within(encoded["offset_mapping"], list(_assistant_spans(chat, text, tokenizer)))
    end = len(ids) if not assistant_only else int(learnt.nonzero()[0][-1]) + 1 if learnt.any() else 0
    return ids[:end], learnt[:end]


def _render(chat: Chat, tokenizer: Any, upto: int | None = None, *, prompt: bool = False) -> str:
    settings: Any = {"chat_template": template_of_one_day(tokenizer, chat.tools), "tools": chat.tools}
    return tokenizer.apply_chat_template(chat.messages[:upto], tokenize=False, add_generation_prompt=prompt, **settings)


def _assistant_spans(chat: Chat, text: str, tokenizer: Any) -> Iterator[tuple[int, int]]:
    """First and last character of every assistant turn in ``text``, without its header, with its end-of-turn token.

    A turn that opens the conversation is left out: nobody asks the model for it.
    """
    for index, message in enumerate(chat.messages):
        if message["role"] != ASSISTANT or index == 0:
            continue
        start = _start(chat, index, text, tokenizer)
        turn = _render(chat, tokenizer, index + 1)
        written = None if start is None else _as_in(text[start:], turn, message.get("content"), start, tokenizer)
        if start is None or written is None:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise UserError(
                f"data {chat.where}: the chat template of {name} writes turn {index} ({ASSISTANT}) of a conversation "
                f"differently if other turns follow, so the tokens of this turn cannot be identified; {REMEDY}"
            )
        yield start, start + without_layout(written, tokenizer)


def _start(chat: Chat, index: int, text: str, tokenizer: Any) -> int | None:
    """Where the turn begins that answers what comes before it; None where ``text`` does not show it.

    That is where the generation prompt ends. Some templates let that prompt open a thought (DeepSeek-R1) which the
    finished turn does not have: there the content has to stand where the two part.
    """
    prompt = _render(chat, tokenizer, index, prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
    said = _said(chat.messages[index].get("content"))
    header = start > len(_render(chat, tokenizer, index))
    return start if header and said and text[start:].lstrip().startswith(said) else None


def _as_in(rest: str, turn: str, content: Any, start: int, tokenizer: Any) -> str | None:
    """How the turn stands at the beginning of ``rest``; None where it cannot be told.

    ``turn`` is a conversation in which it is the last one. Some templates add an empty thought (Qwen3) or an end token
    (Phi-3) to the last turn only: there the content with the same ending has to stand in the middle.
    """
    if rest.startswith(turn[start:]):
        return turn[start:]
    said = _said(content)
    places = [match.start() for match in re.finditer(re.escape(said), turn)] if said else []
    endings = [turn[place:] for place in reversed(places)]  # the last place may be a piece of the end-of-turn token
    endings += [ending.removesuffix(tokenizer.eos_token or "") for ending in endings]
    blank = len(rest) - len(rest.lstrip())
    return next((rest[: blank + len(ending)] for ending in endings if rest[blank:].startswith(ending)), None)


def _said(content: Any) -> str:
    return content.strip() if isinstance(content, str) else ""


def without_layout(written: str, tokenizer: Any) -> int:
    """Length without the white space that a template puts behind an end-of-turn token: the model stops before it."""
    bare = written.rstrip()
    ends = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return len(bare) if any(bare.endswith(end) for end in ends if end.strip()) else len(written)


def _within(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens touch one of the spans, which are in order and do not overlap."""
    starts, ends = (np.array(side, dtype=np.int64) for side in zip(*offsets, strict=True)) if offsets else ([], [])
    learnt = np.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        learnt |= (np.asarray(ends) > first) & (np.asarray(starts) < last)
    return learnt
