"""What models use their layers for, side by side: against plain loops, with planted differences and aligned layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from results import provenance
from sweep_results import NUM_ITEMS, nats, right, task

from shoal.artifacts.importance import Importance
from shoal.compress.sweeps.atlas import build_atlas
from shoal.compress.sweeps.table import write_items
from shoal.errors import UserError
from shoal.figures.style import save_figure
from shoal.lab.depth_use import DepthUse, SweptRole, depth_use, depth_use_figure

NUM_LAYERS = 6


def swept(
    folder: Path, role: str, lost: Sequence[int], added: Sequence[float] | None = None, *, kept: tuple[int, ...] = ()
) -> SweptRole:
    """A model measured over 80 look-ups, of which each layer's removal loses so many, and as many windows of text."""
    intact = [task(right(0.8))]
    removed = [[task(right(0.8, count))] for count in lost]
    if added is not None:
        base = 2.0 + np.linspace(0.0, 1.0, NUM_ITEMS)
        wave = 0.01 * np.cos(np.arange(NUM_ITEMS))
        intact.append(nats(base))
        for scores, more in zip(removed, added, strict=True):
            scores.append(nats(base + more + (wave if more else 0.0)))
    importance = Importance(provenance(), len(removed), 100, {}, {}, atlas=build_atlas(intact, removed))
    importance.save(folder / role / Importance.FILE)
    write_items(folder / role / "sweep" / "layer", [f"layer {n}" for n in range(len(removed))], intact, removed)
    return SweptRole(role, folder / role, kept or tuple(range(len(removed))))


def compared(*models: SweptRole) -> DepthUse:
    return depth_use(models, num_layers=NUM_LAYERS, provenance=provenance())


@pytest.mark.prove
def test_what_is_left_and_where_is_what_plain_loops_say(tmp_path: Path) -> None:
    lost, added = (60, 0, 30, 0, 4, 16), (4.0, 0.0, 0.2, 0.02, 0.1, 0.3)
    found = compared(
        swept(tmp_path, "teacher", lost, added), swept(tmp_path, "distilled", (10, 0, 30, 0, 4, 50), added)
    )
    shares = [((64 - count) / 80 - 0.25) / (0.8 - 0.25) for count in lost]
    by_task = {own.task: own for own in found.tasks}
    teacher = by_task["retrieval_continuation"].roles["teacher"]
    assert [left.value for left in teacher.left] == pytest.approx(shares, abs=1e-12)
    losses = [max(0.0, 1 - share) for share in shares]
    assert teacher.centroid is not None
    assert teacher.centroid.value == pytest.approx(
        sum(loss * layer / 5 for layer, loss in enumerate(losses)) / sum(losses), abs=1e-12
    )
    assert teacher.num_critical == 3, "four items fewer are no proof"
    text = by_task["language_rolling"]
    increases = [float(np.mean(more + (0.01 * np.cos(np.arange(80)) if more else 0))) for more in added]
    assert [left.value for left in text.roles["teacher"].left] == pytest.approx(increases, abs=1e-9)
    assert text.roles["teacher"].centroid is not None
    assert text.roles["teacher"].centroid.value == pytest.approx(
        sum(layer / 5 * more for layer, more in enumerate(increases)) / sum(increases), abs=1e-9
    )


def test_a_planted_move_is_found_with_its_sign_and_interval(tmp_path: Path) -> None:
    before = swept(tmp_path, "teacher", (60, 0, 30, 0, 4, 0), (1.0, 0.0, 0.2, 0.0, 0.0, 0.1))
    after = swept(tmp_path, "distilled", (60, 0, 0, 0, 4, 30), (1.0, 0.0, 0.0, 0.0, 0.0, 0.5))
    found = compared(before, after)
    look_ups, text = found.tasks
    (moved,) = look_ups.moved
    assert (moved.before, moved.after, moved.layers) == ("teacher", "distilled", (0, 1, 2, 3, 4, 5))
    assert [layer for layer, change in enumerate(moved.left) if change.is_clear] == [2, 5]
    assert moved.left[2].low > 0 > moved.left[5].high, "2 is needed less, 5 more"
    assert moved.left[2].value == pytest.approx(30 / 80 / 0.55)
    assert moved.centroid is not None
    assert moved.centroid.low > 0, "deeper"
    (moved,) = text.moved
    assert moved.left[2].high < 0 < moved.left[5].low, "fewer nats are added without 2, and more without 5"


@pytest.mark.prove
def test_it_is_written_and_read_and_drawn(tmp_path: Path) -> None:
    found = compared(
        swept(tmp_path, "teacher", (60, 0, 30, 0, 4, 16)),
        swept(tmp_path, "pruned", (60, 0, 30, 4), kept=(0, 1, 2, 4)),
        swept(tmp_path, "distilled", (50, 0, 20, 4), kept=(0, 1, 2, 4)),
    )
    found.save(tmp_path / DepthUse.FILE)
    assert DepthUse.load(tmp_path / DepthUse.FILE) == found
    assert [(moved.before, moved.after) for moved in found.tasks[0].moved] == [
        ("teacher", "pruned"),
        ("teacher", "distilled"),
        ("pruned", "distilled"),
    ]
    save_figure(depth_use_figure(found), tmp_path / "use.svg")
    for role in found.kept:
        assert role in (tmp_path / "use.svg").read_text()


@pytest.mark.prove
def test_items_that_are_not_those_of_the_sweep_are_refused(tmp_path: Path) -> None:
    lost = (60, 0, 30, 0, 4, 16)
    teacher = swept(tmp_path, "teacher", lost)
    file = tmp_path / "teacher/sweep/layer/retrieval_continuation.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps(table | {"without": dict(list(table["without"].items())[:2])}))
    with pytest.raises(UserError, match=r"has 2 units, importance\.json has 6"):
        compared(teacher, teacher)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot be read .*measure again"):
        compared(teacher, teacher)
