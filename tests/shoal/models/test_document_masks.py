"""Before every run: documents of a row that see each other are told."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model

from shoal.compress.measure import measure_importance
from shoal.data.packing import PackedRows
from shoal.models.document_masks import IN_TRAINING, WHILE_MEASURED, warn_of_mixed_documents


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(("family", "meet"), [("mamba", True), ("gpt_oss", False)])
def test_documents_that_see_each_other_are_told(family, meet, precision, caplog) -> None:
    ids = torch.randint(5, 90, (1, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.cat([torch.arange(10), torch.arange(30)]).int()[None]
    for positions, told in ((packed, meet), (torch.arange(40).int()[None], False)):
        caplog.clear()
        warn_of_mixed_documents(tiny_model(family), ids, positions, IN_TRAINING, autocast_dtype=precision)
        assert (f"{family}: documents that share a row see each other" in caplog.text) == told


@pytest.mark.parametrize(("family", "told"), [("mamba", True), ("gpt_oss", False)])
def test_metrics_of_a_family_whose_documents_meet_say_so(family, told, caplog) -> None:
    ids = torch.randint(5, 90, (1, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows = PackedRows(ids, torch.cat([torch.arange(10), torch.arange(30)]).int()[None])
    measure_importance(tiny_model(family), rows, metrics=["block_influence"], batch_size=1)
    assert (WHILE_MEASURED in caplog.text) is told


def test_a_teacher_whose_weights_are_offloaded_is_asked_on_the_device() -> None:
    from accelerate import cpu_offload

    model = tiny_model("gpt_oss")
    cpu_offload(model, execution_device=torch.device("cpu"))
    ids = torch.arange(5, 45, dtype=torch.int32)[None]
    warn_of_mixed_documents(model, ids, (torch.arange(40) % 20).int()[None], IN_TRAINING)
