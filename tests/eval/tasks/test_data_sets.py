"""One description of a data set gives the same items under every protocol, asked as lm-eval asks them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from evaluations import evaluate, load_tasks
from lm_eval.tasks import TaskManager
from tiny import tiny_model, tiny_tokenizer

from shoal.abilities import GENERATORS
from shoal.errors import UserError
from shoal.eval.tasks.data_sets import TaskProtocol, read_data_sets
from shoal.eval.tasks.load import tasks_of
from shoal.eval.tasks.names import TASKS_DIR
from shoal.eval.tasks.protocols import task_config
from shoal.recipe.evaluate import Eval

CASES = cases(__file__)

DATA_SETS = read_data_sets(TASKS_DIR)
COUNTED = {
    "gsm8k/train.jsonl": [
        {"question": f"{n}+1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(6)
    ]
}
ROWS: dict[str, list[dict[str, Any]]] = CASES["rows"] | COUNTED


def write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    for name, found in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), ROWS)


def load(name: str, folder: Path | None, **settings: Any) -> Any:
    return load_tasks([name], data_dir=folder, **settings)[name]


def requests(task: Any, doc: dict[str, Any]) -> list[tuple[Any, ...]]:
    prompt = task.fewshot_context(doc, int(task.config.num_fewshot or 0))
    made = task.construct_requests(doc, prompt, metadata=("t", 0, 1))
    return [one.args for one in (made if isinstance(made, list) else [made])]


def asked(name: str, folder: Path | None, number: int = 0) -> list[tuple[Any, ...]]:
    task = load(name, folder)
    return requests(task, task.eval_docs[number])


# --- the descriptions ---------------------------------------------------------------------------------------------


def test_every_task_says_how_its_items_relate_to_healing_text() -> None:
    for data in DATA_SETS.values():
        if data.bundled in GENERATORS:
            assert data.column in ("in", "reworded", "out"), data.dataset
        else:  # what others wrote is public, but for look-ups in the very form that text has
            assert data.column == ("in" if "kv_file" in data.dataset else None if data.bundled else "public")
        for protocol in data.protocols:
            told = task_config(data, protocol, None)["metadata"]
            assert (told["column"], told.get("reworded_of", "")) == (data.column or "", data.reworded_under(protocol))
            assert (data.column == "reworded") == ("reworded_of" in told), data.dataset


REWORDED = """\
dataset: my_reworded
about: {about}
ability: retrieval
column: reworded
reworded_of: {reworded_of}
bundled: retrieval
protocols: [continuation]
parts: {parts}
"""


def test_a_reworded_data_set_names_the_task_whose_items_it_asks_again(tmp_path: Path) -> None:
    reworded = {"about": "mine", "reworded_of": "retrieval_{}pairs", "parts": "{values: [20, 50], setting: num_pairs}"}
    (tmp_path / "own.yaml").write_text(REWORDED.format(**reworded))
    tasks = load_tasks(["my_reworded_20_continuation", "my_reworded_50_continuation"], include_path=tmp_path)
    told = [(task.config.metadata["column"], task.config.metadata["reworded_of"]) for task in tasks.values()]
    assert told == [("reworded", "retrieval_20pairs_continuation"), ("reworded", "retrieval_50pairs_continuation")]
    misspelt = {"reworded_of": "retrival_{}pairs"}
    untrained = {"reworded_of": "needles_{}of80", "parts": "{values: [2, 4]}"}
    for task, wrong, message in (
        ("my_reworded_20", misspelt, r"'my_reworded_20': reworded_of is 'retrival_.*no .* task 'retrival_20pairs_cont"),
        ("my_reworded_2", untrained, r"reworded_of is 'needles_.*of the column in has a task 'needles_2of80"),
    ):
        folder = tmp_path / task
        folder.mkdir()
        (folder / "own.yaml").write_text(REWORDED.format(**reworded | wrong))
        with pytest.raises(UserError, match=message):
            load_tasks([f"{task}_continuation"], include_path=folder)


@pytest.mark.slow
def test_the_name_of_a_bundled_data_set_stands_for_all_its_protocols() -> None:
    named = tasks_of(Eval(tasks=("knowledge", "reasoning_1step")))
    protocols = (*DATA_SETS["knowledge"].protocols, *DATA_SETS["reasoning_1step"].protocols)
    assert [name.rpartition("_")[2] for name in named] == list(protocols)
    bundled = {name for name, data in DATA_SETS.items() if data.bundled}
    assert not bundled & {*TaskManager().task_index}, "lm-eval's own task of that name could no longer be named"


def test_every_bundled_task_is_complete_and_its_protocols_ask_the_same_items() -> None:
    first_parts = {data.about: data for data in reversed(DATA_SETS.values()) if data.bundled and data.page is None}
    loaded = load_tasks(f"{data.dataset}_{protocol}" for data in first_parts.values() for protocol in data.protocols)
    for data in first_parts.values():
        tasks: dict[TaskProtocol, Any] = {protocol: loaded[f"{data.dataset}_{protocol}"] for protocol in data.protocols}
        ids = {tuple(task.eval_docs["id"]) for task in tasks.values()}
        assert len(ids) == 1
        assert len(set(ids.pop())) == (data.num_items or 200)
        for protocol, task in tasks.items():
            described = task.config.metadata
            family = data.family_under(protocol)
            told = (described.get("family"), described.get("level"))
            assert told == (family, None if family is None else data.level)
            first = requests(task, task.eval_docs[0])
            assert not first[0][0].endswith(" ")
            assert (task.OUTPUT_TYPE == "generate_until") == (protocol == "generation")
            assert ("chance" in described) == (task.OUTPUT_TYPE != "multiple_choice")


@pytest.mark.slow
def test_written_answers_have_the_chance_of_a_guesser_who_takes_what_the_prompt_names() -> None:
    for name, num_named in CASES["answers named by a prompt"].items():
        task = load(f"{name}_generation", None)
        assert task.config.metadata["chance"] == 1 / num_named
        doc = task.eval_docs[0]
        kind = name.split("_")[0].rstrip("s")
        named = {
            "state": re.findall(r"has the (\w+)", doc["question"]),
            "multi": re.findall(r"(\w+) ->", doc["question"]),
            "kv": re.findall(r': "([^"]+)"', doc["context"]),
            "needle": re.findall(r"\b\d{4,}\b", doc["context"]),
        }[kind]
        assert len(set(named)) == num_named, "so many answers are named"
        assert doc["answers"][0] in named
    reasoning = load("reasoning_generation", None)
    questions = [doc["question"] for doc in reasoning.eval_docs]
    names_or_places = re.compile(r"(\w+)(?= is \w+ than)|(?:in the|to the|than) (\w+)")
    named = [{first or second for first, second in names_or_places.findall(text)} for text in questions]
    chances = [0 if "How many" in text else 1 / len(own) for own, text in zip(named, questions, strict=True)]
    assert reasoning.config.metadata["chance"] == pytest.approx(sum(chances) / len(questions))
    for name in ("nested_arithmetic_k2", "nested_arithmetic_written_k2", "needles_asked_2of8"):
        assert load(f"{name}_generation", None).config.metadata["chance"] == 0


# --- prompts ------------------------------------------------------------------------------------------------------


def test_a_question_with_options_is_asked_under_three_protocols(data_dir: Path) -> None:
    tasks = {p: load(f"arc_easy_{p}", data_dir) for p in ("loglikelihood", "continuation", "generation")}
    ids = [list(task.eval_docs["id"]) for task in tasks.values()]
    assert ids[0] == ids[1] == ids[2]
    found = {p: next(requests(t, doc) for doc in t.eval_docs if "burns" in doc["question"]) for p, t in tasks.items()}
    lettered = "What burns?\nA. wood\nB. rock\nC. sand\nAnswer:"
    assert found["loglikelihood"] == [(lettered, " A"), (lettered, " B"), (lettered, " C")]
    plain = "Question: What burns?\nAnswer:"
    assert found["continuation"] == [(plain, " wood"), (plain, " rock"), (plain, " sand")]
    ((prompt, settings),) = found["generation"]
    assert (prompt, settings["until"]) == (lettered, ["\n"])
    assert tasks["generation"].process_results(tasks["generation"].eval_docs[0], [" A"]).keys() == {"match"}
    for doc in tasks["generation"].eval_docs:
        right = "A" if "burns" in doc["question"] else "B"
        written = {letter: tasks["generation"].process_results(doc, [f" {letter}"])["match"] for letter in "AB"}
        assert written == {letter: float(letter == right) for letter in "AB"}


@pytest.mark.slow
def test_other_kinds_of_questions_are_asked_as_they_should(data_dir: Path) -> None:
    assert asked("winogrande_continuation", data_dir) == [
        ("Ann thanked Eve because Ann", " had helped."),
        ("Ann thanked Eve because Eve", " had helped."),
    ]
    assert asked("winogrande_loglikelihood", data_dir)[0][0].endswith("stand for?\nA. Ann\nB. Eve\nAnswer:")
    context = "Cooking:  A pan. is hot. She"
    assert asked("hellaswag_continuation", data_dir) == [
        (context.replace("  ", " "), " stirs it."),
        (context.replace("  ", " "), " sings."),
    ]
    assert asked("lambada_continuation", data_dir) == [("She gave the dog a", " bone")]
    assert asked("wikitext2_rolling", data_dir) == [("\n = A page = \n\n Text .",)]
    assert asked("boolq_continuation", data_dir)[1] == ("It is so.\nQuestion: is it so?\nAnswer:", " yes")
    assert len(load("bbh_navigate_loglikelihood", data_dir).eval_docs) == 1  # the other's answer is no option
    assert asked("bbh_navigate_loglikelihood", data_dir)[0][0] == "Do you return?\nA. Yes\nB. No\nAnswer:"
    options = asked("kv_file_10pairs_continuation", data_dir)
    assert '"k4": "v4"' in options[0][0]
    assert " v4" in [option for _, option in options]
    assert len({option for _, option in options}) == 4
    ((prompt, _),) = asked("gsm8k_generation", data_dir)
    assert prompt.startswith("Question: 0+1?\nAnswer: 0+1=1\nThe answer is 1.\n\nQuestion: 1+1?")
    assert prompt.endswith("\n\nQuestion: Tom has 3 and buys 4. How many?\nAnswer:")
    assert asked("gsm8k_worked", data_dir)[0] == (prompt, " 3+4=7\nThe answer is 7.")
    assert asked("svamp_worked", data_dir)[0][1] == " 6 - ( 3 + 2 ) = 1. The answer is 1."
    ((prompt, _),) = asked("triviaqa_generation", data_dir)
    assert prompt.count("Answer: ") == 3
    trivia = load("triviaqa_generation", data_dir)
    assert trivia.process_results(trivia.eval_docs[0], [" Edward III of England"]) == {"match": 1.0}
    assert trivia.process_results(trivia.eval_docs[0], [" Edward IV"]) == {"match": 0.0}


# --- through a model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_form_is_scored_through_a_model(data_dir: Path) -> None:
    expected = {
        "arc_easy_loglikelihood": ("loglikelihood", "acc", (1 / 3 + 1 / 2) / 2, 2),
        "arc_easy_continuation": ("continuation", "acc_norm", (1 / 3 + 1 / 2) / 2, 2),
        "arc_easy_generation": ("generation", "match", (1 / 3 + 1 / 2) / 2, 2),
        "winogrande_continuation": ("continuation", "acc", 0.5, 1),
        "lambada_continuation": ("continuation", "acc", 0.0, 1),
        "wikitext2_rolling": ("rolling", "bits_per_byte", 0.0, 1),
        "triviaqa_worked": ("worked", "nats_per_token", 0.0, 1),
        "nested_arithmetic_k2_generation": ("generation", "match", 0.0, 2),
    }
    settings = Eval(tasks=tuple(expected), data_dir=str(data_dir), limit=2, perplexity_tokens=64)
    scores = evaluate(tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer(), settings, seed=0)
    found = {score.task: (score.protocol, score.metric, score.chance, score.n) for score in scores[:-1]}
    assert found == expected
    assert (scores[-2].family, scores[-2].level) == ("nested_arithmetic", 2)
    assert [item.id for item in scores[0].items] == [item.id for item in scores[2].items]


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), CASES["wrong rows"])
def test_a_row_that_is_not_as_expected_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "q" not in row:
        row = ROWS["arc_easy/test.jsonl"][0] | row
    folder = write(tmp_path, {"arc_easy/test.jsonl": [row], "arc_easy/train.jsonl": ROWS["arc_easy/train.jsonl"]})
    with pytest.raises(UserError, match=message):
        load("arc_easy_continuation", folder)


def test_what_the_hub_lacks_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval.data_dir: '.*nowhere' is not a folder"):
        load("arc_easy_continuation", tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"eval.data_dir: '.*' lacks files; .*arc_easy/test.jsonl .* or remove their tasks"
    ):
        load("arc_easy_continuation", tmp_path)
    with pytest.raises(UserError, match=r"arc_easy \(items\) holds no rows; a task needs"):
        load("arc_easy_continuation", write(tmp_path, {"arc_easy/test.jsonl": [], "arc_easy/train.jsonl": []}))
    with pytest.raises(
        UserError,
        match=r"the Hub does not have nq_passage; set eval.data_dir to a folder with nq_open_oracle/test.jsonl and "
        r"piqa/validation.jsonl \(described in shoal's .* remove their tasks$",
    ):
        load_tasks(["nq_passage_generation", "nq_passage_worked", "piqa_continuation"])


OWN = """\
dataset: own
about: mine
ability: knowledge
items: test.jsonl
options: choices
answer: gold
"""


def test_a_description_of_the_users_own_works_beside_ours(tmp_path: Path) -> None:
    tasks, data = tmp_path / "tasks", tmp_path / "data"
    tasks.mkdir()
    (tasks / "own.yaml").write_text(OWN)
    (data / "own").mkdir(parents=True)
    (data / "own" / "test.jsonl").write_text(json.dumps({"question": "q", "choices": ["x", "y"], "gold": "y"}))
    task = load_tasks(["own_continuation"], include_path=tasks, data_dir=data)["own_continuation"]
    assert [doc["answer"] for doc in task.eval_docs] == [1]
    # a notebook asks again after its files were edited
    (tasks / "own.yaml").write_text(f"{OWN}context: 'Say it: {{{{question}}}}'\n")
    (tasks / "more.yaml").write_text(OWN.replace("dataset: own", "dataset: more\nfolder: own"))
    again = load_tasks(["own_continuation", "more_continuation"], include_path=tasks, data_dir=data)
    assert again["own_continuation"].doc_to_text(again["own_continuation"].eval_docs[0]) == "Say it: q"
    assert "more_continuation" in again


def test_the_page_on_own_tasks_has_descriptions_that_work(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/how-to/own-tasks.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"```yaml\ndataset: (\w+)\n(.*?)```", page, re.DOTALL))
    for name, rest in written.items():
        trained = "column: in\n" if name == "my_science" else ""  # as the page asks for
        (tmp_path / f"{name}.yaml").write_text(f"dataset: {name}\n{trained}{rest}")
    science, faq = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    rows = {"my_science/test.jsonl": [json.loads(science)], "my_faq/test.jsonl": [json.loads(faq)]}
    write(tmp_path, rows)
    names = ["my_science_generation", "my_science_reworded_continuation", "my_faq_generation", "my_faq_worked"]
    tasks = load_tasks(names, include_path=tmp_path, data_dir=tmp_path)
    assert len(written) == 3
    assert [task.eval_docs[0]["answer"] for task in [*tasks.values()][:2]] == [1, 1]
    assert tasks["my_faq_generation"].eval_docs[0]["answers"] == ["Lima"]


@pytest.mark.parametrize(("old", "new", "message"), CASES["descriptions"])
def test_a_wrong_description_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_tasks(["own_continuation"], include_path=tmp_path)
