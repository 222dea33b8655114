"""What every layer is worth: one streaming pass over calibration rows. N rows, B batch, S sequence."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from shoal.data import PackedRows
from shoal.errors import UserError
from shoal.models import decoder_layers

from .metrics import METRICS, BatchView, HiddenMetric, Runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """The measured part of shoal.artifact.Importance; a lower score means: remove first."""

    num_layers: int
    num_tokens: int
    """Real (unpadded) tokens over all ranks."""
    layers: dict[str, tuple[float, ...]] = field(default_factory=dict)
    runs: dict[str, Runs] = field(default_factory=dict)


def measure_importance(
    model: PreTrainedModel,
    rows: PackedRows,
    *,
    metrics: Sequence[str],
    batch_size: int,
    attention_mask_NS: Tensor | None = None,
) -> Scores:
    """Scores of every layer by ``metrics`` (names in METRICS), from one pass that stops before the output head.

    Hidden states come from hooks on the decoder layers, so they are raw: the last state that transformers returns is
    behind the final norm. Where torch.distributed is initialised, each rank takes its share of the rows (none is fine)
    and all ranks return the same scores. Padding (0 in ``attention_mask_NS``) counts nowhere and no real token sees it.

    Raises:
        UserError: an unknown metric, no rows, or states that are not finite.
    """
    layers = decoder_layers(model)
    running = [metric(len(layers)) for metric in _find_metrics(metrics)]
    if len(rows) == 0 or (attention_mask_NS is not None and not attention_mask_NS.any()):
        raise UserError("measure: there is no token to measure on; name a data source that holds text")
    num_tokens = 0
    for batch in tqdm(
        _batches(len(rows), batch_size), desc="measure", unit="batch", disable=None if _rank() == 0 else True
    ):
        mask_BS = None if attention_mask_NS is None else attention_mask_NS[batch].bool()
        num_tokens += _observe_batch(
            model, layers, running, rows.input_ids_NS[batch], rows.position_ids_NS[batch], mask_BS
        )
    num_tokens = _add_up_ranks(running, num_tokens, model.device)
    scores = Scores(len(layers), num_tokens)
    for name, metric in zip(metrics, running, strict=True):
        if not metric.sums.isfinite().all():
            raise UserError(
                f"measure: {name} is not finite: the model's hidden states overflow in {model.dtype}; "
                "set dtype: bfloat16 or dtype: float32 in the recipe"
            )
        if metric.yields == "layers":
            scores.layers[name] = metric.layer_scores()
        else:
            scores.runs[name] = metric.run_scores()
    return scores


def _find_metrics(names: Sequence[str]) -> list[type[HiddenMetric]]:
    if not names:
        raise UserError(f"measure.metrics: is empty; name at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(METRICS)}"
            raise UserError(f"measure.metrics: {name!r} is no metric; {hint}")
    return [METRICS[name] for name in names]


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _batches(num_rows: int, batch_size: int) -> list[Tensor]:
    """Row indices of this rank's batches: every world_size-th row, so that shares differ by one row at most."""
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    return list(torch.arange(_rank(), num_rows, world_size).split(batch_size)) if _rank() < num_rows else []


@torch.inference_mode()
def _observe_batch(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    metrics: Sequence[HiddenMetric],
    input_ids_BS: Tensor,
    position_ids_BS: Tensor,
    mask_BS: Tensor | None,
) -> int:
    """Add one batch to the metrics; returns its number of real tokens."""
    if mask_BS is None:
        mask_BS = torch.ones_like(input_ids_BS, dtype=torch.bool)
    else:
        position_ids_BS = _padding_apart(position_ids_BS, mask_BS)
    last = _last_tokens(position_ids_BS, mask_BS)
    view = BatchView(mask_BS.flatten(), last.flatten().nonzero().flatten().to(model.device))
    with _observed(layers, metrics, view):
        model.get_decoder()(
            input_ids=input_ids_BS.to(model.device), position_ids=position_ids_BS.to(model.device), use_cache=False
        )
    for metric in metrics:
        metric.end_batch(view)
    return int(view.real_T.sum())


def _padding_apart(position_ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Position ids in which every stretch of padding is a document of its own.

    An attention mask would not do: given one, transformers no longer looks for the borders between packed documents.
    """
    index_S = torch.arange(mask_BS.shape[1])
    last_real_BS = torch.where(mask_BS, index_S, -1).cummax(dim=1).values
    return torch.where(mask_BS, position_ids_BS, index_S - last_real_BS - 1)


def _last_tokens(position_ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Which tokens end a document: the next position does not follow, or the row ends."""
    ends_BS = torch.ones_like(mask_BS)
    ends_BS[:, :-1] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    return ends_BS & mask_BS


@contextmanager
def _observed(layers: nn.ModuleList, metrics: Sequence[HiddenMetric], view: BatchView) -> Iterator[None]:
    def hook(layer: int) -> Any:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            for metric in metrics:
                metric.observe(layer, before.flatten(0, 1), after.flatten(0, 1), view)

        return observe

    handles = [layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_up_ranks(metrics: Sequence[HiddenMetric], num_tokens: int, device: torch.device) -> int:
    """Replace every metric's sums by those of all ranks; returns the tokens of all ranks."""
    if not distributed.is_initialized():
        return num_tokens
    counts = torch.tensor([num_tokens, *(metric.count for metric in metrics)])
    summed = [tensor.to(device) for tensor in (counts, *(metric.sums for metric in metrics))]
    for tensor in summed:
        distributed.all_reduce(tensor)
    num_tokens, *metric_counts = summed[0].tolist()
    for metric, count, sums in zip(metrics, metric_counts, summed[1:], strict=True):
        metric.count, metric.sums = count, sums.cpu()
    return num_tokens
