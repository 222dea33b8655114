"""What DeepSpeed's engine is told beside its configuration."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.train.engine import sharding


def test_without_zero_no_buffer_holds_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    gradients = [torch.ones(size) for size in (50, 4, 4, 4, 4)]
    buffers: list[int] = []
    engine: Any = SimpleNamespace()
    engine._get_gradients_for_reduction = lambda: (gradients, {})
    engine._reduce_non_expert_gradients = lambda grads, size: DeepSpeedEngine.allreduce_no_retain(
        engine, grads, None, numel_per_bucket=size
    )
    engine.allreduce_and_copy = lambda bucket, *_args: buffers.append(sum(map(torch.numel, bucket)))
    engine.has_moe_layers = engine.zenflow = False
    engine.optimizer = None
    engine.allreduce_gradients = lambda bucket_size=500_000_000: DeepSpeedEngine.buffered_allreduce_fallback(
        engine, elements_per_buffer=bucket_size
    )
    engine.allreduce_gradients()
    assert buffers == [66]
    buffers.clear()
    monkeypatch.setattr(sharding, "REDUCED_AT_ONCE", 10)
    sharding.reduce_in_parts(engine)
    engine.allreduce_gradients()
    assert buffers == [50, 12, 4]
