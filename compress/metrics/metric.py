"""What a metric says of itself, and what every pass over calibration data takes and gives back. N rows, S sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from shoal.artifacts.importance import Removal
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.document_masks import document_starts
from shoal.models.load import refuse_broken_weights
from shoal.runtime import together

Need = Literal["hidden", "gradients", "weights", "loss", "tasks"]
Yields = Literal["layers", "runs", "order"]

Layers = tuple[float, ...]
"""One score per layer."""
Runs = tuple[tuple[float, ...], ...]
"""scores[n - 1][l] of the run of n layers that starts at layer l."""
Order = tuple[Removal, ...]
"""Removals of a greedy metric, the first one first."""


@dataclass(frozen=True)
class Estimates:
    """One value per player with its standard error."""

    values: tuple[float, ...]
    standard_errors: tuple[float, ...]
    """NaN where one draw alone tells nothing of its error; 0 where every possible draw was made."""
    num_subnetworks: int
    """Different sets of players that were asked for, the full one included."""


Result = Layers | Runs | Order | Estimates


class Metric:
    """One way to say what layers are worth; a lower score means: remove first. The docstring gives formula and source.

    Metrics of one need are measured together by one Pass, so that what they share is computed once.
    """

    needs: ClassVar[Need]
    """Work of the pass: "hidden" = one forward without the output head; "gradients" = forwards and backwards; "weights"
    = nothing; "loss" = likelihoods of many variants; "tasks" = no text, but their scores on the tasks of
    measure.sweep."""
    yields: ClassVar[Yields]
    """Shape of the result: "layers" = one score each; "runs" = one for every run of neighbouring layers; "order" = the
    components that go one after the other, where later choices depend on earlier ones."""

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        """Refuse a model of which the metric ``name`` says nothing, before others take their hours."""


@dataclass(frozen=True)
class Document:
    """Neighbouring tokens of one row that may see each other."""

    row: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """The tokens to measure on, and how."""

    rows: PackedRows
    batch_size: int
    """Rows per rank and forward."""
    num_drop: int | None = None
    """Removals that greedy metrics make; None = as many as there can be."""
    seed: int = 0
    """Seed of everything that is drawn at random."""

    @cached_property
    def follows_NS(self) -> Tensor:
        """Mask (N, S) of tokens that come next in the document of the token before them: those with a loss."""
        return ~document_starts(self.rows.position_ids_NS)

    def documents(self, rows: Iterable[int]) -> Iterator[Document]:
        """The documents of ``rows`` in order; what a row's end cuts off is a document of its own."""
        for row in rows:
            ids, starts = self.rows.input_ids_NS[row].tolist(), (~self.follows_NS[row]).nonzero().flatten().tolist()
            for start, end in itertools.pairwise([*starts, len(ids)]):
                yield Document(row, tuple(ids[start:end]))

    def batches(self) -> list[Tensor]:
        """Row indices of this rank's batches: every world_size-th row, so that shares differ by one row at most."""
        own_rows = torch.arange(len(self.rows))[rank() :: world_size()]
        return list(own_rows.split(self.batch_size)) if len(own_rows) else []


Pass = Callable[[PreTrainedModel, Calibration, Sequence[str]], dict[str, Result]]
"""Measures all named metrics of one need at once. All ranks call it and get the same."""


def rank() -> int:
    """This process's rank in the process group; 0 without one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Processes in the process group; 1 without one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def add_up_ranks(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Each tensor summed over all ranks, where it was."""
    if not distributed.is_initialized():
        return list(tensors)
    summed = [tensor.to(device) for tensor in tensors]
    for tensor in summed:
        distributed.all_reduce(tensor)
    return [tensor.to(own.device) for own, tensor in zip(tensors, summed, strict=True)]


def refuse_fault(calibration: Calibration, fault: tuple[int, str] | None, model: PreTrainedModel) -> None:
    """Refuse on all ranks what one of them found; ``fault`` is the row and what is not finite there.

    No rank may raise by itself: the others would wait for it.
    """
    faults = [each for each in together(lambda: fault) if each is not None]
    if faults:
        row, fault_text = min(faults)
        # rows are dealt out in turn (see batches), so row // world_size is its place on its rank
        batch = row // world_size() // calibration.batch_size
        whose = f" of rank {row % world_size()}" if world_size() > 1 else ""
        place = f"batch {batch}{whose} (row {row} of the calibration data)"
        where = f"measure: {fault_text} is not finite (NaN or infinite) in {place}"
        refuse_broken_weights({where: model})
        remedy = "set dtype: bfloat16 in the recipe" if model.dtype == torch.float16 else "give another model"
        raise UserError(f"{where}: the model overflows in {model.dtype}, with finite weights; {remedy}")
