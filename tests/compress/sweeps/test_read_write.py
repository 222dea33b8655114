"""Reading against writing: losses, their interaction and hidden writing against plain arithmetic on the items."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sweep_results import LOST, NUM_ITEMS, NUM_LAYERS, READ, WROTE, importance_with_parts, tables

from shoal.artifacts.importance import ColumnReadWrite, Importance, ReadWrite
from shoal.compress.sweeps.read_write import read_write_of
from shoal.errors import UserError


@cache
def parts() -> ReadWrite:
    return read_write_of(tables())


def column(task: str) -> ColumnReadWrite:
    return next(column for column in parts().columns if column.task == task)


@pytest.mark.parametrize("task", LOST)
def test_losses_are_the_shares_of_items_that_are_lost(task: str) -> None:
    found = column(task)
    for layer in range(NUM_LAYERS):
        read, wrote, lost = (losses[task][layer] / NUM_ITEMS for losses in (READ, WROTE, LOST))
        assert found.reading[layer].value == pytest.approx(read)
        assert found.writing[layer].value == pytest.approx(wrote)
        assert found.interaction[layer].value == pytest.approx(lost - read - wrote)
        for part in (found.reading[layer], found.writing[layer], found.interaction[layer]):
            assert part.low <= part.value <= part.high


def test_nats_that_are_added_are_losses() -> None:
    found = column("language_rolling")
    (whole,) = (own for own in tables()["layer"][0].columns if own.task == found.task)
    for layer, effect in enumerate(whole.effects):
        assert found.reading[layer].value == pytest.approx(0.25 * effect.change.value)
        assert found.writing[layer].value == pytest.approx(0.5 * effect.change.value)
        assert found.interaction[layer].value == pytest.approx(0.25 * effect.change.value)


def test_the_interval_of_an_interaction_is_a_bootstrap_of_the_items_own_interactions() -> None:
    found = column("retrieval_generation").interaction[0]
    first = np.arange(NUM_ITEMS)
    # of 64 right items the first 60 are lost without the layer, the first 56 without its reading or its writing
    own = (first < 60).astype(float) - 2 * (first < 56)
    rng = np.random.default_rng(1)
    means = own[rng.integers(0, NUM_ITEMS, (20_000, NUM_ITEMS))].mean(axis=1)
    assert found.value == pytest.approx(own.mean())
    low, high = np.percentile(means, (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_layers_are_called_by_what_is_significant() -> None:
    found = column("retrieval_generation")
    assert (found.reads, found.writes, found.interacts) == ((0, 2), (0, 4), (0,))
    found = column("knowledge_continuation")
    assert (found.reads, found.writes, found.interacts) == ((0,), (0, 5), (0,))


def test_hidden_writing_is_what_likelihood_keeps_without_it_less_what_generation_keeps() -> None:
    ((gap,), (reading,)) = parts().hidden_writing, parts().hidden_reading
    assert (gap.likelihood, gap.generation) == ("retrieval_continuation", "retrieval_generation")
    for found, lost in ((gap, WROTE), (reading, READ)):
        kept = {
            task: [((64 - n) / 80 - chance) / (64 / 80 - chance) for n in lost[task]]
            for task, chance in (("retrieval_continuation", 0.25), ("retrieval_generation", 0.0))
        }
        expected = np.array(kept["retrieval_continuation"]) - np.array(kept["retrieval_generation"])
        assert [one.value for one in found.gaps] == pytest.approx(expected.tolist())
        assert found.mean.value == pytest.approx(expected.mean())
    assert gap.gaps[4].low > 0.2
    assert reading.gaps[4].high < 0.2


def test_parts_are_said_in_words() -> None:
    atlas = tables()["layer"][0]
    lines = list(parts().in_words(atlas))
    assert len(lines) == len(atlas.columns) + 1
    assert lines[1] == (
        "retrieval/generation: reading is needed in layers 0, 2, writing in layers 0, 4; without the layer more or "
        "less is lost than by both together in layer 0"
    )
    assert "hidden writing, retrieval_continuation against retrieval_generation: +0." in lines[-1]
    assert "most in layer 4: +0.3" in lines[-1]


def test_parts_survive_the_disk_and_are_columns_of_the_table(tmp_path: Path) -> None:
    made = importance_with_parts()
    made.write(tmp_path / "importance.json")
    assert Importance.read(tmp_path / "importance.json") == made
    row = made.rows()[4]
    assert row["retrieval/generation/writing"] == pytest.approx(24 / 80)
    assert row["retrieval/generation/reading"] == pytest.approx(1 / 80)
    assert row["retrieval/generation/interaction"] == pytest.approx(0.0, abs=1e-12)
    assert row["retrieval_continuation/retrieval_generation/hidden_writing"] == pytest.approx(
        parts().hidden_writing[0].gaps[4].value
    )


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    made = importance_with_parts()
    assert made.atlas is not None
    assert made.atlas.read_write is not None
    found = made.atlas.read_write
    short = replace(found.columns[0], interaction=found.columns[0].interaction[:-1])
    for wrong, message in (
        (replace(found, columns=found.columns[1:]), "atlas.read_write.columns: are not those of atlas.sweep"),
        (replace(found, columns=(short, *found.columns[1:])), "atlas.read_write: does not have an entry for each of 6"),
        (replace(found, hidden_reading=()), "atlas.read_write.hidden_reading: is not of the tasks of hidden_writing"),
    ):
        replace(made, atlas=replace(made.atlas, read_write=wrong)).write(tmp_path / "importance.json")
        with pytest.raises(UserError, match=message):
            Importance.read(tmp_path / "importance.json")
