"""Which of the student's tokens teach nothing, as the teacher says."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.data.packing import IGNORED
from shoal.data.repetition import Loop
from shoal.train.generated.loops import Sample, confirmed, samples_in, without_repeats
from shoal.train.generated.on_policy import lay_out
from shoal.train.objective.host_batch import ON_HOST, on_host

CLEAN = ([1, 2], [3, 4, 5, 257])
ONES = ([6, 7], [9, *[1] * 6])
PAIRS = ([8], [*[2, 3] * 3, 2])
THREES = ([5, 5], [7, 7, *[4, 5, 6] * 3])


def rows(*texts, length: int = 40):
    planes = lay_out(texts, sequence_length=length, pad_id=258)
    return {**planes, ON_HOST: on_host(planes)}


def told(log_probs: float, asked: list):
    def answer(batch, places_N):
        asked.append((batch, places_N))
        return torch.full((len(places_N),), log_probs)

    return answer


def test_texts_are_told_apart_and_their_loops_found():
    batch = rows([CLEAN, ONES], [PAIRS])
    assert samples_in(on_host(batch)) == [
        Sample(0, 2, CLEAN[1], None),
        Sample(0, 8, ONES[1], Loop(1, 1)),
        Sample(1, 1, PAIRS[1], Loop(0, 2)),
    ]
    (cut,) = samples_in(on_host(rows([THREES], length=9)))
    assert cut.tokens == THREES[1][:7], "what does not fit into the row does not count"
    assert cut.loop is None


def test_labels_behind_the_second_copy_are_not_learnt_and_all_others_are():
    batch = rows([CLEAN, ONES], [PAIRS])
    kept = without_repeats(batch, samples_in(on_host(batch)))
    expected = batch["labels"].clone()
    expected[0, 11:15] = IGNORED  # of 9, 1, 1, 1, 1, 1, 1 from place 8
    expected[1, 5:8] = IGNORED  # of 2, 3, 2, 3, 2, 3, 2 from place 1
    assert (batch["labels"] != expected).sum() == 4 + 3
    assert torch.equal(kept["labels"], expected)
    assert torch.equal(on_host(kept).labels_BS, expected)
    assert torch.equal(kept["input_ids"], batch["input_ids"]), "the student still reads them"
    assert not torch.equal(batch["labels"], expected), "the batch itself is left as it is"


@pytest.mark.parametrize(("log_probs", "stays"), [(math.log(0.51), True), (math.log(0.49), False)])
def test_a_loop_counts_where_the_teacher_goes_along_above_one_half(log_probs, stays):
    batch = rows([CLEAN], [PAIRS], [ONES])
    samples = samples_in(on_host(batch))
    found = confirmed(batch, samples, told(log_probs, []))
    assert [sample.loop is not None for sample in found] == [False, stays, stays]
    assert [sample.tokens for sample in found] == [sample.tokens for sample in samples]


def test_the_teacher_is_asked_for_the_tokens_behind_the_second_copy_in_rows_that_loop():
    batch, asked = rows([CLEAN], [PAIRS, CLEAN], [CLEAN, ONES]), []
    confirmed(batch, samples_in(on_host(batch)), told(0.0, asked))
    ((part, places),) = asked
    assert torch.equal(part["input_ids"], batch["input_ids"][1:])
    assert torch.equal(part["position_ids"], batch["position_ids"][1:])
    assert torch.equal(on_host(part).position_ids_BS, batch["position_ids"][1:])
    assert part["input_ids"].flatten()[places].tolist() == [2, 3, 2, 1, 1, 1, 1]


def test_every_loop_is_judged_by_the_mean_over_its_own_tokens():
    batch = rows([PAIRS], [ONES])
    answers = torch.tensor([-0.1, -0.2, -0.3, 0.0, 0.0, 0.0, -2.8])  # means -0.2 and -0.7; log 0.5 is -0.69
    pairs, ones = confirmed(batch, samples_in(on_host(batch)), lambda _batch, _places: answers)
    assert pairs.loop is not None
    assert ones.loop is None


def test_a_rank_without_a_loop_runs_the_teacher_on_one_row():
    """Where the teacher is in pieces, another rank that has one would wait for it."""
    batch, asked = rows([CLEAN], [CLEAN]), []
    samples = samples_in(on_host(batch))
    assert confirmed(batch, samples, told(0.0, asked)) == samples
    ((part, places),) = asked
    assert (len(part["input_ids"]), len(places)) == (1, 0)
