"""Text written by the teacher: from what, how often the same, and what a kill costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from tiny import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from shoal.abilities.knowledge import stated_facts
from shoal.data.streams import Written, pack
from shoal.errors import UserError
from shoal.recipe.distill import Distill, Generate, TrainingSource
from shoal.recipe.section import Column, DataSource, PromptCompletion
from shoal.train import writing
from shoal.train.writing import answers_alike, sifted, transformers_writer, without_evaluation_facts, write_texts

CASES = cases(__file__)

QA = PromptCompletion(prompt="q", completion="a")
BRIEF: dict[str, Any] = {"prompt_tokens": 6, "max_new_tokens": 10}
INPUTS = {"model": "abc"}


class Teacher:
    """A writer that counts what it is asked for, and dies where told to."""

    def __init__(self, settings: Generate, *, seed: int = 0, batches: int | None = None) -> None:
        self._write = transformers_writer(tiny_model("llama", seed=1), tiny_tokenizer(), settings, seed=seed)
        self._left = batches
        self.asked: list[int] = []

    def __call__(self, prompts, numbers):
        if self._left is not None and len(self.asked) >= 4 * self._left:
            raise KeyboardInterrupt
        self.asked += numbers
        return self._write(prompts, numbers)


def write(
    folder: Path, how: Generate, writer: Any = None, *, seed=0, inputs: Any = INPUTS, **other: Any
) -> list[Written]:
    def load():
        return Teacher(how, seed=seed) if writer is None else writer

    settings = distill(how, **other)
    return write_texts(settings, 0, tiny_tokenizer(), folder=folder, inputs=inputs, seed=seed, load_writer=load)


def distill(how: Generate, *, path: str = "python_docs", column: Column = None, num_tokens: int = 200) -> Distill:
    source = TrainingSource(path, column=column, generate=how)
    return Distill(data=(source,), num_tokens=num_tokens, sequence_length=64)


@pytest.fixture(scope="module", autouse=True)
def batches_of_four():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "BATCH_SIZE", 4)
        yield


def unexpected(prompts, numbers):
    raise AssertionError("the teacher was asked")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Written]:
    return write(tmp_path_factory.mktemp("whole"), Generate(**BRIEF))


def source(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.slow
def test_texts_are_read_back_without_the_teacher_while_nothing_changes(tmp_path, texts):
    settings = Generate(**BRIEF)
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

    def few(writer=echo, change: Any = (), **other: Any):
        write(tmp_path, Generate(**BRIEF | dict(change)), writer, num_tokens=20, **other)

    few()
    few(unexpected)
    few(inputs={"model": "other"})
    few(seed=1)
    few(path=source(tmp_path, [{"text": "Of men and mice"}]))
    for change in ({"temperature": 0.5}, {"top_p": 0.9}, {"max_new_tokens": 9}, {"backend": "vllm"}):
        few(change=change)
    assert len(list(tmp_path.glob("written-*"))) == 8


@pytest.mark.slow
def test_a_kill_costs_no_finished_batch_and_changes_no_text(tmp_path, texts):
    settings = Generate(**BRIEF)
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
    settings = Generate(**BRIEF)
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
    found = write(tmp_path / "run", Generate(**BRIEF), path=source(tmp_path, rows), column=QA, num_tokens=60)
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
    settings, asked = Generate(**BRIEF, keep="correct"), {"path": source(tmp_path, rows), "column": QA}

    def answer_three(prompts, numbers):
        return [tiny_tokenizer()("I say 3,")["input_ids"] for _ in numbers]

    found = write(tmp_path / "run", settings, answer_three, **asked)
    assert found == ["user: 2 and 1?\nassistant: I say 3,"]

    def never_right(prompts, numbers):
        return [tiny_tokenizer()("I do not know")["input_ids"] for _ in numbers]

    with pytest.raises(UserError, match=r"none of the teacher's texts can be kept \(.* written, .* wrong\)"):
        write(tmp_path / "other", settings, never_right, **asked)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "text", "text": 4}], "the last assistant turn is not a text .*generate.keep: all"),
        (4, "the content of a turn in 'messages' is int, not text"),
    ],
)
def test_an_answer_that_is_no_text_is_refused_before_anything_is_written(tmp_path, content, message):
    turns = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "content": content}]}]
    (tmp_path / "rows").mkdir()
    for number, row in enumerate(rows):  # a column of one file has values of one kind
        (tmp_path / f"rows/{number}.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=rf"rows/1\.jsonl' row 0: {message}"):
        write(tmp_path / "run", Generate(**BRIEF, keep="correct"), unexpected, path=str(tmp_path / "rows"))


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        (
            [{"text": "too short"}],
            {"prompt_tokens": 30},
            r"no text has the 30 tokens that the teacher starts from; lower",
        ),
        ([{"text": "a text"}], {"keep": "correct"}, r"holds texts, and generate.keep: correct compares answers; name"),
        (
            [{"prompt": "Why?" * 20, "completion": "So."}],
            {"max_new_tokens": 60},
            r"none of 1 conversations leaves room for max_new_tokens 60 in a row; lower that, or raise",
        ),
    ],
)
def test_a_source_that_cannot_be_written_is_refused(tmp_path, rows, how, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "run", Generate(**{**BRIEF, **how}), unexpected, path=source(tmp_path, rows))


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_of_a_conversation_what_was_written_is_learnt_or_all_of_it(tmp_path, loss_on):
    def answer(prompts, numbers):
        return [[*tiny_tokenizer()("I see")["input_ids"], tiny_tokenizer().eos_token_id] for _ in numbers]

    path = source(tmp_path, [{"q": "Why, and what for?", "a": "So."}])
    column = PromptCompletion(prompt="q", completion="a", loss_on=loss_on)
    texts = write(tmp_path / "run", Generate(**BRIEF), answer, path=path, column=column, num_tokens=20)
    found = [(DataSource(path, column=column), texts)]
    rows = pack(found, tiny_tokenizer(), sequence_length=64, num_tokens=None, seed=0)
    learnt = rows[0]["labels"]
    text = tiny_tokenizer().decode([label for label in learnt.tolist() if label >= 0], skip_special_tokens=True)
    assert text == ("I see" if loss_on == "assistant" else "user: Why, and what for?\nassistant: I see"[1:])


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_a_conversation_is_learnt_in_the_tokens_in_which_it_was_asked(template, adds):
    """Some tokenizers add a start token and their template gives one, others do one of both, and others neither."""
    tokenizer: Any = tiny_tokenizer()
    special = {"special_tokens": [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]}
    own = TemplateProcessing(single="<s> $A" if adds else "$A", pair="$A $B", **special)
    tokenizer.backend_tokenizer.post_processor, tokenizer.chat_template = own, template
    messages = [{"role": "user", "content": "once upon a time"}]
    asked = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    answer = [*tokenizer("I see", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    record = writing._record(0, writing.Prompt(asked, messages), answer, tokenizer, most=99)
    assert writing.Written(record["text"]).tokens(tokenizer)[0] == [*asked, *answer]


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
    for text in writing._kept(tmp_path, assistant_only=False):
        rows = pack([(DataSource("written"), [text])], tokenizer, sequence_length=64, num_tokens=None, seed=0)
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


@pytest.mark.parametrize(("written", "answer", "alike"), CASES)
def test_answers_are_compared_by_what_they_come_to(written: str, answer: str, alike: bool):
    assert answers_alike(written, answer) is alike
