"""What the host knows of a micro-batch is what the device would say."""

import pytest
import torch
from tiny import tiny_model
from transformers import masking_utils

from shoal.data.packing import IGNORED, ROW, SOURCES
from shoal.models import document_masks
from shoal.models.document_masks import documents_known
from shoal.runtime import queued
from shoal.train.objective.host_batch import ON_HOST, learnt_places, on_host, with_host_copy
from shoal.train.objective.objective import final_hidden

CPU = torch.device("cpu")
LAYOUTS = {
    "one document each": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
    "documents in one row": [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0]],
    "a row that begins within a document": [[7, 8, 9, 0, 1, 2], [3, 4, 5, 6, 7, 8]],
    "documents of one token": [[0, 0, 0, 1, 0, 0], [0, 1, 2, 3, 4, 0]],
}


@pytest.mark.parametrize("positions", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_documents_are_those_that_transformers_finds_on_the_device(positions: list[list[int]]) -> None:
    positions_BS = torch.tensor(positions)
    asks = masking_utils.find_packed_sequence_indices
    theirs = asks(positions_BS)
    with documents_known(positions_BS, CPU):
        ours = masking_utils.find_packed_sequence_indices(positions_BS)
    assert masking_utils.find_packed_sequence_indices is asks
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        together = [documents[:, :, None] == documents[:, None] for documents in (ours, theirs)]
        assert torch.equal(*together)


def test_what_is_known_of_a_part_of_a_batch_leaves_the_whole_known() -> None:
    whole, part = (torch.tensor(LAYOUTS["documents in one row"][rows:]) for rows in (0, 1))
    own = document_masks.document_borders
    with documents_known(whole, CPU):
        known = document_masks.document_borders
        with documents_known(part, CPU):
            assert document_masks.document_borders is not known
        assert document_masks.document_borders is known
    assert document_masks.document_borders is own


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_models_compute_the_same_bits_where_documents_are_known(kind: str) -> None:
    model, ids_BS = tiny_model(kind), torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    positions_BS = torch.cat([torch.arange(7), torch.arange(5)]).repeat(2, 1)
    with torch.no_grad():
        expected = final_hidden(model, ids_BS, positions_BS)
        with documents_known(positions_BS, CPU):
            assert torch.equal(final_hidden(model, ids_BS, positions_BS), expected)
        with documents_known(torch.arange(12).repeat(2, 1), CPU):
            assert not torch.equal(final_hidden(model, ids_BS, positions_BS), expected), "it is what is looked at"


def test_a_place_is_learnt_whose_next_token_is_and_the_copy_says_so_too() -> None:
    labels_BS = torch.tensor([[3, 4, IGNORED, 5], [IGNORED, IGNORED, 6, IGNORED]])
    assert learnt_places(labels_BS).tolist() == [0, 2, 5]
    batch = {"labels": labels_BS, "position_ids": labels_BS, "input_ids": labels_BS, ROW: torch.tensor([8, 9])}
    copied = with_host_copy(batch)
    assert copied[ON_HOST] is on_host(copied)
    for host in (copied[ON_HOST], on_host(batch)):
        assert torch.equal(host.labels_BS, labels_BS)
        assert list(host.rows) == [8, 9]


def test_labels_from_some_sources_are_those_of_their_tokens() -> None:
    labels_BS, sources_BS = torch.tensor([[3, 4, IGNORED, 5]]), torch.tensor([[0, 1, 1, 2]], dtype=torch.int16)
    host = on_host({"labels": labels_BS, "position_ids": labels_BS, "input_ids": labels_BS, SOURCES: sources_BS})
    assert host.labels_from(None) is host.labels_BS
    assert host.labels_from({0, 2}).tolist() == [[3, IGNORED, IGNORED, 5]]
    assert host.labels_from({1}).tolist() == [[IGNORED, 4, IGNORED, IGNORED]]
    assert host.labels_from(()).tolist() == [[IGNORED] * 4]


def test_what_goes_to_a_gpu_is_pinned_first_so_that_its_copy_needs_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    values, calls = torch.arange(3), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, non_blocking: calls.append((device.type, non_blocking))
    )
    queued(values, torch.device("cuda"))
    queued(values, CPU)
    assert calls == ["pinned", ("cuda", True), ("cpu", True)]
