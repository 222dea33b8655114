"""Rows of random tokens with several documents each, for metrics of plain text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.data.packing import IGNORED, PackedRows


def packed(lengths: Sequence[Sequence[int]], *, seed: int = 0, below: int = 256) -> PackedRows:
    """Rows of random tokens; every row is given as the lengths of its documents."""
    positions = torch.tensor([[position for length in row for position in range(length)] for row in lengths])
    ids = torch.randint(0, below, positions.shape, generator=torch.Generator().manual_seed(seed))
    return PackedRows(ids, positions)


def labels_of(rows: PackedRows) -> Tensor:
    """(N, S) What is to be learnt of every row."""
    return torch.stack([rows[row]["labels"] for row in range(len(rows))])


ROWS = packed([[20], [7, 13], [1, 9, 10], [20], [19, 1]])


def documents(rows: PackedRows) -> list[Tensor]:
    found: list[list[int]] = []
    for ids, positions in zip(rows.input_ids_NS.tolist(), rows.position_ids_NS.tolist(), strict=True):
        for token, position in zip(ids, positions, strict=True):
            if position == 0:
                found.append([])
            found[-1].append(token)
    return [torch.tensor([document]) for document in found]


def batch() -> dict[str, Tensor]:
    """Two rows of two documents each, of which every token but a document's first is learnt."""
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(7), torch.arange(5)]).repeat(2, 1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORED)}


def raw_states(model: PreTrainedModel, document: Tensor) -> Tensor:
    """(L+1, S, D) float64: what transformers reports before every layer, and last the input of the final norm."""
    caught: list[Tensor] = []
    norm = model.get_submodule("model.norm")
    handle = norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        states = model(document, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return torch.stack([*(state[0] for state in states[:-1]), caught[0][0]]).double()
