"""Fit what makes up for dropped layers, one gap after the other, on the student's own states.

Teacher and student advance side by side through the layers, one layer for all batches, as one up to the first gap. The
student's state is kept as a teacher with hooks would have it: multiplied at every gap. As it passes, what was fitted
goes into weights of kept layers (fold.py), and in the end these are compared with the hooks.

Operations: what is fitted to goes through the teacher up to the last gap, through the student's layers from the first
to the last one, twice through those below a gap, and into sums of one F x F and two F x D products per gap with a
correction; the held-out eighth of the rows once through all of the teacher, and behind every gap through the student
above it and both heads. The last row alone proves what is folded.

At a gap the kept layer below it gives the student's state x and features f of what its MLP wrote; the teacher has y
behind the gap. Sought are a factor a and a matrix E that make y ~ a x + f E, since both can be folded into weights: E
into the MLP's output map, a into everything that writes above. E is shrunk to zero. After ReplaceMe (arXiv:2505.02819),
which maps what the MLP writes and shrinks the map to zero, and Prune&Comp (arXiv:2507.18212), whose factor is a ratio
of means.

Errors are relative, token by token: readers of the stream are norms, and a few tokens have a hundred times the others'
norm. Those are counted too: they hold attention sinks, which the correction must leave as they are, and with their
relative weight they are the largest features of all.

B batch, S sequence, N tokens, D hidden, F features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count, groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.plan import ClosedGap
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.models.anatomy import decoder_layers, text_config
from shoal.models.load import num_parameters
from shoal.progress import each
from shoal.recipe.prune import Compensate

from ..edits.tensors import tensors_in_place
from ..metrics.metric import Calibration
from ..variants.layerwise import Prepared
from .calibration import Source, batches
from .change import InForce
from .fold import COMPENSATE, LEAVE_OUT, Correction, Tensors, num_features, refuse_sized_end, scaled_layer

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 8
"""The last one in so many rows is not fitted to: rows of other documents, but for the one that is cut in two."""
TOKENS_PER_FEATURE = 4
"""Fitted tokens for every feature below which a correction is refused: it would follow the noise."""
ENOUGH_FOR_FACTORS = 8192
"""Tokens by which a factor without a correction, one number for thousands of channels, is settled to a hundredth."""
FACTORS = (0.5, 4.0)
"""Least and largest factor; what lies outside comes of states that are not alike at all."""
TOLERANCE = 0.02
"""Of the divergence between folded weights and hooks, relative to that between teacher and student."""
SHRINKAGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Candidates, largest first, as multiples of the mean square of a feature."""
NEGLIGIBLE = 0.02
"""Of two shrinkages whose errors on held-out tokens differ by less than this share the larger is taken: text of other
kinds than the calibration's gains by it what its own kind hardly loses."""


@dataclass(frozen=True)
class Fit:
    """What was found for one gap."""

    factor: float = 1.0
    """a; 1 = none."""
    added_FD: Tensor | None = None
    """E in float64; None = none."""
    error: float = math.nan
    """Mean over held-out tokens of ||y - a x - f E||^2 / ||y||^2."""


class Sums:
    """Sums over the tokens of one set, to which batches are added: of a batch float32, of all batches float64."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.xx = self.xy = 0.0
        self.ff_FF = self.fx_FD = self.fy_FD = torch.zeros((), dtype=torch.float64)

    def add(self, x_ND: Tensor, features_NF: Tensor | None, y_ND: Tensor) -> None:
        """Add tokens; ``features_NF`` is None where no correction is sought."""
        x_ND, y_ND = x_ND.float(), y_ND.float()
        scale_N1 = 1 / y_ND.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
        x_ND, y_ND = x_ND * scale_N1, y_ND * scale_N1
        self.num_tokens += len(x_ND)
        self.xx += float((x_ND * x_ND).sum(dtype=torch.float64))
        self.xy += float((x_ND * y_ND).sum(dtype=torch.float64))
        if features_NF is not None:
            f_FN = (features_NF.float() * scale_N1).mT
            with torch.autocast(x_ND.device.type, enabled=False):  # a model's own half precision ends here
                products = f_FN @ f_FN.mT, f_FN @ x_ND, f_FN @ y_ND
            if self.ff_FF.dim() == 0:
                self.ff_FF, self.fx_FD, self.fy_FD = (product.double() for product in products)
            else:  # in place, since these are the largest tensors of all
                for total, product in zip((self.ff_FF, self.fx_FD, self.fy_FD), products, strict=True):
                    total += product

    def error(self, factor: float = 1.0, added_FD: Tensor | None = None) -> float:
        """Mean over the tokens of ||y - a x - f E||^2 / ||y||^2 for a = ``factor`` and E = ``added_FD``."""
        # sum ||y||^2 / ||y||^2 is the number of tokens
        total = self.num_tokens - 2 * factor * self.xy + factor**2 * self.xx
        if added_FD is not None:
            missing_FD = self.fy_FD - factor * self.fx_FD
            total += float((added_FD * (self.ff_FF @ added_FD - 2 * missing_FD)).sum())
        return total / self.num_tokens


def fit_factor(train: Sums, held_out: Sums) -> Fit:
    """The factor alone, by least squares."""
    factor = train.xy / train.xx
    return Fit(factor, None, held_out.error(factor))


def fit_correction(train: Sums, held_out: Sums, *, with_factor: bool) -> Fit:
    """The correction, jointly with the factor or at a factor of 1.

    With E at its best for a, E(a) = (ff + s I)^-1 (fy - a fx), the error that is minimised is quadratic in a, so that
    both are found at once.
    """
    mean_square = float(train.ff_FF.diagonal().mean())

    def fit(shrinkage: float) -> Fit:
        shrunk_FF = train.ff_FF.clone()
        shrunk_FF.diagonal().add_(shrinkage * mean_square)
        root_FF = torch.linalg.cholesky(shrunk_FF)
        x_FD, y_FD = (torch.cholesky_solve(sums_FD, root_FF) for sums_FD in (train.fx_FD, train.fy_FD))
        factor = 1.0
        if with_factor:
            explained_xy, explained_xx = (float((train.fx_FD * own_FD).sum()) for own_FD in (y_FD, x_FD))
            factor = (train.xy - explained_xy) / (train.xx - explained_xx)
        added_FD = y_FD - factor * x_FD
        return Fit(factor, added_FD, held_out.error(factor, added_FD))

    errors = [fit(shrinkage).error for shrinkage in SHRINKAGES]  # one solution at a time, since each is large
    return fit(SHRINKAGES[next(i for i, error in enumerate(errors) if error <= (1 + NEGLIGIBLE) * min(errors))])


NONE, END = Fit(), -1


@dataclass(frozen=True)
class Fitted:
    """What makes up for the dropped layers of a plan."""

    gaps: tuple[ClosedGap, ...]
    layers: Mapping[int, Tensors]
    """New tensors of kept layers in float32, by the teacher's index and the name within the layer."""


def needed_tokens(num_features: int, sequence_length: int) -> int:
    """Tokens, in whole rows, of which enough are fitted to for so many features, and some are held out."""
    fitted = max(1, -(-TOKENS_PER_FEATURE * num_features // sequence_length))
    return sequence_length * next(num for num in count(fitted + 1) if num - _held_out(num) >= fitted)


def _held_out(num_rows: int) -> int:
    return max(1, num_rows // HELD_OUT_SHARE)


def needed_features(model: PreTrainedModel, drop: Sequence[int], settings: Compensate) -> int:
    """The most features of an MLP that a correction is fitted to; 0 where there is none."""
    below = [first - 1 for first, _ in gaps(drop) if settings.method != "scale"]
    return max((num_features(model, layer) for layer in below), default=0)


def operations(model: PreTrainedModel, drop: Sequence[int], settings: Compensate, num_tokens: int) -> float:
    """Floating-point operations that compensate takes, as the first lines here count them, about."""
    num_layers, below = len(decoder_layers(model)), [first - 1 for first, _ in gaps(drop)]
    kept = [layer for layer in range(num_layers) if layer not in drop]
    text, features = text_config(model.config), needed_features(model, drop, settings)
    between = sum(below[0] <= layer <= below[-1] for layer in kept) + len(below) * bool(features)
    above = sum(layer > gap for gap in (below[0], *below) for layer in kept)
    head = text.hidden_size * text.vocab_size
    layer = (num_parameters(model) - head) / num_layers
    fitted = layer * (max(drop) + 1 + between)
    held_out = layer * (num_layers + between + above) + head * (2 * len(below) + 1)
    products = len(below) * features * (features + 2 * text.hidden_size)
    return 2 * num_tokens * (fitted + (held_out - fitted) / HELD_OUT_SHARE + products)


def gaps(drop: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of every run of neighbouring dropped layers, increasing."""
    runs = groupby(enumerate(sorted(drop)), key=lambda pair: pair[1] - pair[0])
    return [(run[0][1], run[-1][1]) for _, group in runs if (run := list(group))]


@torch.no_grad()
def compensate(
    source: Source, drop: Sequence[int], settings: Compensate, text: Calibration, before: InForce | None = None
) -> Fitted:
    """Factors and corrections for every gap that ``drop`` leaves in the model of ``source``, which stays as it is.

    ``drop`` is without layer 0: nothing below it could make up for it. The student has the changes ``before``, which
    stand in the way of no gap; None = there are none. ``text`` has as many rows as needed_tokens says.

    A gap at which the divergence of the student's next-token distributions from the teacher's does not fall on held-out
    rows stays as it was.
    """
    return _Fitting(source, drop, settings, text, before).run()


@dataclass
class _Batch:
    """Some rows on their way through the layers; states are (B, S, D)."""

    prepared: Prepared
    held_out: bool
    teacher: Tensor
    student: Tensor
    behind: dict[int, Tensor] = field(default_factory=dict)
    """Of held-out rows: the teacher's state by the last layer of every gap, and by END what its head gets."""


class _Fitting:
    def __init__(
        self, source: Source, drop: Sequence[int], settings: Compensate, text: Calibration, before: InForce | None
    ) -> None:
        self.model, self.layerwise, self.decoder = source.model, source.layerwise, source.decoder
        self.num_layers, self.before = self.layerwise.num_layers, before
        self.dropped = set(drop)
        self.gap_above = {first - 1: (first, last) for first, last in gaps(drop)}
        self.first, self.top = min(self.gap_above), max(self.gap_above.values())[1]
        """The first layer that may change, and the last one of the last gap."""
        self.with_correction, self.with_factor = settings.method != "scale", settings.method != "linear"
        self.batches = list(self._batches(source, text))
        self.fitted = [batch for batch in self.batches if not batch.held_out]
        self.held_out, self.probe = self.batches[len(self.fitted) :], self.batches[-1]
        self.divergence = math.nan
        """Of the student from the teacher, with what is closed so far; nan = nobody has looked."""
        self.folded: dict[int, Tensors] = {}
        self.product = 1.0
        """Product of the factors of all gaps below."""

    def run(self) -> Fitted:
        self._see_teacher()
        closed: list[ClosedGap] = []
        start_BSD = self.probe.student
        for layer in each(range(self.num_layers), "prune: compensating", unit="layers"):
            if layer in self.dropped:
                continue  # passed with its gap
            if layer == self.first:
                start_BSD = self.probe.student
            if (gap := self.gap_above.get(layer)) is not None:
                closed.append(self._close(layer, *gap))
                continue
            with self._student():
                if self.product != 1:
                    self._fold_factor(layer, self.probe.student)
                for batch in self._passing(layer):
                    batch.student = self._run(layer, batch, batch.student)
            for batch in self.fitted if layer < self.top else ():
                batch.teacher = batch.student if self._is_shared(layer) else self._run(layer, batch, batch.teacher)
        with self._student():
            self._refuse_wrong_fold(start_BSD)
        return Fitted(tuple(closed), self.folded)

    def _is_shared(self, layer: int) -> bool:
        """Whether teacher and student are one up to ``layer``."""
        return self.before is None and layer < self.first

    def _passing(self, layer: int) -> list[_Batch]:
        """Those of which the student's state after ``layer`` is not known and is asked for."""
        if self._is_shared(layer):
            return self.fitted
        return self.batches if layer < self.top else [self.probe]

    def _student(self) -> AbstractContextManager[object]:
        """A block in which the model is the student but for its gaps."""
        return nullcontext() if self.before is None else self.before(self.model)

    def _see_teacher(self) -> None:
        """Run the teacher over held-out rows; refuse on the way what the method cannot be folded into, before anything
        is fitted."""
        states, prepared = [batch.teacher for batch in self.held_out], self.probe.prepared
        for layer, call in enumerate(prepared.calls):
            if layer == self.first and self.before is None:
                for batch, state in zip(self.held_out, states, strict=True):
                    batch.student = state
            before, states = states[-1], self._past(layer, states)
            self._refuse_not_finite(f"layer {layer}", *states)
            if self.with_correction and layer in self.gap_above:
                Correction(self.layerwise, layer).form(before, call)
            if self.with_factor and layer > min(self.dropped) and layer not in self.dropped:
                scaled_layer(self.layerwise, layer, 1.0, before, call)
            if layer in self.dropped and layer + 1 not in self.dropped:
                for batch, state in zip(self.held_out, states, strict=True):
                    batch.behind[layer] = state
        if self.with_factor:
            refuse_sized_end(self.layerwise, prepared, states[-1])
        for batch, state in zip(self.held_out, states, strict=True):
            batch.behind[END] = self.layerwise.finish(state, batch.prepared)

    def _batches(self, source: Source, text: Calibration) -> Iterator[_Batch]:
        """What is fitted to, then what is held out; the last row alone."""
        rows = text.rows
        num_fitted = len(rows) - _held_out(len(rows))
        for start, end in ((0, num_fitted), (num_fitted, len(rows) - 1), (len(rows) - 1, len(rows))):
            some = PackedRows(rows.input_ids_NS[start:end], rows.position_ids_NS[start:end])
            for prepared, state in batches(source, some, text.batch_size):
                yield _Batch(prepared, start >= num_fitted, state, state)

    def _run(self, layer: int, batch: _Batch, state: Tensor) -> Tensor:
        """The state after ``layer``, with whatever weights are in place."""
        return self.layerwise.run(layer, state, batch.prepared.calls[layer])

    def _close(self, below: int, first: int, last: int) -> ClosedGap:
        """Past ``below``, the last kept layer before the gap ``first`` to ``last``, and past the gap."""
        for batch in self.fitted:
            for layer in range(below, last + 1):
                batch.teacher = self._run(layer, batch, batch.teacher)
        for batch in self.held_out:
            batch.teacher = batch.behind.pop(last)
        with self._student():
            return self._close_students(below, first, last)

    def _close_students(self, below: int, first: int, last: int) -> ClosedGap:
        """The same for the student; the teacher is past the gap."""
        where = layers_text([*range(first, last + 1)])
        before = {id(batch): batch.student for batch in self.batches}
        correction = Correction(self.layerwise, below) if self.with_correction else None
        train, test = self._sums(correction, below, where)
        fit = self._fit(train, test, is_last=last == self.num_layers - 1)
        error = test.error()
        del train, test  # which are large
        still_open = [batch.student for batch in self.held_out]
        tensors: Tensors = {}
        if correction is not None and fit.added_FD is not None:
            proof = before[id(self.probe)], self.probe.prepared.calls[below]
            tensors = correction.folded(fit.added_FD / fit.factor, *proof)
        self._apply(fit, tensors, below, before, self.held_out)
        closed_states = [batch.student for batch in self.held_out]
        closed, *opened = self._divergences(last + 1, closed_states, *[still_open] * math.isnan(self.divergence))
        (divergence,) = opened or [self.divergence]
        helps = closed < divergence and FACTORS[0] <= fit.factor <= FACTORS[1]
        how = f"factor {fit.factor:.3f}{'' if fit.added_FD is None else ' and a correction'}"
        log.info(
            "prune: dropped block %s: %s; error of the state %.4f -> %.4f, divergence from the teacher %.4f -> %.4f "
            "nats per token%s",
            *(where, how, error, error if fit is NONE else fit.error, divergence, closed),
            "" if helps else ": no improvement, so this block stays without correction",
        )
        if not helps:
            fit, closed, tensors = NONE, divergence, {}
            for batch, state in zip(self.held_out, still_open, strict=True):
                batch.student = state
        elif last < self.top:
            self._apply(fit, tensors, below, before, self.fitted)
        if tensors:
            self._keep(below, tensors)
        if self.product != 1:
            self._fold_factor(below, before[id(self.probe)])
        self.product *= fit.factor
        self.divergence = closed
        errors = error, fit.error if helps else error
        return ClosedGap(first, last, fit.factor, fit.added_FD is not None, *errors, divergence, closed)

    def _sums(self, correction: Correction | None, below: int, where: str) -> tuple[Sums, Sums]:
        """What is fitted to and what is tested on, with the teacher past the gap; the student goes past ``below``."""
        train, test = Sums(), Sums()
        for batch in self.batches:
            features_ND: Tensor | None = None
            if correction is None:
                batch.student = self._run(below, batch, batch.student)
            else:
                batch.student, features_BSF = correction.features(batch.student, batch.prepared.calls[below])
                features_ND = features_BSF.flatten(0, 1)
            self._refuse_not_finite(where, batch.student, batch.teacher)
            into = test if batch.held_out else train
            into.add(batch.student.flatten(0, 1), features_ND, batch.teacher.flatten(0, 1))
        return train, test

    def _refuse_not_finite(self, where: str, *states: Tensor) -> None:
        if not all(bool(state_BSD.isfinite().all()) for state_BSD in states):
            raise UserError(
                f"{COMPENSATE}: the states at {where} are not finite in {self.model.dtype}; check the weights for "
                f"damage, or {LEAVE_OUT}"
            )

    def _apply(
        self, fit: Fit, tensors: Tensors, below: int, before: Mapping[int, Tensor], some: Sequence[_Batch]
    ) -> None:
        """Close the gap above ``below`` in ``some`` batches, by what was found from their states ``before`` it."""
        with tensors_in_place(self.model, {below: tensors}):
            for batch in some:  # features are made again, since all of them would be too much
                after = self._run(below, batch, before[id(batch)]) if tensors else batch.student
                batch.student = after * fit.factor

    def _fit(self, train: Sums, test: Sums, *, is_last: bool) -> Fit:
        with_factor = self.with_factor and not is_last  # behind the last gap there is a norm alone
        if not self.with_correction:
            return fit_factor(train, test) if with_factor else NONE
        return fit_correction(train, test, with_factor=with_factor)

    def _fold_factor(self, layer: int, before: Tensor) -> None:
        """Let ``layer``, with what is folded into it already, write to a state without the factors of gaps below."""
        with tensors_in_place(self.model, {layer: self.folded.get(layer, {})}):
            call = self.probe.prepared.calls[layer]
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
        return self._compared(self.held_out, states)

    def _past(self, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
        """The states of held-out batches after ``layer``."""
        return [self._run(layer, batch, state) for batch, state in zip(self.held_out, states, strict=True)]

    def _compared(self, some: Sequence[_Batch], variants: Sequence[Sequence[Tensor]]) -> list[float]:
        """The same of variants of the states of ``some`` batches after the last layer."""
        totals, num_tokens = [0.0 for _ in variants], 0
        size = min(self.decoder.positions_at_once(), self.decoder.enough_tokens)
        for batch, *states in zip(some, *variants, strict=True):
            ours = [self.layerwise.finish(state, batch.prepared).flatten(0, 1).split(size) for state in states]
            for theirs_ND, *ours_ND in zip(batch.behind[END].flatten(0, 1).split(size), *ours, strict=True):
                log_p = self.decoder.logits(theirs_ND).log_softmax(-1)
                p = log_p.exp()
                for variant, own_ND in enumerate(ours_ND):  # in place, since these outweigh the products with the head
                    less = self.decoder.logits(own_ND).log_softmax(-1).neg_().add_(log_p)
                    totals[variant] += float(less.mul_(p).sum())
                num_tokens += len(theirs_ND)
        return [total / num_tokens for total in totals]

    def _refuse_wrong_fold(self, start_BSD: Tensor) -> None:
        """Compare the folded weights, skips in force, with the hooks, from the state before the first layer that may
        change; each was proven, and this is all."""
        state_BSD = start_BSD
        for layer in range(self.first, self.num_layers):
            if layer not in self.dropped:
                with tensors_in_place(self.model, {layer: self.folded.get(layer, {})}):
                    state_BSD = self._run(layer, self.probe, state_BSD)
                self._refuse_not_finite(f"layer {layer}", state_BSD)
        hooked, folded = self._compared([self.probe], [[self.probe.student], [state_BSD]])
        if not math.isclose(hooked, folded, rel_tol=TOLERANCE, abs_tol=1e-4):
            raise UserError(
                f"{COMPENSATE}: {self.model.config.model_type}: with folded weights the divergence from the teacher "
                f"is {folded:.5f} nats per token, with explicit factors {hooked:.5f}; shoal cannot fold into this "
                f"family: {LEAVE_OUT}"
            )
