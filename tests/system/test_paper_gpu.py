"""What computes on a GPU mixes no devices there and gives what a CPU gives: shown on a GPU of paper."""

from __future__ import annotations

import pytest
import torch
from paper_gpu import GPU, MixedDevices, PaperGpu, paper_gpu
from tiny import tiny_model

from shoal.compress.measure import measure_importance
from shoal.compress.metrics.registry import METRICS
from shoal.data.packing import PackedRows

__all__ = ["paper_gpu"]


def rows() -> PackedRows:
    """Eight rows of two documents each."""
    ids_NS = torch.randint(0, 250, (8, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    positions_NS = torch.arange(64, dtype=torch.int32).repeat(8, 1)
    positions_NS[:, 40:] -= 40
    return PackedRows(ids_NS, positions_NS)


def test_what_a_gpu_refuses_is_refused_and_what_is_waited_for_is_counted(paper_gpu: PaperGpu) -> None:
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    assert (there.device, (there + 1).device, here.device) == (GPU, GPU, torch.device("cpu"))
    with pytest.raises(MixedDevices, match="aten::mul"):
        _ = there * here
    with pytest.raises(TypeError, match="copy it to host memory"):
        there.numpy()
    assert not paper_gpu.waits
    assert (there * 2.0 + here.to("cuda", non_blocking=True)).sum().item() == 12
    assert there.cpu().numpy().sum() == 4
    assert sorted(what for what, _ in paper_gpu.waits) == ["aten::_local_scalar_dense", "copy to host memory"]


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.usefixtures("paper_gpu")
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_that_of_a_cpu(name: str) -> None:
    measured = []
    for place in ("cuda", "cpu"):
        model = tiny_model("qwen3", dtype=torch.bfloat16)
        model.to(torch.device(place))  # pyright: ignore[reportArgumentType]
        measured.append(measure_importance(model, rows(), metrics=[name], batch_size=4, num_drop=2))
    assert measured[0] == measured[1]
