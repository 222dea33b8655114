"""shoal's own tasks ask what they should, match answers as they should, and others can be named beside them.

Covers: shoal.eval.tasks.documents, shoal.eval.tasks.names, shoal.eval.tasks.protocols.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cases import cases
from datasets import Dataset
from evaluations import evaluate, load_tasks
from tiny import tiny_model, tiny_tokenizer

from shoal.errors import UserError
from shoal.eval.tasks import names as naming
from shoal.eval.tasks.protocols import match_last
from shoal.recipe.evaluate import Eval

CASES = cases(__file__)

ASKED: dict[str, str] = CASES["asked"]
"""Task -> hash of all that 20 of their items ask and expect, and what scores are called.

Never changed since the first version, so that scores of all versions can be compared.
"""
FIRST_ITEMS = 20
OWN_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def first_items(task: Any) -> list[list[Any]]:
    """Of the first items: identity, requests with prompts and settings of writing, expected answer, question."""
    items = []
    for number, doc in enumerate(list(task.eval_docs)[:FIRST_ITEMS]):
        shown = task.fewshot_context(doc, int(task.config.num_fewshot or 0))
        requests = task.construct_requests(doc, shown, metadata=(task.task_name, number, 1))
        target = task.doc_to_target(doc)
        if task.OUTPUT_TYPE == "multiple_choice":
            target = task.doc_to_choice(doc)[target]
        arguments = [request.args for request in (requests if isinstance(requests, list) else [requests])]
        items.append([doc["id"], arguments, target.strip(), task.doc_to_text(doc)])
    return items


@pytest.mark.slow
def test_what_our_own_tasks_ask_has_never_changed() -> None:
    with_examples = load_tasks(tuple(ASKED), num_fewshot=2)
    found = {}
    for name, task in load_tasks(tuple(ASKED)).items():
        described = task.config.metadata
        metric = described["metric"].removesuffix("_per_token")
        options = 4 if task.OUTPUT_TYPE == "multiple_choice" else 0
        content = [
            first_items(task),
            first_items(with_examples[name]),
            *(described.get(key) for key in ("ability", "protocol", "metric", "family", "level")),
            1 / options if options else described["chance"],
            task.higher_is_better()[metric],
            str(task.VERSION),
            task.config.num_fewshot,
            len(task.eval_docs),
        ]
        found[name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    assert found == ASKED


@pytest.mark.parametrize(("written", "final", "right"), CASES["last"])
def test_the_last_number_name_or_place_of_the_first_line_counts(written: str, final: str, right: bool) -> None:
    assert match_last({"answers": [final]}, [written]) == {"match": float(right)}


def test_groups_expand_in_one_order() -> None:
    found = list(load_tasks(["shoal_knowledge", "retrieval_uuid_generation"]))
    assert found == [
        "knowledge_continuation",
        "knowledge_generation",
        "knowledge_loglikelihood",
        "retrieval_uuid_generation",
    ]
    groups = ("shoal", "shoal_retrieval", "shoal_knowledge", "shoal_reasoning", "shoal_retrieval_uuid")
    groups += ("shoal_retrieval_pairs", "shoal_retrieval_position", "shoal_reasoning_steps")
    _, tags = naming.described_tasks(naming.task_folders(None))
    assert [len(tags[group]) for group in groups] == [10, 11, 3, 10, 3, 2, 3, 6]
    assert {task for group in groups for task in tags[group]} == set(ASKED)


def test_tasks_are_identified_by_what_shapes_their_items_and_by_nothing_else(tmp_path: Path) -> None:
    def identity(*tasks: str, folder: Path | None = None) -> str:
        return naming.tasks_fingerprint(tasks, folder)

    knowledge = identity("knowledge_generation")
    assert knowledge == identity("knowledge_continuation") == identity("shoal_knowledge")
    others = ("gsm8k_generation", "reasoning_generation", "mmlu_all_generation")
    assert len({knowledge, identity("shoal"), *map(identity, others)}) == 5
    empty, with_other, with_same = tmp_path / "empty", tmp_path / "other", tmp_path / "same"
    text = (naming.TASKS_DIR / "datasets" / "knowledge.yaml").read_text()
    for folder in (empty, with_other, with_same):
        folder.mkdir()
    (with_same / "mine.yaml").write_text(text.replace("278", "200"))
    (with_other / "own.yaml").write_text(OWN_TASK.format(name="own", data="x"))
    assert identity("knowledge_generation", folder=empty) == knowledge
    assert identity("knowledge_generation", folder=tmp_path / "nowhere") == knowledge
    assert identity("knowledge_generation", folder=with_same) != knowledge
    assert identity("own", folder=with_other) != (own := identity("own", folder=empty))
    (empty / "recipe.yaml").write_text("model: mine\n")
    described = text.replace("dataset: knowledge", "dataset: mine")
    (empty / "sets.yaml").write_text(described)
    assert identity("knowledge_generation", folder=empty) == knowledge, "neither is a recipe beside them"
    assert own != (own := identity("own", folder=empty))
    (empty / "sets.yaml").write_text(re.sub("(?m)^about: .*", "about: in other words", described))
    assert own == identity("own", folder=empty)


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's collection takes seconds to read; an empty one stands in for it, in text and as an index."""
    import lm_eval.tasks

    class Small(lm_eval.tasks.TaskManager):
        def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
            assert not include_defaults or Small.may_be_read
            super().__init__(include_path=include_path, include_defaults=False)

        may_be_read = False

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Small)
    texts = ("task: unheard_of\ntag: einfach\n# of qqq-old", "group: 'dreifach'\n")
    monkeypatch.setattr(naming, "_collection", lambda: dict.fromkeys(naming._names(texts), ""))


@pytest.mark.usefixtures("no_collection")
def test_an_unknown_task_is_refused_with_the_closest_and_without_an_index() -> None:
    with pytest.raises(
        UserError, match=r"'retrival_continuation' is not a task.*did you mean 'retrieval_continuation'"
    ):
        load_tasks(["retrival_continuation"])
    for wrong, right in (("unheard_off", "unheard_of"), ("dreifahc", "dreifach")):
        with pytest.raises(UserError, match=rf"'{wrong}' is not a task.*did you mean '{right}'"):
            load_tasks([wrong])
    with pytest.raises(UserError, match=r"'qqq' is not a task.*`shoal list tasks` names shoal's own"):
        load_tasks(["knowledge_continuation", "qqq"])


def test_what_a_data_set_is_about_is_no_part_of_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = naming.tasks_fingerprint(["knowledge_generation"], None)
    tasks, tags = naming.described_tasks(naming.task_folders(None))
    for changes, same in (({"about": "in other words"}, True), ({"match": "exact"}, False)):
        others = {name: (replace(data, **changes), protocol) for name, (data, protocol) in tasks.items()}
        monkeypatch.setattr(naming, "described_tasks", lambda _, others=others: (others, tags))
        assert (naming.tasks_fingerprint(["knowledge_generation"], None) == before) is same


def test_other_files_next_to_task_files_may_be_anything(tmp_path: Path) -> None:
    """A manifest of a cluster names the task, too; Windows begins a file with a mark of its encoding."""
    (tmp_path / "own.yaml").write_text("\ufeff" + OWN_TASK.format(name="own", data="x"), encoding="utf-8")
    described = (
        (naming.TASKS_DIR / "datasets" / "knowledge.yaml").read_text().replace("dataset: knowledge", "dataset: mine")
    )
    (tmp_path / "sets.yaml").write_text("\ufeff" + described, encoding="utf-8")
    (tmp_path / "job.yaml").write_text("args: [eval, 'eval.tasks=[own]']\n---\nimage: !Ref own\n")
    naming.refuse_unknown(["own", "mine_generation"], tmp_path)
    (tmp_path / "own.yaml").write_text("task: own\nmetadata: [\n")
    with pytest.raises(UserError, match=r"own.yaml: is not a task file"):
        naming.refuse_unknown(["own"], tmp_path)


def test_without_the_hub_its_data_has_to_be_in_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"HF_HUB_OFFLINE": True, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    for name, value in places.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr(naming, "_collection", lambda: {"far": "Org/FarData"})
    with pytest.raises(UserError, match="its data set Org/FarData is not in the cache, and HF_HUB_OFFLINE is set"):
        naming.refuse_offline(["far"], None)
    (tmp_path / "far.yaml").write_text(OWN_TASK.format(name="far", data="x"))
    naming.refuse_offline(["far"], tmp_path)  # which lm-eval takes
    for folder in (tmp_path / "home/datasets/Org___far_data", tmp_path / "hub/datasets--Org--FarData"):
        folder.mkdir(parents=True)
        naming.refuse_offline(["far"], None)
        folder.rmdir()


def test_a_folder_of_data_is_identified_by_what_its_data_sets_read(tmp_path: Path) -> None:
    """Also where a set lies deeper, or its file has another ending; a run that writes beside them changes nothing."""
    (tmp_path / "own.yaml").write_text(
        "dataset: own\nabout: x\nability: knowledge\nfolder: sets/mine\nitems: rows.json\noptions: o\nanswer: a\n"
    )
    (tmp_path / "sets/mine").mkdir(parents=True)
    identities = []
    for place, text in (("sets/mine/rows.json", "1"), ("runs.json", "2"), ("sets/mine/rows.json", "3")):
        (tmp_path / place).write_text(text)
        identities.append(naming.local_data_fingerprint(str(tmp_path), tmp_path))
    assert identities[0] == identities[1] != identities[2]


def test_a_hub_task_without_network_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    text = OWN_TASK.format(name="far", data="x").replace("dataset_path: json", "dataset_path: nobody/nothing")
    text = "\n".join(line for line in text.splitlines() if "dataset_kwargs" not in line)
    (tmp_path / "far.yaml").write_text(text)
    with pytest.raises(UserError, match=r"'far' cannot be loaded .*may need the Hugging Face Hub"):
        load_tasks(["far"], include_path=tmp_path)


def write_own(folder: Path, more: str = "") -> None:
    """A task of one item."""
    row = '{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}\n'
    (folder / "data.jsonl").write_text(row)
    (folder / "own.yaml").write_text(OWN_TASK.format(name="own", data=folder / "data.jsonl") + more)


def test_examples_are_never_taken_from_the_scored_items(tmp_path: Path) -> None:
    write_own(tmp_path)
    assert load_tasks(["own"], include_path=tmp_path)["own"].config.num_fewshot == 0
    with pytest.raises(UserError, match=r"eval.num_fewshot: 'own' has only 0 examples"):
        load_tasks(["own"], include_path=tmp_path, num_fewshot=2)


def test_a_task_that_runs_what_a_model_writes_is_asked_for_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_own(tmp_path, "unsafe_code: true\n")
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(UserError, match=r"eval\.tasks: 'own' runs code that the model writes; .* HF_ALLOW_CODE_EVAL=1"):
        load_tasks(["own"], include_path=tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert "own" in load_tasks(["own"], include_path=tmp_path)


@pytest.mark.slow
def test_ifeval_is_asked_by_lm_evals_name_and_scored_item_by_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs of the network, and packages that may be missing, are stood in for; the task is lm-eval's own."""
    monkeypatch.setitem(sys.modules, "langdetect", ModuleType("langdetect"))
    frozen = ModuleType("immutabledict")
    monkeypatch.setattr(frozen, "immutabledict", dict, raising=False)
    monkeypatch.setitem(sys.modules, "immutabledict", frozen)
    monkeypatch.setattr("nltk.data.find", lambda *_: "punkt_tab is here")
    rules: list[tuple[list[str], list[dict[str, Any]]]] = [
        (["punctuation:no_comma"], [{}]),
        (["keywords:existence"], [{"keywords": ["zebra"]}]),
    ]
    rows = [
        {"key": number, "prompt": "Write about tea.", "instruction_id_list": names, "kwargs": [*own]}
        for number, (names, own) in enumerate(rules)
    ]
    hub = {"google/IFEval": {"train": Dataset.from_list(rows)}}
    monkeypatch.setattr("datasets.load_dataset", lambda path, **_: hub[path])
    model = tiny_model("llama", max_position_embeddings=1500)
    (score,) = evaluate(model, tiny_tokenizer(), Eval(("ifeval",), perplexity_tokens=0), seed=0)
    assert (score.task, score.protocol, score.metric) == ("ifeval", "generation", "prompt_level_strict_acc")
    assert (score.n, score.chance, score.column) == (2, 0.0, "public")
    assert {item.score for item in score.items} <= {0.0, 1.0}
    assert score.items[1].score == 0
