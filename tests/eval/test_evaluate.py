"""One model's evaluation: stable items, equal numbers for every batch size and rank count, honest refusals.

Covers: shoal.eval.harness.perplexity, shoal.eval.harness.samples.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import SETTINGS, assert_same, load_tasks, run
from pydantic import TypeAdapter
from ranks import call_on_ranks
from tiny import starting_tokenizer, tiny_checkpoint, tiny_model, tiny_tokenizer

from shoal.artifacts.evaluation import Scores, TaskScore
from shoal.errors import UserError
from shoal.eval.evaluate import Questions, role_evaluation
from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.perplexity import perplexity, windows
from shoal.eval.harness.samples import task_score
from shoal.launch.verbs.evaluate import eval_inputs
from shoal.launch.verbs.run import open_run
from shoal.models.load import Checkpoint, LoadSettings
from shoal.ranks import free_port
from shoal.recipe.evaluate import Eval
from shoal.recipe.recipe import parse_recipe


@pytest.fixture(scope="module")
def scores() -> tuple[TaskScore, ...]:
    return run()


@pytest.mark.slow
def test_scores_carry_what_a_reader_needs(scores: tuple[TaskScore, ...]) -> None:
    described = [(s.task, s.ability, s.protocol, s.metric, s.chance, s.higher_is_better, s.column) for s in scores]
    assert described == [
        ("knowledge_continuation", "knowledge", "continuation", "acc", 0.25, True, "in"),
        ("knowledge_loglikelihood", "knowledge", "loglikelihood", "acc", 0.25, True, "in"),
        ("retrieval_generation", "retrieval", "generation", "match", 0.1, True, "in"),
        ("reasoning_worked", "reasoning", "worked", "nats_per_token", 0.0, False, "in"),
        ("perplexity", "language", "rolling", "nats_per_token", 0.0, False, ""),
    ]
    for score in scores[:4]:
        assert score.n == len(score.items) == 6
        assert score.version == "1.0"
        assert score.ci_low <= score.score <= score.ci_high
        assert len({item.id for item in score.items}) == 6
        assert all(item.target for item in score.items)
    assert scores[1].items[0].prediction in "ABCD"
    assert scores[1].items[0].target in "ABCD"


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size_changes_nothing(scores: tuple[TaskScore, ...], batch_size: int) -> None:
    assert_same(run(batch_size=batch_size), scores)


def test_role_evaluation_is_an_artifact(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", max_position_embeddings=4096)
    model = tiny_model("llama", max_position_embeddings=4096)
    settings = dataclasses.replace(SETTINGS, tasks=("knowledge_continuation",))
    checkpoint = Checkpoint.read(folder, LoadSettings())
    made = role_evaluation("pruned", checkpoint, Questions(settings, 0), inputs={"model": "m"})
    made.save(tmp_path / "pruned.json")
    assert Scores.load(tmp_path / "pruned.json") == made
    assert (made.role, made.num_layers, made.provenance.inputs) == ("pruned", 6, {"model": "m"})
    assert made.num_bytes > 0
    assert made.num_parameters == sum(p.numel() for p in model.parameters())


def test_how_a_model_writes_by_itself_identifies_its_scores(teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "model"))
    made = open_run(parse_recipe({"model": str(folder), "run_dir": str(tmp_path / "run")}))
    file = folder / "generation_config.json"
    said, ends = json.loads(file.read_text()), json.loads((folder / "config.json").read_text())["eos_token_id"]
    identities: list[dict[str, Any]] = []
    for own in ({}, {"repetition_penalty": 1.3}, {"use_cache": False, "eos_token_id": ends}):
        file.write_text(json.dumps({**said, **own}))
        identities.append(eval_inputs(made, folder))
    assert identities[0] == identities[2]
    assert identities[1] == {**identities[0], "generation_config.json": {"repetition_penalty": 1.3}}


@pytest.mark.parametrize(("positions", "length"), [(64, 64), (4096, 512)])
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), starting_tokenizer()], ids=["plain", "starts"])
def test_perplexity_equals_a_plain_forward_over_each_window(tokenizer: Any, positions: int, length: int) -> None:
    model = tiny_model("gemma3", max_position_embeddings=positions)
    lm = CausalLM(model, tokenizer, 4)
    starts = tokenizer("")["input_ids"] == [256]
    settings = Eval(perplexity_tokens=1500)
    found = perplexity(lm, settings)
    total, count, longest = 0.0, 0, 0
    for _, context, scored, _ in windows(lm.tokenizer, settings, max_length=positions):
        ids = torch.tensor([context + scored])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_probs.gather(1, ids[0, 1:, None])[len(context) - 1 :].sum())
        count += len(scored)
        longest = max(longest, len(scored))
        assert len(ids[0]) <= positions + 1, "the last token is scored and not read"
        assert context[0] == 256 or not starts
    assert (count, longest) == (1500, length - starts)
    assert found.version == f"1.0, windows of {length} tokens"
    assert found.score == pytest.approx(total / count, abs=1e-5)
    assert sum(item.weight for item in found.items) == 1500


def own_task(folder: Path, text: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
    (folder / "own.yaml").write_text(f"task: own\n{data}{text}")
    return {"tasks": ("own",), "include_path": str(folder), "perplexity_tokens": 100}


MULTIPLE = "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: options\ndoc_to_target: answer\n"


def test_a_task_file_says_its_column_and_no_other_word(tmp_path: Path) -> None:
    rows = [{"q": "a b", "options": ["A", "B"], "answer": 1}]
    (score, _) = run(**own_task(tmp_path, MULTIPLE + "metadata: {column: out}\n", rows))
    assert score.column == "out"
    wrong = own_task(tmp_path, MULTIPLE + "metadata: {column: outside}\n", rows)
    with pytest.raises(UserError, match=r"metadata: column is 'outside', but must be one of in, reworded, out, public"):
        run(**wrong)


def test_guessing_is_right_as_often_as_options_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": "a b", "options": ["A", "B", "C", "D"], "answer": [0, 2, 3]}] * 2
    assert run(**own_task(tmp_path, MULTIPLE, rows))[0].chance == 0.75
    assert "what guessing reaches" not in caplog.text
    (tmp_path / "rules.py").write_text("def judged(doc, results):\n    return {'acc': 0.5}\n")
    (score, _) = run(**own_task(tmp_path, MULTIPLE + "process_results: !function rules.judged\n", rows))
    assert (score.score, score.rates) == (0.5, {})
    assert "own: a function of its own decides what is right, so what guessing reaches is not known" in caplog.text


@pytest.mark.parametrize("wrong", ["chance: 25", "chance: quarter", "level: high", "chance: 1/0"])
def test_a_chance_or_level_that_is_none_is_refused_before_anything_is_scored(wrong: str, tmp_path: Path) -> None:
    rows = [{"q": "a b", "options": ["A", "B"], "answer": 1}]
    own_task(tmp_path, f"{MULTIPLE}metadata: {{{wrong}}}\n", rows)
    with pytest.raises(UserError, match=r"'own': metadata: .*; correct it, or remove the task"):
        load_tasks(["own"], include_path=tmp_path)


def test_rolling_tasks_count_bytes(tmp_path: Path) -> None:
    text = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: q\n'
    text += "metric_list: [{metric: bits_per_byte}]\n"
    (score, _) = run(**own_task(tmp_path, text, [{"q": "a text"}, {"q": "another, longer text"}]))
    assert (score.metric, score.protocol, score.higher_is_better) == ("bits_per_byte", "rolling", False)
    assert [item.weight for item in score.items] == [6.0, 20.0]
    assert 4 < score.score < 25


def test_only_the_first_filter_counts() -> None:
    class Task:
        OUTPUT_TYPE, VERSION = "generate_until", 3.0
        config = type("Config", (), {"metadata": None, "tag": None, "to_dict": lambda self: {}})()

        def doc_to_text(self, doc: dict[str, Any]) -> str:
            return "Six and one?"

        def higher_is_better(self) -> dict[str, bool]:
            return {"exact_match": True}

    def sample(number: int, kind: str, value: float) -> dict[str, Any]:
        shared = {"doc": {}, "doc_id": number, "doc_hash": str(number) * 64, "target": "7", "resps": [["seven"]]}
        shared |= {"arguments": [("Six and one?", {"max_gen_toks": 4})], "filtered_resps": ["seven"]}
        return {**shared, "filter": kind, "metrics": ["exact_match"], "exact_match": value}

    logged = [sample(1, "strict", 0.0), sample(1, "loose", 1.0), sample(0, "strict", 1.0), sample(0, "loose", 1.0)]
    score = task_score("gsm", Task(), logged, num_fewshot=5, count_tokens=lambda *_: 1)
    assert (score.score, score.metric) == (0.5, "exact_match (strict)")
    assert (score.version, score.protocol) == ("3.0", "generation")
    assert [item.score for item in score.items] == [1.0, 0.0]


OF_TWO_RANKS: dict[str, Any] = {"tasks": ("retrieval_continuation", "shoal_knowledge", "reasoning_worked"), "limit": 5}


def evaluate_on_rank(rank: int, ranks: int, folder: Path, port: int) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    (folder / f"{rank}.json").write_bytes(TypeAdapter(tuple[TaskScore, ...]).dump_json(run(**OF_TWO_RANKS)))


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    call_on_ranks(evaluate_on_rank, tmp_path, free_port(), ranks=2)
    read = TypeAdapter(tuple[TaskScore, ...]).validate_json
    found = [read((tmp_path / f"{rank}.json").read_bytes()) for rank in range(2)]
    assert found[0] == found[1]
    expected = run(**OF_TWO_RANKS)
    assert_same(found[0], expected)
    assert [score.task for score in found[0]] == [score.task for score in expected]


@pytest.mark.slow
def test_one_task_may_get_a_number_of_items_of_its_own():
    scores = run(tasks=("knowledge_continuation", "reasoning_worked"), limit={"default": 5, "reasoning_worked": 2})
    assert [score.n for score in scores[:2]] == [5, 2]
    whole = run(tasks=("reasoning_worked",), limit=5)
    assert [item.id for item in scores[1].items] == [item.id for item in whole[0].items[:2]]
