"""The order in which a step's rows are dealt to ranks and micro-batches."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from shoal.train.dataset import StepSampler


@pytest.mark.parametrize(("rows", "ranks", "micro_batches"), [(4, 2, 1), (4, 8, 1), (2, 4, 4), (1, 64, 2), (2, 1, 1)])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_ranks_run_the_teacher_in_the_same_micro_batches(
    rows: int, ranks: int, micro_batches: int, share: float
) -> None:
    per_step, steps = rows * ranks * micro_batches, 3
    asks_N = np.diff(np.floor(share * np.arange(1 + steps * per_step))) > 0  # evenly spread, as packing has them
    sampler = StepSampler(asks_N, rows=rows, ranks=ranks, micro_batches=micro_batches)
    assert len(sampler) == steps * per_step
    # as accelerate deals what the Trainer hands it
    shards = [
        BatchSamplerShard(BatchSampler(sampler, rows, drop_last=False), num_processes=ranks, process_index=rank)
        for rank in range(ranks)
    ]
    rows_RMB = np.array([[*shard] for shard in shards])  # by rank and micro-batch
    asked_RM = asks_N[rows_RMB].sum(-1)
    assert asked_RM.shape == (ranks, steps * micro_batches)
    assert (np.ptp(asked_RM, 0) <= 1).all()
    for step in range(steps):
        own = asked_RM[:, step * micro_batches : (step + 1) * micro_batches]
        assert ((own > 0) & (own < rows)).any(0).sum() <= 1, "at most one micro-batch has both"
        dealt = rows_RMB[:, step * micro_batches : (step + 1) * micro_batches].ravel().tolist()
        assert sorted(dealt) == [*range(step * per_step, (step + 1) * per_step)], "a step holds the same rows"


@pytest.mark.parametrize("asks", [False, True])
def test_rows_of_one_kind_stay_as_they_are_packed(asks: bool) -> None:
    assert [*StepSampler(np.full(24, asks), rows=3, ranks=2, micro_batches=2)] == [*range(24)]


def test_a_last_step_that_is_not_whole_is_dealt_too() -> None:
    asks_N = np.arange(10) % 2 == 0
    assert [*StepSampler(asks_N, rows=2, ranks=1, micro_batches=4)] == [1, 3, 5, 7, 0, 2, 4, 6, 9, 8]
