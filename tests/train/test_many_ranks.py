"""Sixty-four ranks in one process, on torch's process group that only pretends to have the others."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import CUT, spec_of
from ranks import as_rank, call_on_ranks
from torch._C import _distributed_c10d as _c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from shoal.compress.metrics import metric
from shoal.data.packing import PackedRows
from shoal.recipe.distill import Distill
from shoal.train.engine.sharding import join_deepspeed
from shoal.train.preflight.memory import job
from shoal.train.student.spec import Ranks

RANKS = 64


def _shards_of_rank_0(_rank: int, _ranks: int, stage: int) -> None:
    os.environ.update(as_rank(0, RANKS), LOCAL_SIZE="8", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    _c10d.set_debug_level(_c10d.DebugLevel.OFF)  # torch wraps groups for DETAIL in one that the fake has no part for
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    import deepspeed

    join_deepspeed()
    settings = Distill(deepspeed=f"zero{stage}", precision="float32", sequence_length=16, batch_size=RANKS)
    spec = spec_of(settings, CUT, student_layers=4, ranks=Ranks(RANKS, 8, torch.device("cpu")))
    estimated = job(spec).memory
    model = AutoModelForCausalLM.from_config(spec.student.config, dtype=torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
    }
    config |= {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10**5}}
    optimizer = torch.optim.AdamW(model.parameters())
    engine: Any
    zero: Any
    engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids_BS = torch.zeros(1, 16, dtype=torch.long)
    engine.backward(engine(input_ids=ids_BS, labels=ids_BS).loss)
    engine.step()
    held = sum(value.nbytes for own in optimizer.state.values() for value in own.values() if value.dim())
    held += sum(part.nbytes for part in zero.single_partition_of_fp32_groups) if stage < 3 else 0
    assert held == pytest.approx(estimated.optimizer, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [1, pytest.param(2, marks=pytest.mark.prove), pytest.param(3, marks=pytest.mark.prove)]
)
def test_what_the_optimizer_of_one_of_64_ranks_holds_is_what_the_estimate_says(stage: int) -> None:
    call_on_ranks(_shards_of_rank_0, stage, ranks=1)


@pytest.mark.parametrize("num_rows", [3, 64, 1000])
def test_64_ranks_measure_every_row_once(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    ids_NS = torch.zeros(num_rows, 4, dtype=torch.int32)
    rows = metric.Calibration(PackedRows(ids_NS, ids_NS), 8)
    monkeypatch.setattr(metric, "world_size", lambda: RANKS)
    dealt: list[list[int]] = []
    for rank in range(RANKS):
        monkeypatch.setattr(metric, "rank", lambda rank=rank: rank)
        dealt.append([row for batch in rows.batches() for row in batch.tolist()])
    assert sorted(itertools.chain(*dealt)) == [*range(num_rows)]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
