"""Plans along a greedy order: its first removals that may go, so many or as many as reach a target."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.artifacts.importance import Importance, Removal, SweepColumn
from shoal.errors import UserError

from .goals import Goals
from .metrics.greedy import TASK_ORDER
from .sweeps.columns import affordable, require_affordable


def first_of_order(
    metric: str, wanted: int | Goals, protected: set[int], spared: Sequence[SweepColumn], importance: Importance
) -> tuple[tuple[int, ...], str]:
    """The first removals of a greedy order that touch no protected layer, and the reason."""
    order = order_of_layers(metric, importance)
    free = [removal for removal in order if not protected & set(removal.unit.layers)]
    count = _reaching(metric, free, wanted, spared) if isinstance(wanted, Goals) else wanted
    if len(free) < count:
        raise UserError(
            f"prune.metric={metric}: its order holds {len(free)} layers that are not protected "
            f"({sorted(protected)}), {count} are needed; raise {length_setting(metric)} before it is "
            "measured, or drop fewer"
        )
    layers = affordable((removal.unit.layers[0] for removal in free), count, spared)
    require_affordable(len(layers), count, spared)
    taken = [removal for removal in free if removal.unit.layers[0] in layers]
    skipped = order.index(taken[-1]) + 1 - len(taken)
    removed = f"the first {layers_of(count, importance.num_layers)}"
    reason = f"{removed} of the order of {metric} ({taken[-1].score:.4g} without them)"
    if skipped:
        reason = f"{removed} of the order of {metric} that may go ({skipped} passed over)"
    return tuple(sorted(layers)), reason


def length_setting(metric: str) -> str:
    """The setting that says how long an order is."""
    return "measure.sweep.greedy" if metric == TASK_ORDER else "measure.num_drop"


def order_of_layers(metric: str, importance: Importance) -> Sequence[Removal]:
    """The order of ``metric``.

    Raises:
        UserError: it removes something else than whole layers.
    """
    order = importance.orders[metric]
    parts = {removal.unit.part for removal in order}
    if parts != {"layer"} or any(len(removal.unit.layers) != 1 for removal in order):
        raise UserError(
            f"prune.metric={metric}: is an order of {', '.join(sorted(parts))} units, which stay in their layers; "
            f"choose an order of layers, or run `shoal lab skip RUN_DIR order={metric}`"
        )
    return order


def _reaching(metric: str, free: Sequence[Removal], goals: Goals, spared: Sequence[SweepColumn]) -> int:
    """How many removals of an order reach the goals."""
    taken = affordable([removal.unit.layers[0] for removal in free], len(free), spared)
    prefixes = [taken[: at + 1] for at in range(len(taken))]
    removals = f"the {len(prefixes)} removals of the order of {metric} (raise {length_setting(metric)} for more)"
    return 1 + goals.first_reaching(prefixes, removals)


def layers_of(count: int, num_layers: int) -> str:
    """`2 of 6 layers`."""
    return f"{count} of {num_layers} layers"
