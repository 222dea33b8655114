"""Task identifiers read as words, and the words of different tasks stay different."""

from __future__ import annotations

import pytest
from cases import cases

from shoal.eval.tasks.names import described_tasks, task_folders
from shoal.task_words import task_words

CASES = cases(__file__)


@pytest.mark.parametrize(("task", "words"), CASES)
def test_names_read_as_words(task: str, words: str) -> None:
    assert ", ".join(task_words(task)) == words


def test_the_protocol_and_an_unusual_metric_are_said_where_the_name_does_not() -> None:
    assert task_words("arc_easy", protocol="loglikelihood", metric="acc_norm") == (
        "ARC easy",
        "lettered options",
        "acc norm",
    )
    assert task_words("perplexity", ability="language", protocol="rolling", metric="nats_per_token") == (
        "perplexity",
        "running text",
    )
    assert task_words("worked", protocol="worked") == ("worked", "worked answers")
    assert task_words("track_1", ability="track") == ("track", "1")


def test_no_two_described_tasks_have_the_same_words() -> None:
    tasks, _ = described_tasks(task_folders(None))
    words = {task_words(task, ability=data.ability, protocol=how) for task, (data, how) in tasks.items()}
    assert len(words) == len(tasks) > 100
