"""Fit what makes up for dropped layers, one gap after the other, on the student's own states.

Teacher and student advance side by side through the layers, one layer for all batches. The student's state is kept as a
teacher with hooks would have it: multiplied at every gap. As it passes, what was fitted goes into weights of kept
layers (fold.py), and in the end these are compared with the hooks.

Operations: a pass of the teacher and one of the student over the calibration tokens, sums of one F x F and two F x D
products per token and gap with a correction, and over the held-out eighth of the rows two passes of the teacher and
student, and for every gap two of the layers above it.

B batch, S sequence, D hidden, F features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.artifacts.plan import ClosedGap
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.progress import each
from shoal.recipe.prune import Compensate

from ..edits.tensors import tensors_in_place
from ..surgery.cut_model import kept_layers
from ..surgery.quantised import without_quantization
from ..variants.layerwise import Prepared
from .calibration import Source, batches
from .fold import Correction, NotFoldable, Tensors, is_blind_to_size, num_features, scaled_layer
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
LEAVE_OUT = "leave prune.compensate out"

NONE = Fit()

_Attempt = Callable[[int, Tensor], object]
"""Tries something on a layer and a state before it; raises NotFoldable."""


@dataclass(frozen=True)
class Fitted:
    """What makes up for the dropped layers of a plan."""

    gaps: tuple[ClosedGap, ...]
    layers: Mapping[int, Tensors]
    """New tensors of kept layers in float32, by the teacher's index and the name within the layer."""


def refuse_quantised(folder: Path, config: PreTrainedConfig) -> None:
    """Raises UserError: quantised weights."""
    if without_quantization(config)[1]:
        raise UserError(
            f"{folder}: is quantised, and prune.compensate changes weights of layers that stay; give the "
            "full-precision model, or leave prune.compensate out"
        )


def needed_features(model: PreTrainedModel, drop: Sequence[int], settings: Compensate) -> int:
    """The most features of an MLP that a correction is fitted to; 0 where there is none."""
    below = [first - 1 for first, _ in gaps(drop) if settings.method != "scale"]
    return max((num_features(model, layer) for layer in below), default=0)


def gaps(drop: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of every run of neighbouring dropped layers, increasing."""
    runs = groupby(enumerate(sorted(drop)), key=lambda pair: pair[1] - pair[0])
    return [(run[0][1], run[-1][1]) for _, group in runs if (run := list(group))]


@torch.no_grad()
def compensate(source: Source, drop: Sequence[int], settings: Compensate, rows: PackedRows) -> Fitted:
    """Factors and corrections for every gap that ``drop`` leaves in the model of ``source``, which stays as it is.

    ``drop`` is without layer 0: nothing below it could make up for it.

    A gap at which the divergence of the student's next-token distributions from the teacher's does not fall on held-out
    rows stays as it was.

    Raises:
        UserError: a family into whose weights nothing can be folded exactly, too few tokens, states that are not
            finite.
    """
    kept_layers(source.layerwise.num_layers, drop)
    was_training = source.model.training
    source.model.eval()
    try:
        return _Fitting(source, drop, settings, rows).run()
    except NotFoldable as error:
        raise UserError(f"{error}; {LEAVE_OUT}") from error
    finally:
        source.model.train(was_training)


@dataclass
class _Batch:
    """Some rows on their way through the layers; states are (B, S, D)."""

    prepared: Prepared
    held_out: bool
    teacher: Tensor
    student: Tensor
    end: Tensor | None = None
    """The teacher's final state, of held-out rows."""


class _Fitting:
    def __init__(self, source: Source, drop: Sequence[int], settings: Compensate, rows: PackedRows) -> None:
        self.model, self.layerwise, self.decoder = source.model, source.layerwise, source.decoder
        self.settings, self.num_layers = settings, self.layerwise.num_layers
        self.dropped = set(drop)
        self.gap_above = {first - 1: (first, last) for first, last in gaps(drop)}
        self.with_correction, self.with_factor = settings.method != "scale", settings.method != "linear"
        self.batches = list(self._batches(source, rows))
        self.held_out = [batch for batch in self.batches if batch.held_out]
        self.folded: dict[int, Tensors] = {}
        self.product = 1.0
        """Product of the factors of all gaps below."""

    def run(self) -> Fitted:
        if not self.held_out or len(self.held_out) == len(self.batches):
            raise UserError(
                "prune.compensate.num_tokens: makes less than two rows, but some are needed to fit to and some to test "
                "on; raise it or lower sequence_length"
            )
        if self.with_correction:
            self._refuse_few_tokens()
        self._see_teacher()
        top = max(last for _, last in self.gap_above.values())
        closed: list[ClosedGap] = []
        for layer in each(range(self.num_layers), "prune: compensating", unit="layers"):
            if layer in self.dropped:
                continue  # passed with its gap
            gap = self.gap_above.get(layer)
            if gap is not None:
                closed.append(self._close(layer, *gap))
                continue
            if self.product != 1:
                self._fold_factor(layer, self.batches[-1].student)
            for batch in self.batches if layer < top else self.held_out:
                shared = batch.student is batch.teacher  # below the first gap
                batch.student = self._run(layer, batch, batch.student)
                if layer < top:
                    batch.teacher = batch.student if shared else self._run(layer, batch, batch.teacher)
        self._refuse_wrong_fold()
        return Fitted(tuple(closed), self.folded)

    def _refuse_few_tokens(self) -> None:
        fitted = sum(batch.teacher.shape[:2].numel() for batch in self.batches if not batch.held_out)
        most = max(num_features(self.model, layer) for layer in self.gap_above)
        if fitted < (needed := TOKENS_PER_FEATURE * most):
            raise UserError(
                f"prune.compensate.num_tokens: leaves {fitted:,} tokens to fit {most:,} features of an MLP to, "
                f"which needs at least {needed:,}; raise it, name more text, or set method: scale"
            )

    def _see_teacher(self) -> None:
        """Run the teacher over held-out rows; refuse on the way what cannot be folded, before anything is fitted."""
        states = [batch.teacher for batch in self.held_out]
        for layer in range(self.num_layers):
            before, states = states[0], self._past(layer, states)
            self._refuse_not_finite(f"layer {layer}", *states)
            self._refuse_unfoldable(
                layer,
                before,
                corrected=layer in self.gap_above,
                scaled=layer > min(self.dropped) and layer not in self.dropped,
                is_last=layer == self.num_layers - 1,
            )
        for batch, state in zip(self.held_out, states, strict=True):
            batch.end = self._finish(batch, state)

    def _refuse_unfoldable(self, layer: int, before: Tensor, *, corrected: bool, scaled: bool, is_last: bool) -> None:
        """Refuse a layer, whose weights are there, into which what the method says cannot be folded.

        ``before`` is a state before it; ``is_last``: what follows the layers is tried, too.
        """
        if self.with_correction and corrected:
            self._refuse_unless(self._try_correction, layer, before, other="scale", instead=self._try_factor)
        if self.with_factor and scaled:
            self._refuse_unless(self._try_factor, layer, before, other="linear", instead=self._try_correction)
        if self.with_factor and is_last:
            self._refuse_unless(self._try_end, layer, before, other="linear", instead=self._try_correction)

    def _refuse_unless(self, attempt: _Attempt, layer: int, before: Tensor, *, other: str, instead: _Attempt) -> None:
        """Refuse what the ``attempt`` refuses, and propose the method ``other`` where ``instead`` goes."""
        try:
            attempt(layer, before)
        except NotFoldable as error:
            raise UserError(f"{error}; {self._remedy(other, instead, layer, before)}") from error

    def _remedy(self, method: str, attempt: _Attempt, layer: int, before: Tensor) -> str:
        try:
            attempt(layer, before)
        except UserError:
            return LEAVE_OUT
        return f"set method: {method}, or {LEAVE_OUT}"

    def _try_correction(self, layer: int, before: Tensor) -> None:
        call = self.held_out[0].prepared.calls[layer]
        Correction(self.layerwise, layer).form(before, call)

    def _try_factor(self, layer: int, before: Tensor) -> None:
        scaled_layer(self.layerwise, layer, 1.0, before, self.held_out[0].prepared.calls[layer])

    def _try_end(self, layer: int, before: Tensor) -> None:
        prepared = self.held_out[0].prepared
        after_BSD = self.layerwise.run(layer, before, prepared.calls[layer])
        if not is_blind_to_size(self.layerwise, prepared, after_BSD):
            raise NotFoldable(
                f"prune.compensate: {self.model.config.model_type} reads its last layer's state otherwise than through "
                "a norm, so that no factor can be folded into its weights"
            )

    def _batches(self, source: Source, rows: PackedRows) -> Iterator[_Batch]:
        num_fitted = len(rows) - max(1, len(rows) // HELD_OUT_SHARE)
        for held_out, own in ((False, slice(num_fitted)), (True, slice(num_fitted, None))):
            some = PackedRows(rows.input_ids_NS[own], rows.position_ids_NS[own])
            for prepared, state in batches(source, some, self.settings.batch_size):
                yield _Batch(prepared, held_out, state, state)

    def _run(self, layer: int, batch: _Batch, state: Tensor) -> Tensor:
        """The state after ``layer``, with whatever weights are in place."""
        return self.layerwise.run(layer, state, batch.prepared.calls[layer])

    def _finish(self, batch: _Batch, state: Tensor) -> Tensor:
        """The final state from that after the last layer."""
        return self.layerwise.finish(state, batch.prepared)

    def _close(self, below: int, first: int, last: int) -> ClosedGap:
        """Past ``below``, the last kept layer before the gap ``first`` to ``last``, and past the gap."""
        where = layers_text([*range(first, last + 1)])
        before = [batch.student for batch in self.batches]
        for layer in range(below, last + 1):
            for batch in self.batches:
                batch.teacher = self._run(layer, batch, batch.teacher)
        correction = Correction(self.layerwise, below) if self.with_correction else None
        train, test = self._sums(correction, below, where)
        fit = self._fit(train, test, is_last=last == self.num_layers - 1)
        error = test.error()
        del train, test  # which are large
        still_open = [batch.student for batch in self.batches]
        self._apply(fit, correction, below, before)
        states = [[state for state, batch in zip(still_open, self.batches, strict=True) if batch.held_out]]
        divergence, closed = self._divergences(last + 1, *states, [batch.student for batch in self.held_out])
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
            for batch, state in zip(self.batches, still_open, strict=True):
                batch.student = state
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

    def _sums(self, correction: Correction | None, below: int, where: str) -> tuple[Sums, Sums]:
        """What is fitted to and what is tested on, with the teacher past the gap; the student goes past ``below``."""
        train, test = Sums(), Sums()
        for batch in self.batches:
            features_ND: Tensor | None = None
            call, before_BSD, teacher_BSD = batch.prepared.calls[below], batch.student, batch.teacher
            if correction is None:
                student_BSD = self.layerwise.run(below, before_BSD, call)
            else:
                student_BSD, features_BSF = correction.features(before_BSD, call)
                features_ND = features_BSF.flatten(0, 1)
            self._refuse_not_finite(where, student_BSD, teacher_BSD)
            batch.student = student_BSD
            (test if batch.held_out else train).add(student_BSD.flatten(0, 1), features_ND, teacher_BSD.flatten(0, 1))
        return train, test

    def _refuse_not_finite(self, where: str, *states: Tensor) -> None:
        if not all(bool(state_BSD.isfinite().all()) for state_BSD in states):
            raise UserError(
                f"prune.compensate: the states at {where} are not finite in {self.model.dtype}; look for damaged "
                f"weights, or {LEAVE_OUT}"
            )

    def _apply(self, fit: Fit, correction: Correction | None, below: int, before: Sequence[Tensor]) -> None:
        """Close the gap above ``below`` by ``fit`` in all batches, from the student's states before that layer."""
        if correction is not None and fit.added_FD is not None:
            # of several batches the last is held out; features are made again, since all of them would be too much
            call = self.batches[-1].prepared.calls[below]
            tensors = correction.folded(fit.added_FD / fit.factor, before[-1], call)
            self._keep(below, tensors)
            with tensors_in_place(self.model, {below: tensors}):
                for batch, state in zip(self.batches, before, strict=True):
                    batch.student = self._run(below, batch, state)
        if fit.factor != 1:
            for batch in self.batches:
                batch.student = batch.student * fit.factor

    def _fit(self, train: Sums, test: Sums, *, is_last: bool) -> Fit:
        with_factor = self.with_factor and not is_last  # behind the last gap there is a norm alone
        if not self.with_correction:
            return fit_factor(train, test) if with_factor else NONE
        return fit_correction(train, test, with_factor=with_factor)

    def _fold_factor(self, layer: int, before: Tensor) -> None:
        """Let ``layer``, with what is folded into it already, write to a state without the factors of gaps below."""
        with tensors_in_place(self.model, {layer: self.folded.get(layer, {})}):
            call = self.batches[-1].prepared.calls[layer]
            self._keep(layer, scaled_layer(self.layerwise, layer, 1 / self.product, before, call))

    def _keep(self, layer: int, tensors: Tensors) -> None:
        self.folded[layer] = {**self.folded.get(layer, {}), **tensors}

    def _divergences(self, start: int, *variants: Sequence[Tensor]) -> list[float]:
        """KL(teacher || student) in nats per held-out token, with gaps above ``start`` open.

        Of each variant, given by the states before layer ``start`` of all held-out batches.
        """
        states = [list(variant) for variant in variants]
        for layer in range(start, self.num_layers):
            if layer not in self.dropped:
                states = [self._past(layer, variant) for variant in states]
        return [self._divergence(variant) for variant in states]

    def _past(self, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
        """The states of held-out batches after ``layer``."""
        return [self._run(layer, batch, state) for batch, state in zip(self.held_out, states, strict=True)]

    def _divergence(self, states: Sequence[Tensor]) -> float:
        """Of the states of held-out batches after the last layer."""
        total, num_tokens, size = 0.0, 0, self.decoder.positions_at_once()
        for batch, state in zip(self.held_out, states, strict=True):
            assert batch.end is not None
            ours_ND, theirs_ND = (end.flatten(0, 1) for end in (self._finish(batch, state), batch.end))
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
        hooked = self._divergence([batch.student for batch in self.held_out])
        states = [self.layerwise.prepare(batch.prepared.inputs).hidden_BSD for batch in self.held_out]
        for layer in range(self.num_layers):
            if layer not in self.dropped:
                with tensors_in_place(self.model, {layer: self.folded.get(layer, {})}):
                    states = self._past(layer, states)
                self._refuse_not_finite(f"layer {layer}", *states)
        folded = self._divergence(states)
        if not math.isclose(hooked, folded, rel_tol=TOLERANCE, abs_tol=1e-4):
            raise UserError(
                f"prune.compensate: {self.model.config.model_type}: with the folded weights the divergence from the "
                f"teacher is {folded:.5f} nats a token, and with factors in force {hooked:.5f}; shoal cannot fold into "
                f"this family: {LEAVE_OUT}"
            )
