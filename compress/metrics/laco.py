"""How little a model changes when neighbouring layers are merged into one. L layers, X texts, S tokens, D hidden."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_body, decoder_layers
from shoal.progress import each

from ..edits.tensors import laco_factors, merged_layer, refuse_different_kinds, tensors_in_place
from ..surgery.cut_model import skipped
from .metric import Calibration, Metric, Need, Result, Yields, add_up_ranks, rank, world_size
from .weight_metrics import plain_matrices

log = logging.getLogger(__name__)

NUM_TEXTS = 5
TEXT_LENGTH = 32
"""Tokens of a text at most."""
LONGEST_RUN = 4
"""Layers that a merge may take away where num_drop does not say how many."""
WORST = 2.0
"""1 - cosine of opposite states."""


class LacoAcceptance(Metric):
    """1 - mean over texts of the cosine of final hidden states, original against merged (LaCo, arXiv:2402.11187).

    The source accepts a merge where the cosine is above a threshold. The run of n layers from l stands for the merge of
    layers l..l+n into one by equation 1, which takes n layers away; the released code keeps layer l+n as it is, which
    is dropping this run. Final states are those that the head reads, all tokens of a text as one vector; texts are the
    beginnings, of at most 32 tokens, of the first five documents. Runs of at most num_drop layers (4 if unset) are
    tried, so there are fewer rows than in other metrics of runs; each costs one forward of the texts. A run with
    nothing to merge into (it holds the last layer, or layers of another kind are next to it), or whose merge overflows,
    scores 2, the worst a cosine allows.
    """

    needs: ClassVar[Need] = "merges"
    yields: ClassVar[Yields] = "runs"

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        if not any(_is_of_one_kind(model, start, 1) for start in range(len(decoder_layers(model)) - 1)):
            raise UserError(
                f"measure: {name} merges neighbouring layers, and no two of this model are of one kind; take it out of "
                "measure.metrics"
            )
        plain_matrices(model, needs=f"{name} needs plain weights")


def merge_scores(model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> dict[str, Result]:
    """LacoAcceptance; ranks share the runs.

    Raises:
        UserError: quantised or shared layers, a model that is not finite on the texts.
    """
    num_layers = len(decoder_layers(model))
    texts = first_texts(calibration)
    original = _final_states(model, texts)
    if not all(text_SD.isfinite().all() for text_SD in original):
        raise UserError(
            f"measure: the final hidden states are not finite in {model.dtype}; set dtype: bfloat16 or dtype: float32"
        )
    longest = _longest_run(num_layers, calibration.num_drop)
    runs = [(start, length) for length in range(1, longest + 1) for start in range(num_layers - length)]
    possible = [run for run in runs if _is_of_one_kind(model, *run)]
    scores = torch.zeros(longest, num_layers, dtype=torch.float64)
    own_runs = possible[rank() :: world_size()]
    for start, length in each(own_runs, "measure: merges", unit="runs"):
        try:
            tensors = merged_layer(model, start, laco_factors(length + 1))
        except UserError as reason:  # an overflow, or tables of the routing that differ
            log.warning("measure: %s; the run scores %g", reason, WORST)
            scores[length - 1, start] = WORST
            continue
        # the model stays whole: one layer holds the merged weights, those it took in pass their input on
        with tensors_in_place(model, {start: tensors}), skipped(model, range(start + 1, start + length + 1)):
            merged = _final_states(model, texts)
        scores[length - 1, start] = 1 - _mean_cosine(original, merged)
    (scores,) = add_up_ranks([scores], model.device)  # a run that another rank tried is 0 here
    for length in range(1, longest + 1):
        for start in range(num_layers - length + 1):
            if (start, length) not in possible:
                scores[length - 1, start] = WORST
    rows = tuple(tuple(scores[length - 1, : num_layers - length + 1].tolist()) for length in range(1, longest + 1))
    return dict.fromkeys(names, rows)


def _longest_run(num_layers: int, num_drop: int | None) -> int:
    return min(num_drop or LONGEST_RUN, num_layers - 1)


def first_texts(calibration: Calibration) -> list[list[int]]:
    """Token ids of the first documents' beginnings, the same on all ranks."""
    texts: list[list[int]] = []
    rows = calibration.rows.input_ids_NS
    for ids, mask, follows in zip(rows, calibration.mask_NS, calibration.follows_NS, strict=True):
        for token, is_real, goes_on in zip(ids.tolist(), mask.tolist(), follows.tolist(), strict=True):
            if is_real and not goes_on:  # a document begins
                texts.append([])
            if is_real and len(texts[-1]) < TEXT_LENGTH:
                texts[-1].append(token)
        if len(texts) > NUM_TEXTS:
            break
    return texts[:NUM_TEXTS]


@torch.no_grad()
def _final_states(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """(S, D) of every text. What fills up a short one comes behind it, where it cannot see it."""
    longest = max(map(len, texts))
    ids_XS = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=model.device)
    body: Any = decoder_body(model)
    states_XSD = body(input_ids=ids_XS, use_cache=False).last_hidden_state
    return [states_SD[: len(text)].double() for states_SD, text in zip(states_XSD, texts, strict=True)]


def _mean_cosine(original: Sequence[Tensor], merged: Sequence[Tensor]) -> float:
    cosines = [
        torch.cosine_similarity(original_SD.flatten(), merged_SD.flatten(), dim=0)
        for original_SD, merged_SD in zip(original, merged, strict=True)
    ]
    mean = float(torch.stack(cosines).mean())
    return mean if mean == mean else -1.0  # NaN: the merged model overflows


def _is_of_one_kind(model: PreTrainedModel, start: int, length: int) -> bool:
    try:
        refuse_different_kinds(model, range(start, start + length + 1))
    except UserError as reason:
        log.debug("layers %d..%d are not merged: %s", start, start + length, reason)
        return False
    return True
