"""What DeepSpeed's engine is told beside its configuration."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from tiny import tiny_model

from shoal.train.engine import sharding
from shoal.train.engine.sharding import gathered
from shoal.train.objective.objective import output_head, to_logits


def test_without_zero_no_buffer_holds_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    gradients = [torch.ones(size) for size in (50, 4, 4, 4, 4)]
    buffers: list[int] = []
    engine: Any = SimpleNamespace(dp_world_size=2, zero_optimization=lambda: False)
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


@pytest.mark.parametrize(("ranks", "zero", "reduces"), [(1, False, False), (1, True, True), (2, False, True)])
def test_one_rank_without_zero_copies_no_gradients(ranks: int, zero: bool, reduces: bool) -> None:
    engine: Any = SimpleNamespace(dp_world_size=ranks, zero_optimization=lambda: zero)
    engine.allreduce_gradients = lambda **_: None
    sharding.reduce_in_parts(engine)
    assert engine.enable_backward_allreduce is reduces


def test_an_offloaded_head_comes_over_once_for_all_chunks_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_model("llama").requires_grad_(False)
    hidden_ND = torch.randn(6, teacher.config.hidden_size)
    with torch.no_grad():
        expected_NV = teacher.lm_head(hidden_ND)
    cpu_offload(teacher, execution_device=torch.device("cpu"))
    head, moved = output_head(teacher), []
    bring = AlignDevicesHook.pre_forward
    monkeypatch.setattr(
        AlignDevicesHook, "pre_forward", lambda hook, *given: (moved.append(given[0] is head), bring(hook, *given))[1]
    )
    logits_of = to_logits(teacher)
    with gathered(head):
        rows = [logits_of(hidden_D) for hidden_D in hidden_ND]
    torch.testing.assert_close(torch.stack(rows), expected_NV)
    assert moved == [True]
    assert head.weight.is_meta
    assert torch.equal(logits_of(hidden_ND), expected_NV), "it comes over by itself where nobody holds it"
