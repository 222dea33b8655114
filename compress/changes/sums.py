"""The regression at a gap: the teacher's state behind it from the student's before it, by sums over tokens alone.

Of the kept layer below a gap the student has the state x and features f of what its MLP wrote; the teacher has y behind
the gap. Sought are a factor a and a matrix E that make y ~ a x + f E, since both can be folded into weights (fold.py):
E into the MLP's output map, a into everything that writes above. E is shrunk to zero. After ReplaceMe
(arXiv:2505.02819), which maps what the MLP writes and shrinks the map to zero, and Prune&Comp (arXiv:2507.18212), whose
factor is a ratio of means.

Errors are relative, token by token: readers of the stream are norms, and a few tokens have a hundred times the others'
norm. Those are counted too: they hold attention sinks, which the correction must leave as they are, and with their
relative weight they are the largest features of all.

N tokens, D hidden, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
