"""Conversations become tokens of which the assistant's are learnt, or are refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import trl
from cases import cases
from packed_rows import labels_of
from tiny import tiny_checkpoint, tiny_tokenizer

from shoal.data.chat import Chat, chat_of, tokenised
from shoal.data.sources import sources_fingerprint
from shoal.data.streams import check_source, pack
from shoal.errors import UserError
from shoal.launch.early import settings
from shoal.launch.early.asked import Asked
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import DataSource, Messages, PromptCompletion

CASES = cases(__file__)
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
"""Chat templates of known models as they are shipped, and with {% generation %} added."""
ENDS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<turn|>"]
M, QA = Messages(messages="m"), PromptCompletion(prompt="q", completion="a")
QUESTION = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
TURNS = [QUESTION, ANSWER, {"role": "user", "content": "And e?"}, {"role": "assistant", "content": "e"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def tokenizer_with(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ENDS})
    tokenizer.chat_template = template
    return tokenizer


def shipped(name: str) -> Any:
    return tokenizer_with((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


def learnt(messages: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    """The runs of learnt tokens, as text."""
    ids, mask = tokenised(Chat(messages, "'x' row 0"), tokenizer, assistant_only=True)
    runs: list[list[int]] = []
    for before, token, taught in zip([False, *mask.tolist()], ids, mask.tolist(), strict=False):
        if taught:
            runs.append([]) if not before else None
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(("name", "end"), CASES["ends"].items())
def test_what_the_assistant_says_is_learnt_with_the_end_of_its_turn(name: str, end: str) -> None:
    said = [f"It is 4.{end}", f"e{end}"]
    assert learnt(TURNS, shipped(name)) == said
    assert learnt([SYSTEM, *TURNS], shipped(name)) == said


def test_an_empty_thought_that_stands_only_in_the_last_turn_is_understood() -> None:
    assert learnt(TURNS, shipped("qwen3")) == ["It is 4.<|im_end|>", "<think>\n\n</think>\n\ne<|im_end|>"]


def test_tool_calls_and_their_results_pass_through_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    used = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    first, second = learnt([QUESTION, *used, ANSWER], shipped("qwen2_5"))
    assert first.startswith("<tool_call>")
    assert first.endswith("</tool_call><|im_end|>")
    assert '"name": "add"' in first
    assert second == "It is 4.<|im_end|>"


def test_parts_of_text_are_one_text() -> None:
    """Templates of text models would write the list as Python does."""
    parts = [{"type": "text", "text": "It is"}, {"type": "text", "text": " 4."}]
    chat = chat_of({"m": [QUESTION, {**ANSWER, "content": parts}]}, M, "'x' row 0")
    assert chat is not None
    assert chat.messages == [QUESTION, ANSWER]


def test_what_follows_the_last_answer_is_cut_off() -> None:
    tokenizer = tiny_tokenizer()
    ids, mask = tokenised(Chat([*TURNS, QUESTION], "x"), tokenizer, assistant_only=True)
    assert mask[-1]
    assert str(tokenizer.decode(ids)).endswith("assistant: e\n")
    ids, mask = tokenised(Chat([*TURNS, QUESTION], "x"), tokenizer, assistant_only=False)
    assert mask.all()
    assert str(tokenizer.decode(ids)).endswith("user: What is 2 + 2?\n")


@pytest.mark.parametrize("template", CASES["templates"])
def test_a_template_in_which_turns_depend_on_later_ones_is_refused(template: str) -> None:
    message = r"data 'x' row 0: the chat template of .* writes turn 1 \(assistant\) .* or set loss_on: all"
    with pytest.raises(UserError, match=message):
        learnt(TURNS, tokenizer_with(template))
    assert tokenised(Chat(TURNS, "x"), tokenizer_with(template), assistant_only=False)[1].all()


def test_a_role_that_the_template_refuses_is_named() -> None:
    message = r"data 'x' row 0: .* rejects a conversation of system, user, .*System role not"
    with pytest.raises(UserError, match=message):
        learnt([SYSTEM, *TURNS], shipped("gemma"))


# --- sources


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def packed(source: DataSource, **settings: Any) -> Any:
    settings = {"sequence_length": 64, "num_tokens": 128, "seed": 0, **settings}
    return pack([(source, None)], tiny_tokenizer(), **settings)


def texts_learnt(rows: Any) -> set[str]:
    """Every run of labels in the rows, as text."""
    text = "".join(
        "|" if label < 0 else str(tiny_tokenizer().decode([label])) for label in labels_of(rows).flatten().tolist()
    )
    return {piece for piece in text.split("|") if piece}


def test_a_column_of_conversations_teaches_only_the_answers(tmp_path: Path) -> None:
    rows = packed(DataSource(written(tmp_path, [{"messages": [QUESTION, ANSWER]}])), packing="bfd")
    assert texts_learnt(rows) == {"It is 4.\n"}
    count = rows.counts[next(iter(rows.counts))]
    assert count["supervised"] == (labels_of(rows) >= 0).sum()


@pytest.mark.parametrize(
    "row", [{"q": "What?", "a": "That."}, {"q": [{"role": "user", "content": "What?"}], "a": "That."}]
)
def test_prompt_and_completion_are_a_conversation(tmp_path: Path, row: dict[str, Any]) -> None:
    rows = packed(DataSource(written(tmp_path, [row]), column=QA), packing="bfd")
    assert texts_learnt(rows) == {"That.\n"}


def test_conversations_that_teach_nothing_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": turns} for turns in ([QUESTION], [], None, [QUESTION, ANSWER])]
    found = packed(DataSource(written(tmp_path, rows)))
    count = found.counts[next(iter(found.counts))]
    assert count["dropped"] == 3
    assert texts_learnt(found) <= {"It is 4.\n", "It is 4.", *("It is 4.\n"[n:] for n in range(9))}


@pytest.mark.parametrize(("row", "column", "message"), CASES["rows"])
@pytest.mark.parametrize("read", ["pack", "check"])
def test_a_source_that_cannot_teach_is_refused(
    tmp_path: Path, row: dict[str, Any], column: str, message: str, read: str
) -> None:
    source = DataSource(written(tmp_path, [row]), column=Messages(messages=column))
    with pytest.raises(UserError, match=message):
        packed(source) if read == "pack" else check_source(source, tiny_tokenizer(), sequence_length=64)


def test_rows_in_which_nothing_is_learnt_are_left_out(tmp_path: Path) -> None:
    """The question fills whole rows: no batch may consist of those."""
    source = DataSource(written(tmp_path, [{"m": [{"role": "user", "content": "x" * 200}, ANSWER]}]), column=M)
    rows = packed(source, num_tokens=64 * 20)
    assert (labels_of(rows) >= 0).any(dim=1).all()
    count = rows.counts[source.path]
    assert count["truncated"] > 0
    assert count["tokens"] == rows.input_ids_NS.numel()


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),
        ({"sequence_length": 512}, False),
        ({"packing": "wrapped"}, False),
        ({"on_policy": {"max_new_tokens": 8}}, False),
        ({"data.column.loss_on": "all"}, False),
        ({"rows": 1}, False),
        ({"seconds": 0}, False),
        ({"tokenizer.json": "{}"}, False),
    ],
    ids=str,
)
def test_questions_longer_than_rows_are_told_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], *, is_refused: bool
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    changes = {**changes}
    column = {"prompt": "q", "completion": "a", "loss_on": changes.pop("data.column.loss_on", "assistant")}
    rows = [{"q": "x" * 200, "a": "That."}] * 40 + [{"q": "What?", "a": "That."}] * changes.pop("rows", 0)
    data = {"path": written(tmp_path, rows), "column": column}
    monkeypatch.setattr(settings, "MOST_SECONDS", changes.pop("seconds", 10))
    if text := changes.pop("tokenizer.json", None):
        (folder / "tokenizer.json").write_text(text)
    distill = {"sequence_length": 64, "packing": "bfd", "data": data, **changes}
    recipe = parse_recipe({"model": str(folder), "run_dir": str(tmp_path / "run"), "distill": distill})
    with pytest.raises(UserError, match="no conversation has a token") if is_refused else contextlib.nullcontext():
        settings.refuse_data(Asked("distill", recipe))


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path) -> None:
    source = DataSource(written(tmp_path, [{"m": TURNS}]), column=M)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    message = "holds conversations, but the model's tokenizer has no chat template; use the tokenizer of an instruction"
    with pytest.raises(UserError, match=message):
        check_source(source, tokenizer, sequence_length=64)
    with pytest.raises(UserError, match=message):
        pack([(source, None)], tokenizer, sequence_length=64, num_tokens=64, seed=0)


def test_what_is_learnt_is_part_of_the_identity() -> None:
    columns = [None, M, Messages(messages="m", loss_on="all"), Messages(messages="n")]
    assert len({sources_fingerprint([DataSource("owner/name", column=own)]) for own in columns}) == len(columns)
