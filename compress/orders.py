"""Plans along a greedy order: its first removals that may go, so many or as many as reach a target."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.artifacts.importance import Importance, Removal, SweepColumn
from shoal.errors import UserError
from shoal.recipe.edits import Edit, Edits, SkipAttention, SkipMlp

from .goals import Goals
from .metrics.greedy import HALVES, TASK_ORDER
from .sparing import affordable, require_affordable


def first_of_order(
    metric: str, wanted: int | Goals, protected: set[int], spared: Sequence[SweepColumn], importance: Importance
) -> tuple[tuple[int, ...], Edits, str]:
    """The first removals of a greedy order that touch no protected layer.

    Of halves twice as many are taken, so that ``count`` layers' worth goes under every metric; a layer both of whose
    halves go is dropped. The sums that prune.spare looks at are known of whole layers only: where halves go, the
    halves of critical layers stay.
    """
    order, of_halves = importance.orders[metric], is_of_halves(metric, importance)
    free = [removal for removal in order if not protected & set(removal.unit.layers)]
    if isinstance(wanted, Goals):
        count = _reaching(metric, free, wanted, spared, of_halves=of_halves)
    else:
        count = 2 * wanted if of_halves else wanted
    if len(free) < count:
        removed = "halves" if of_halves else "layers"
        raise UserError(
            f"prune.metric={metric}: its order holds {len(free)} {removed} that are not protected "
            f"({sorted(protected)}), {count} are needed; raise {length_setting(metric)} before it is "
            "measured, or drop fewer"
        )
    if of_halves:
        taken, last = free[:count], free[count - 1]
        layers, halves = _without_halves(taken)
        removed = f"the first {count} halves"
    else:
        layers = affordable((removal.unit.layers[0] for removal in free), count, spared)
        require_affordable(len(layers), count, spared)
        taken = [removal for removal in free if removal.unit.layers[0] in layers]
        last, halves, removed = taken[-1], (), f"the first {layers_of(count, importance.num_layers)}"
    skipped = order.index(last) + 1 - len(taken)
    reason = f"{removed} of the order of {metric} ({last.score:.4g} without them)"
    if skipped:
        reason = f"{removed} of the order of {metric} that may go ({skipped} passed over)"
    return tuple(sorted(layers)), halves, reason


def length_setting(metric: str) -> str:
    """The setting that says how long an order is."""
    return "measure.sweep.greedy" if metric == TASK_ORDER else "measure.num_drop"


def is_of_halves(metric: str, importance: Importance) -> bool:
    """Whether an order removes halves of layers, and not whole ones.

    Raises:
        UserError: it removes something else, of which no plan can be made.
    """
    order = importance.orders[metric]
    parts = {removal.unit.part for removal in order}
    of_halves = parts <= set(HALVES)
    if not (of_halves or parts == {"layer"}) or any(len(removal.unit.layers) != 1 for removal in order):
        raise UserError(
            f"prune.metric={metric}: is an order of {', '.join(sorted(parts))} units, of which no plan can be made; "
            "choose an order of layers or of their halves"
        )
    return of_halves


def _reaching(
    metric: str, free: Sequence[Removal], goals: Goals, spared: Sequence[SweepColumn], *, of_halves: bool
) -> int:
    """How many removals of an order reach the goals. Only whole layers save something: a half leaves its place."""
    if of_halves:
        prefixes = [_without_halves(free[: at + 1])[0] for at in range(len(free))]
    else:
        taken = affordable([removal.unit.layers[0] for removal in free], len(free), spared)
        prefixes = [taken[: at + 1] for at in range(len(taken))]
    removals = f"the {len(prefixes)} removals of the order of {metric} (raise {length_setting(metric)} for more)"
    return 1 + goals.first_reaching(prefixes, removals)


def _without_halves(removals: Sequence[Removal]) -> tuple[list[int], Edits]:
    """Layers both of whose halves go, and the edits that skip the other halves."""
    gone = {part: {r.unit.layers[0] for r in removals if r.unit.part == part} for part in HALVES}
    both = gone["attention"] & gone["mlp"]
    attention, mlp = (tuple(sorted(gone[part] - both)) for part in HALVES)
    edits: list[Edit] = [SkipAttention("skip_attention", attention)] if attention else []
    edits += [SkipMlp("skip_mlp", mlp)] if mlp else []
    return sorted(both), tuple(edits)


def layers_of(count: int, num_layers: int) -> str:
    """`2 of 6 layers`."""
    return f"{count} of {num_layers} layers"
