"""MMLU as one column per protocol asks what lm-eval's 57 tasks ask, and the same items under every protocol."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from evaluations import load_tasks

from shoal.errors import UserError
from shoal.recipe.evaluate import CONFIGS_DIR

THEIRS = {
    "loglikelihood": "mmlu_anatomy",
    "continuation": "mmlu_anatomy_continuation",
    "generation": "mmlu_anatomy_generative",
}
LOCAL = """\
include: {shipped}
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}, dev: {dev}}}}}
"""


def questions(subjects: list[str], per_subject: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f" {subject}?{number} ",
            "subject": subject,
            "choices": ["w", "x", "y", "zz"],
            "answer": number % 4,
        }
        for subject in subjects
        for number in range(per_subject)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ours and lm-eval's by protocol, over the same rows of a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "mmlu.jsonl"
    rows = questions(["anatomy", "high_school_us_history"], 30)
    data.write_text("\n".join(map(json.dumps, rows)))
    examples, of_anatomy = folder / "dev.jsonl", folder / "dev_anatomy.jsonl"
    both = questions(["high_school_us_history", "anatomy"], 6)
    shown = [{**row, "question": f"shown{row['question']}"} for row in both]
    examples.write_text("\n".join(map(json.dumps, shown)))
    of_anatomy.write_text("\n".join(map(json.dumps, shown[6:])))
    theirs = Path(lm_eval.tasks.__file__).parent / "mmlu"
    for protocol, name in THEIRS.items():
        shipped = {f"ours_{protocol}": CONFIGS_DIR / "hub_tasks" / f"mmlu_all_{protocol}.yaml"}
        (shipped[f"theirs_{protocol}"],) = (
            file for file in theirs.glob("*/mmlu_anatomy.yaml") if f'task": "{name}"' in file.read_text()
        )
        for local, file in shipped.items():
            dev = examples if local.startswith("ours") else of_anatomy
            (folder / f"{local}.yaml").write_text(LOCAL.format(shipped=file.resolve(), name=local, data=data, dev=dev))
    return load_tasks([f"{side}_{protocol}" for side in ("ours", "theirs") for protocol in THEIRS], include_path=folder)


@functools.cache
def asked(task: Any, num_fewshot: int = 0) -> dict[str, Any]:
    """Question -> prompt, options and answer."""
    found = {}
    for doc in task.eval_docs:
        options = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
        found[doc["question"]] = task.fewshot_context(doc, num_fewshot), options, task.doc_to_target(doc)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_fewshot", [0, 5])
@pytest.mark.parametrize("protocol", THEIRS)
def test_prompts_options_and_matching_are_those_of_lm_eval(
    protocol: str, num_fewshot: int, tasks: dict[str, Any]
) -> None:
    ours, theirs = tasks[f"ours_{protocol}"], tasks[f"theirs_{protocol}"]
    by_us, by_them = asked(ours, num_fewshot), asked(theirs, num_fewshot)
    anatomy = [name for name in by_us if "anatomy" in name]
    assert len(anatomy) == 30
    for question in anatomy:
        prompt, options, answer = by_us[question]
        assert prompt.count("shown anatomy?") == num_fewshot
        assert (prompt, options, str(answer)) == (*by_them[question][:2], str(by_them[question][2]))
    settings, of_theirs = ours.config.to_dict(), theirs.config.to_dict()
    if protocol == "generation":  # what comes after so many tokens of the first line cannot make it a letter
        settings["generation_kwargs"] = dict(settings["generation_kwargs"])
        assert settings["generation_kwargs"].pop("max_gen_toks") == 8
    for key in ("output_type", "generation_kwargs", "filter_list", "target_delimiter"):
        assert settings.get(key) == of_theirs.get(key)


def test_all_protocols_ask_the_same_items_and_the_first_ones_are_of_all_subjects(tasks: dict[str, Any]) -> None:
    orders = {tuple(tasks[f"ours_{protocol}"].eval_docs["question"]) for protocol in THEIRS}
    (order,) = orders
    assert len(order) == 60
    assert 5 < sum("anatomy" in question for question in order[:20]) < 15
    prompts = [prompt for prompt, _, _ in asked(tasks["ours_continuation"]).values()]
    assert sum("about high school us history.\n" in prompt for prompt in prompts) == 30


def test_more_examples_than_a_subject_has_are_refused(tasks: dict[str, Any]) -> None:
    task = tasks["ours_loglikelihood"]
    with pytest.raises(UserError, match=r"num_fewshot: ours_loglikelihood has 6 examples of .*, and 7 are asked for"):
        task.fewshot_context(task.eval_docs[0], 7)
