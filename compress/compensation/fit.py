"""Fit what makes up for dropped layers, one gap after the other, on the student's own states.

Teacher and student advance side by side through the layers, batch by batch. The student's state is kept as a teacher
with hooks would have it: multiplied at every gap. As it passes, what was fitted goes into weights of kept layers
(fold.py), and in the end these are compared with the hooks.

Operations: a pass of the teacher and one of the student over the calibration tokens, sums of one F x F and two F x D
products per token and gap with a correction, and for every gap two passes of the layers above it over the held-out
eighth of the rows. Memory beside the model: two states of all calibration tokens; at a gap four, and twice the three
sums.

B batch, S sequence, D hidden, F features, N tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from shoal.artifacts.artifact import ClosedGap
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.inference.decoder import Decoder
from shoal.models.anatomy import decoder_layers
from shoal.progress import each
from shoal.recipe.prune import Compensate

from ..edits.merging import tensors_in_place
from ..surgery.cut_model import kept_layers
from ..variants.layerwise import Layerwise, Prepared
from .fold import Correction, Tensors, is_blind_to_size, scaled_layer
from .sums import Fit, Sums, fit_correction, fit_factor

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 8
"""The last one in so many rows is not fitted to: rows of other documents, but for the one that is cut in two."""
TOKENS_PER_FEATURE = 4
"""Fitted tokens for every feature below which a correction is refused: it would follow the noise."""
FACTORS = (0.5, 4.0)
"""Least and largest factor; what lies outside comes of states that are not alike at all."""
TOLERANCE = 0.02
"""Of the divergence between folded weights and hooks, relative to that between teacher and student."""

NONE = Fit()


@dataclass(frozen=True)
class Compensation:
    """What makes up for the dropped layers of a plan."""

    gaps: tuple[ClosedGap, ...]
    layers: Mapping[int, Tensors]
    """New tensors of kept layers, by the teacher's index and the name within the layer."""


def gaps(drop: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of every run of neighbouring dropped layers, increasing."""
    runs = groupby(enumerate(sorted(drop)), key=lambda pair: pair[1] - pair[0])
    return [(run[0][1], run[-1][1]) for _, group in runs if (run := list(group))]


@torch.no_grad()
def compensate(teacher: PreTrainedModel, drop: Sequence[int], settings: Compensate, rows: PackedRows) -> Compensation:
    """Factors and corrections for every gap that ``drop`` leaves in ``teacher``, which stays as it is.

    ``drop`` is without layer 0: nothing below it could make up for it.

    A gap at which the divergence of the student's next-token distributions from the teacher's does not fall on held-out
    rows stays as it was.

    Raises:
        UserError: a family into whose weights nothing can be folded exactly or whose layers
            cannot be run one by one, too few tokens, states that are not finite.
    """
    kept_layers(len(decoder_layers(teacher)), drop)
    was_training = teacher.training
    teacher.eval()
    try:
        return _Fitting(teacher, drop, settings, rows).run()
    finally:
        teacher.train(was_training)


@dataclass
class _Batch:
    """Some rows on their way through the layers."""

    prepared: Prepared
    held_out: bool
    teacher_BSD: Tensor
    student_BSD: Tensor
    end_BSD: Tensor | None = None
    """The teacher's final state, of held-out rows."""


class _Fitting:
    def __init__(self, teacher: PreTrainedModel, drop: Sequence[int], settings: Compensate, rows: PackedRows) -> None:
        self.model, self.settings = teacher, settings
        self.decoder, self.layerwise = Decoder(teacher), Layerwise(teacher)
        self.num_layers = self.layerwise.num_layers
        self.dropped = set(drop)
        self.gap_above = {first - 1: (first, last) for first, last in gaps(drop)}
        self.with_correction, self.with_factor = settings.method != "scale", settings.method != "linear"
        self.batches = list(self._batches(rows))
        self.held_out = [batch for batch in self.batches if batch.held_out]
        self.folded: dict[int, Tensors] = {}
        self.product = 1.0
        """Product of the factors of all gaps below."""

    def run(self) -> Compensation:
        if not self.held_out or len(self.held_out) == len(self.batches):
            raise UserError(
                "prune.compensate.num_tokens: makes less than two rows, but some are needed to fit to and some to test "
                "on; raise it or lower sequence_length"
            )
        if self.with_correction:
            self._refuse_few_tokens()
        if self.with_factor:
            self._refuse_unscalable()
        for batch in self.held_out:
            batch.end_BSD = self._end(batch, batch.teacher_BSD, 0, frozenset())
        top = max(last for _, last in self.gap_above.values())
        closed: list[ClosedGap] = []
        for layer in each(range(self.num_layers), "prune: compensating", unit="layers"):
            if layer in self.dropped:
                continue  # passed with its gap
            moving = self.batches if layer <= top else self.held_out
            gap = self.gap_above.get(layer)
            if gap is not None:
                closed.append(self._close(layer, *gap))
                continue
            if self.product != 1:
                self._fold_factor(layer)
            for batch in moving:
                shared = batch.student_BSD is batch.teacher_BSD  # below the first gap
                batch.teacher_BSD = self._run(layer, batch, batch.teacher_BSD)
                batch.student_BSD = batch.teacher_BSD if shared else self._run(layer, batch, batch.student_BSD)
        self._refuse_wrong_fold()
        return Compensation(tuple(closed), self.folded)

    def _refuse_few_tokens(self) -> None:
        fitted = sum(batch.teacher_BSD.shape[:2].numel() for batch in self.batches if not batch.held_out)
        size = self.held_out[0].teacher_BSD.shape[-1]
        num_features = max(Correction(self.layerwise, layer).num_features or size for layer in self.gap_above)
        if fitted < (needed := TOKENS_PER_FEATURE * num_features):
            raise UserError(
                f"prune.compensate.num_tokens: leaves {fitted:,} tokens to fit {num_features:,} features of an MLP to, "
                f"which needs at least {needed:,}; raise it, name more text, or set method: scale"
            )

    def _refuse_unscalable(self) -> None:
        """Refuse a family that no factor can be folded into, before anything is fitted."""
        batch = self.held_out[0]
        hidden_BSD, first_gap = batch.teacher_BSD, min(self.dropped)
        for layer in range(self.num_layers):
            if layer > first_gap and layer not in self.dropped:
                scaled_layer(self.layerwise, layer, 1.0, hidden_BSD, batch.prepared.calls[layer])
            hidden_BSD = self._run(layer, batch, hidden_BSD)
        if not is_blind_to_size(self.layerwise, batch.prepared, hidden_BSD):
            raise UserError(
                f"prune.compensate: {self.model.config.model_type} reads its last layer's state otherwise than through "
                "a norm, so that no factor can be folded into weights; set method: linear"
            )

    def _batches(self, rows: PackedRows) -> Iterator[_Batch]:
        num_fitted = len(rows) - max(1, len(rows) // HELD_OUT_SHARE)
        for held_out, own in enumerate(torch.arange(len(rows)).split([num_fitted, len(rows) - num_fitted])):
            for some in own.split(self.settings.batch_size) if len(own) else ():
                ids_BS, positions_BS = (
                    plane_NS[some].long().to(self.model.device)
                    for plane_NS in (rows.input_ids_NS, rows.position_ids_NS)
                )
                inputs = self.decoder.arguments(ids_BS, position_ids_BS=positions_BS)
                prepared = self.layerwise.prepare(inputs, positions_BS)
                yield _Batch(prepared.without_hidden(), bool(held_out), prepared.hidden_BSD, prepared.hidden_BSD)

    def _run(self, layer: int, batch: _Batch, hidden_BSD: Tensor) -> Tensor:
        """(B, S, D) The state after the teacher's own ``layer``."""
        return self.layerwise.run(layer, hidden_BSD, batch.prepared.calls[layer])

    def _end(self, batch: _Batch, hidden_BSD: Tensor, start: int, without: frozenset[int] | set[int]) -> Tensor:
        """(B, S, D) The final state from that before layer ``start``."""
        for layer in range(start, self.num_layers):
            if layer not in without:
                hidden_BSD = self._run(layer, batch, hidden_BSD)
        return self.layerwise.finish(hidden_BSD, batch.prepared)

    def _close(self, below: int, first: int, last: int) -> ClosedGap:
        """Past ``below``, the last kept layer before the gap ``first`` to ``last``, and past the gap."""
        where = layers_text([*range(first, last + 1)])
        correction = Correction(self.layerwise, below) if self.with_correction else None
        before = [batch.student_BSD for batch in self.batches]
        train, test = self._sums(correction, below, last, where)
        fit = self._fit(train, test, is_last=last == self.num_layers - 1)
        error, divergence = test.error(), self._divergence(last + 1)
        states = [batch.student_BSD for batch in self.batches]
        self._apply(fit, correction, below, before)
        closed = self._divergence(last + 1)
        helps = closed < divergence and FACTORS[0] <= fit.factor <= FACTORS[1]
        log.info(
            "prune: gap of %s: factor %.3f%s; error of the state %.4f -> %.4f, divergence from the teacher %.4f -> "
            "%.4f nats a token%s",
            where,
            fit.factor,
            "" if fit.added_FD is None else " and a correction",
            error,
            error if fit is NONE else fit.error,
            divergence,
            closed,
            "" if helps else ": it does not fall, so the gap stays as it was",
        )
        if not helps:
            fit, closed = NONE, divergence
            self.folded.pop(below, None)
            for batch, state_BSD in zip(self.batches, states, strict=True):
                batch.student_BSD = state_BSD
        if self.product != 1:
            self._fold_factor(below, before[-1])
        self.product *= fit.factor
        return ClosedGap(
            first=first,
            last=last,
            factor=fit.factor,
            is_corrected=fit.added_FD is not None,
            error_before=error,
            error_after=fit.error if helps else error,
            divergence_before=divergence,
            divergence_after=closed,
        )

    def _sums(self, correction: Correction | None, below: int, last: int, where: str) -> tuple[Sums, Sums]:
        """What is fitted to and what is tested on, with the student past ``below`` and the teacher past ``last``."""
        train, test = Sums(), Sums()
        for batch in self.batches:
            features_ND: Tensor | None = None
            if correction is None:
                batch.student_BSD = self._run(below, batch, batch.student_BSD)
            else:
                call = batch.prepared.calls[below]
                batch.student_BSD, features_BSF = correction.features(batch.student_BSD, call)
                features_ND = features_BSF.flatten(0, 1)
            for layer in range(below, last + 1):
                batch.teacher_BSD = self._run(layer, batch, batch.teacher_BSD)
            if not bool(batch.student_BSD.isfinite().all() and batch.teacher_BSD.isfinite().all()):
                raise UserError(
                    f"prune.compensate: the states at {where} are not finite in {self.model.dtype}; look for damaged "
                    "weights, or leave prune.compensate out"
                )
            states_ND = batch.student_BSD.flatten(0, 1), features_ND, batch.teacher_BSD.flatten(0, 1)
            (test if batch.held_out else train).add(*states_ND)
        return train, test

    def _apply(self, fit: Fit, correction: Correction | None, below: int, before: Sequence[Tensor]) -> None:
        """Close the gap above ``below`` by ``fit`` in all batches, from the student's states before that layer."""
        if correction is not None and fit.added_FD is not None:
            # of several batches the last is held out; features are made again, since all of them would be too much
            call = self.batches[-1].prepared.calls[below]
            self.folded[below] = correction.folded(fit.added_FD / fit.factor, before[-1], call)
            with tensors_in_place(self.model, {below: self.folded[below]}):
                for batch, before_BSD in zip(self.batches, before, strict=True):
                    batch.student_BSD = self._run(below, batch, before_BSD)
        if fit.factor != 1:
            for batch in self.batches:
                batch.student_BSD = batch.student_BSD * fit.factor

    def _fit(self, train: Sums, test: Sums, *, is_last: bool) -> Fit:
        with_factor = self.with_factor and not is_last  # behind the last gap there is a norm alone
        if not self.with_correction:
            return fit_factor(train, test) if with_factor else NONE
        return fit_correction(train, test, with_factor=with_factor)

    def _fold_factor(self, layer: int, state_BSD: Tensor | None = None) -> None:
        """Let ``layer``, with what is folded into it already, write to a state without the factors of gaps below."""
        batch = self.batches[-1]
        before_BSD = batch.student_BSD if state_BSD is None else state_BSD
        with tensors_in_place(self.model, {layer: self.folded.get(layer, {})}):
            scaled = scaled_layer(self.layerwise, layer, 1 / self.product, before_BSD, batch.prepared.calls[layer])
        self.folded[layer] = {**self.folded.get(layer, {}), **scaled}

    def _divergence(self, start: int) -> float:
        """KL(teacher || student) in nats per held-out token, with gaps above ``start`` open."""
        return self._divergence_of(self._end(batch, batch.student_BSD, start, self.dropped) for batch in self.held_out)

    def _divergence_of(self, ends: Iterator[Tensor]) -> float:
        total, num_tokens, size = 0.0, 0, self.decoder.positions_at_once()
        for batch, end_BSD in zip(self.held_out, ends, strict=True):
            assert batch.end_BSD is not None
            ours_ND, theirs_ND = end_BSD.flatten(0, 1), batch.end_BSD.flatten(0, 1)
            for ours, theirs in zip(ours_ND.split(size), theirs_ND.split(size), strict=True):
                log_q, log_p = (self.decoder.logits(some).log_softmax(-1) for some in (ours, theirs))
                total += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
            num_tokens += len(ours_ND)
        return total / num_tokens

    def _refuse_wrong_fold(self) -> None:
        """Compare the folded weights, skips in force, with the hooks; every layer was proven, and this is all of them.

        Raises:
            UserError: the divergence from the teacher is another one.
        """
        hooked = self._divergence(self.num_layers)
        with tensors_in_place(self.model, self.folded):
            folded = self._divergence_of(
                self._end(batch, self._first_state(batch), 0, self.dropped) for batch in self.held_out
            )
        if not math.isclose(hooked, folded, rel_tol=TOLERANCE, abs_tol=1e-4):
            raise UserError(
                f"prune.compensate: {self.model.config.model_type}: with the folded weights the divergence from the "
                f"teacher is {folded:.5f} nats a token, and with factors in force {hooked:.5f}; shoal cannot fold into "
                "this family: leave prune.compensate out"
            )

    def _first_state(self, batch: _Batch) -> Tensor:
        return self.layerwise.prepare(batch.prepared.inputs).hidden_BSD
