"""Text written by the teacher: from what, how often the same, and what a kill costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from shoal.abilities.knowledge import stated_facts
from shoal.data.streams import pack
from shoal.errors import UserError
from shoal.recipe.distill import Writing
from shoal.recipe.section import DataSource, Messages, PromptCompletion
from shoal.train import writing
from shoal.train.writing import (
    answers_alike,
    sifted,
    transformers_writer,
    without_evaluation_facts,
    write_texts,
)

PROSE = (DataSource("python_docs"), DataSource("teacher_text"))
BRIEF: dict[str, Any] = {"num_tokens": 200, "prompt_tokens": 6, "new_tokens": 10, "batch_size": 4}
INPUTS = {"model": "abc"}


class Teacher:
    """A writer that counts what it is asked for, and dies where told to."""

    def __init__(self, settings: Writing, *, seed: int = 0, batches: int | None = None) -> None:
        self._write = transformers_writer(tiny_model("llama", seed=1), tiny_tokenizer(), settings, seed=seed)
        self._left = batches
        self.asked: list[int] = []

    def __call__(self, prompts, numbers):
        if self._left is not None and len(self.asked) >= 4 * self._left:
            raise KeyboardInterrupt
        self.asked += numbers
        return self._write(prompts, numbers)


def write(
    folder: Path, settings: Writing, writer: Any = None, *, data: Any = PROSE, seed=0, inputs: Any = INPUTS
) -> list[str]:
    def load():
        return Teacher(settings, seed=seed) if writer is None else writer

    return write_texts(settings, tiny_tokenizer(), data=data, folder=folder, inputs=inputs, seed=seed, load_writer=load)


def unexpected(prompts, numbers):
    raise AssertionError("the teacher was asked")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    return write(tmp_path_factory.mktemp("whole"), Writing(**BRIEF))


def source(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.slow
def test_texts_are_read_back_without_the_teacher_while_nothing_changes(tmp_path, texts):
    settings = Writing(**BRIEF)
    assert write(tmp_path, settings) == texts
    assert write(tmp_path, settings, unexpected) == texts
    (place,) = tmp_path.iterdir()
    counts = json.loads((place / "counts.json").read_text())
    assert counts["written"] == counts["kept"] == 13
    assert sorted(file.name for file in place.iterdir()) == ["counts.json", "inputs.json", "texts.jsonl"]


@pytest.mark.slow
def test_anything_that_shapes_the_text_makes_it_anew(tmp_path):
    def echo(prompts, numbers):
        return prompts

    few = {**BRIEF, "num_tokens": 20}
    other_prose = (DataSource(source(tmp_path, [{"text": "Of men and mice"}])), PROSE[1])
    write(tmp_path, Writing(**few), echo)
    write(tmp_path, Writing(**few), unexpected)
    write(tmp_path, Writing(**few), echo, inputs={"model": "other"})
    write(tmp_path, Writing(**few), echo, seed=1)
    write(tmp_path, Writing(**few), echo, data=other_prose)
    for change in ({"temperature": 0.5}, {"top_p": 0.9}, {"new_tokens": 9}, {"backend": "vllm"}):
        write(tmp_path, Writing(**{**few, **change}), echo)
    assert len(list(tmp_path.glob("written-*"))) == 8


@pytest.mark.slow
def test_a_kill_costs_no_finished_batch_and_changes_no_text(tmp_path, texts):
    settings = Writing(**BRIEF)
    first = Teacher(settings, batches=2)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, settings, first)
    (place,) = tmp_path.iterdir()
    (place / "batches" / ".00000002.jsonl.0123.tmp").write_text('{"number": ')  # what a kill in a write leaves
    second = Teacher(settings)
    assert write(tmp_path, settings, second) == texts
    assert sorted(first.asked + second.asked) == list(range(13))


@pytest.mark.slow
def test_two_ranks_write_what_one_does(tmp_path, texts, monkeypatch):
    """Rank 1 first, up to where it would wait for rank 0."""
    settings = Writing(**BRIEF)
    monkeypatch.setattr(writing, "world_size", lambda: 2)
    monkeypatch.setattr(writing, "rank", lambda: 1)
    monkeypatch.setattr(writing, "is_main", lambda: False)
    other = Teacher(settings)
    with pytest.raises(FileNotFoundError):  # nobody has sifted yet
        write(tmp_path, settings, other)
    monkeypatch.undo()
    monkeypatch.setattr(writing, "world_size", lambda: 2)
    main = Teacher(settings)
    assert write(tmp_path, settings, main) == texts
    assert (len(main.asked), len(other.asked)) == (8, 5)  # batches of 4, 4, 4 and 1 in turn
    assert sorted(main.asked + other.asked) == list(range(13))


def test_conversations_are_asked_through_the_chat_template_and_kept_as_turns(tmp_path):
    rows = [{"q": "Two and two?", "a": "4"}, {"q": "Two and three?", "a": "5"}]
    asked = DataSource(source(tmp_path, rows), column=PromptCompletion(prompt="q", completion="a"))
    settings = Writing(**{**BRIEF, "prompts": asked, "num_tokens": 60})
    found = write(tmp_path / "run", settings, data=PROSE[1:])
    assert found
    assert all(
        text.startswith(("user: Two and two?\nassistant: ", "user: Two and three?\nassistant: ")) for text in found
    )
    (file,) = (tmp_path / "run").glob("*/texts.jsonl")
    for line in file.read_text().split("\n")[:-1]:
        record = json.loads(line)
        question, answer = record["messages"]
        assert question == {"role": "user", "content": rows[record["answer"] == "5"]["q"]}
        assert answer == {"role": "assistant", "content": record["written"].strip()}


@pytest.mark.slow
def test_only_right_answers_are_kept_where_that_is_asked_for(tmp_path):
    rows = [{"q": f"{number} and 1?", "a": f"#### {number + 1}"} for number in range(6)]
    asked = DataSource(source(tmp_path, rows), column=PromptCompletion(prompt="q", completion="a"))
    settings = Writing(**{**BRIEF, "prompts": asked, "keep": "correct"})

    def answer_three(prompts, numbers):
        return [tiny_tokenizer()("I say 3,")["input_ids"] for _ in numbers]

    found = write(tmp_path / "run", settings, answer_three, data=PROSE[1:])
    assert found == ["user: 2 and 1?\nassistant: I say 3,"]

    def never_right(prompts, numbers):
        return [tiny_tokenizer()("I do not know")["input_ids"] for _ in numbers]

    with pytest.raises(UserError, match=r"nothing that the teacher wrote can be kept \(.* written, .* wrong\)"):
        write(tmp_path / "other", settings, never_right, data=PROSE[1:])


@pytest.mark.parametrize("content", [[{"type": "text", "text": "4"}], 4])
def test_an_answer_that_is_no_text_is_refused_before_anything_is_written(tmp_path, content):
    turns = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "content": content}]}]
    (tmp_path / "rows").mkdir()
    for number, row in enumerate(rows):  # a column of one file has values of one kind
        (tmp_path / f"rows/{number}.jsonl").write_text(json.dumps(row))
    asked = DataSource(str(tmp_path / "rows"), column=Messages(messages="messages"))
    settings = Writing(**{**BRIEF, "prompts": asked, "keep": "correct"})
    message = r"rows/1\.jsonl' row 1: the last assistant turn is no text .*distill.writing.keep: all"
    with pytest.raises(UserError, match=message):
        write(tmp_path / "run", settings, unexpected, data=PROSE[1:])


def test_teacher_text_needs_a_source_to_take_openings_from(tmp_path):
    chats = DataSource("chats.jsonl", column=Messages(messages="messages"))
    for data in ((DataSource("teacher_text"),), (DataSource("teacher_text"), DataSource("ability_texts"), chats)):
        with pytest.raises(UserError, match="'teacher_text' needs a source of prose beside it"):
            write(tmp_path, Writing(), unexpected, data=data)


@pytest.mark.parametrize("messages", [None, [{"role": "user", "content": "go on"}]])
def test_a_text_that_had_more_to_say_teaches_no_end(tmp_path, messages):
    """It stops where its writer had to: an end token behind it would teach to stop in the middle of a sentence."""
    tokenizer = tiny_tokenizer()
    prompt, end = writing.Prompt(tokenizer("once")["input_ids"][:1], messages), tokenizer.eos_token_id
    more = tokenizer("upon a time")["input_ids"][:2]
    written = {"ended": [more[0], end], "short": more[:1], "cut_off": more}
    records = [writing._record(number, prompt, ids, tokenizer, most=2) for number, ids in enumerate(written.values())]
    assert [record.get("cut_off", False) for record in records] == [False, False, True]
    (tmp_path / writing.TEXTS).write_text(writing._lines(records))
    (tmp_path / writing.COUNTS).write_text("{}")
    lengths = []
    for text in writing._kept(tmp_path):
        rows = pack([(DataSource("teacher_text"), [text])], tokenizer, sequence_length=64, num_tokens=None, seed=0)
        ids = rows.input_ids_NS[0].tolist()
        real = len(tokenizer(text)["input_ids"])
        lengths.append(ids[real] == end and rows.position_ids_NS[0, real] == real)
    assert lengths == [True, True, False]


def record_of(written: str, *, prompt: str = "Well, ", answer: str | None = None) -> dict[str, str | None]:
    return {"text": prompt + written, "written": written, "answer": answer}


@pytest.mark.slow
def test_what_is_not_worth_training_on_is_left_out_and_counted():
    fact = sorted(stated_facts("eval"))[0]
    records = [record_of(one) for one in ("a text", "  \n", "no " * 40, "a text", f"so {fact}", "another")]
    kept, counts = sifted(records, keep="all")
    assert [one["written"] for one in kept] == ["a text", "another"]
    assert counts == {
        "written": 6,
        "empty": 1,
        "looping": 1,
        "repeated": 1,
        "evaluation fact": 1,
        "wrong": 0,
        "kept": 2,
    }
    assert without_evaluation_facts([fact, "a text"]) == ["a text"]


def test_a_wrong_answer_is_counted_and_left_out():
    records = [record_of("6 * 7 = 42", answer="#### 42"), record_of("6 * 7 = 41", answer="#### 42")]
    kept, counts = sifted(records, keep="correct")
    assert [one["written"] for one in kept] == ["6 * 7 = 42"]
    assert counts["wrong"] == 1
    assert len(sifted(records, keep="all")[0]) == 2


@pytest.mark.parametrize(
    ("written", "answer", "alike"),
    [
        ("so it is 42.", "6 * 7 = <<6*7=42>>42\n#### 42", True),
        ("#### 42\nThat took 3 minutes", "#### 42", True),
        ("10-3 = 7, so -7", "#### -7", True),
        (r"therefore \boxed{\frac{3}{4}}", r"we find \boxed{ \frac{3}{4} }", True),
        ("It was built in 1889.\nparis", "Paris.", True),
        ("Paris, as we know", "Paris", False),
        ("The capital of France is **Paris**.", "Paris", True),
        ('The plural of "foot" is "feet."', "feet", True),
        ("It was Franz Kafka", "Kafka", True),
        ("It is not Paris.", "Paris", False),
        ("It isn't really Paris.", "Paris", False),
        ("no number", "#### 5", False),
        (r"\boxed{\frac{3}{4}}", r"so \boxed{4}", False),
        (r"\boxed{2^{4}}", "#### 4", False),
        ("#### 10-4", "#### 4", False),
        ("#### 10-4 = 6", "#### 6", True),
        (r"so \boxed{\$1{,}042}", "#### 1042", True),
        (r"so \boxed{x = -42\text{ km}}", "#### -42", True),
        ("The answer is 0.5", "1/2", True),
        (r"so \boxed{1/2}", "1/2", True),
        (r"so \boxed{-\frac{1}{2}}", "#### 0.5", False),
        ("#### .5", "5", False),
        ("so it is \u22127", "#### -7", True),
        ("So it is 30", "at 10:30", False),
        ("It is 2^3", "3", False),
        ("", "", False),
    ],
)
def test_answers_are_compared_by_what_they_come_to(written: str, answer: str, alike: bool):
    assert answers_alike(written, answer) is alike
