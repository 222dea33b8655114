"""What a report says of columns: wording and ability are told apart, and with a control what training itself taught."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from results import FORMED_ROLES, formed, write_formed
from told_report import told

LOOK_UPS = ("retrieval_generation", "retrieval_reworded_generation")


def test_wording_gaps_are_in_the_table_of_forms_and_more_than_the_teacher_is_no_share(tmp_path: Path) -> None:
    text = told(write_formed(tmp_path)).replace("\\", "")
    section = text.split("## Wording and ability")[1].split("\n## ")[0]
    assert "| Task | Teacher | Pruned | Control | Distilled | Distilled − teacher |" in section
    assert "| retrieval, generated | +4 points [−9, +17], 64 % − 60 % | " in section
    assert "| +54 points [+43, +63], 98 % − 44 % | +50 points [" in section
    assert "−1.25 nats [" in section
    scores = text.split("**Scores with 95 % intervals")[1].split("**Lost by pruning")[0]
    assert scores.index("**Retrieval, reworded questions**") < scores.index("**Retrieval, trained wording**")
    assert "| more than the teacher |" in scores
    assert not re.search(r"1[0-9][1-9] %", text), "nothing is kept more than wholly"
    assert "Still lost: distilled minus control" in text
    assert "**Wording learnt.** The distilled model gained more in the trained wording than on the same" in text
    assert "Tasks: retrieval (reworded, generated) and reasoning (reworded, worked answers)." in text


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (("teacher", "pruned", "distilled"), "A control (eval.control), the teacher after the same training, shows"),
        (FORMED_ROLES, "training) gained there too: retrieval (reworded, generated)."),
    ],
)
def test_a_reworded_task_above_the_teacher_is_a_caution_that_asks_the_control(
    tmp_path: Path, roles: tuple[str, ...], said: str
) -> None:
    folder = write_formed(tmp_path, roles=roles)
    assert "More than was lost" not in told(folder)
    for role in {"distilled", "control"} & {*roles}:
        made = formed(role)
        own, reworded = (next(task for task in made.tasks if task.task == name) for name in LOOK_UPS)
        above = replace(own, task=reworded.task, column="reworded", reworded_of=reworded.reworded_of)
        tasks = tuple(above if task is reworded else task for task in made.tasks)
        replace(made, tasks=tasks).save(folder / "eval" / f"{role}.json")
    text = told(folder)
    assert "**More than was lost.** The distilled model beats its teacher in wordings that its training text" in text
    assert said in text.replace("\\", "")
