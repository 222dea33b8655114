"""What prune.spare saves: columns of an atlas on which nothing significant may be spent."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from shoal.artifacts.importance import Importance, SweepColumn
from shoal.errors import UserError
from shoal.recipe.prune import Prune

from .sweeps.columns import swept_columns, unknown
from .sweeps.expected_loss import is_loss, joint_change

log = logging.getLogger(__name__)


def spared_columns(prune: Prune, importance: Importance) -> tuple[SweepColumn, ...]:
    """The columns on which nothing significant may be spent."""
    columns_by_task: dict[str, SweepColumn] = {}
    for name in prune.spare:
        columns = swept_columns(name, importance)
        if not columns:
            raise unknown(name, importance, f"prune.spare: {name}", swept_only=True)
        columns_by_task |= {column.task: column for column in columns}
        warn_without_signal(name, importance)
    return tuple(columns_by_task.values())


def affordable(layers: Iterable[int], count: int, spared: Sequence[SweepColumn]) -> list[int]:
    """The first ``count`` of ``layers`` whose summed loss is significant on no spared column; fewer if there are not.

    A layer with which the sum would become significant is passed over, and the next one tried.
    """
    taken: list[int] = []
    for layer in layers:
        if len(taken) == count:
            break
        if not costs([*taken, layer], spared):
            taken.append(layer)
    return taken


def costs(layers: Sequence[int], spared: Sequence[SweepColumn]) -> bool:
    """Whether the summed loss is significant on a spared column."""
    return any(is_loss(column, joint_change(column, layers)) for column in spared)


def require_affordable(num_affordable: int, count: int, spared: Sequence[SweepColumn]) -> None:
    """Refuse a choice of fewer layers than are asked for.

    Raises:
        UserError: naming the columns.
    """
    if num_affordable < count:
        names = ", ".join(column.task for column in spared)
        raise UserError(
            f"prune.spare: only {num_affordable} of the {count} layers asked for can go without a significant loss on "
            f"{names}, by the sum of their single removals; drop fewer or spare less"
        )


def warn_without_signal(name: str, importance: Importance) -> None:
    """Warn of a swept column that tells nothing of layers."""
    if name in (*importance.layers, *importance.runs, *importance.orders):
        return
    for column in swept_columns(name, importance):
        if column.higher_is_better and column.no_retention:
            log.warning("prune: %s says little about layers: %s", column.task, column.no_retention)
