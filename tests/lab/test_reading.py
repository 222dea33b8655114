"""Reading against writing: losses and hidden writing against plain arithmetic on the items."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from planted import COPY, TABLE, TAME, planted_model, planted_scores
from results import provenance
from sweep_results import LOST, NUM_ITEMS, NUM_LAYERS, READ, WROTE, tables

from shoal.compress.edits.layer_edits import components_of
from shoal.compress.sweeps.table import table_of
from shoal.figures.style import save_figure
from shoal.lab.reading import OF_LAYERS, ColumnReadWrite, ReadWrite, read_write_figure, read_write_of


@cache
def parts() -> ReadWrite:
    return read_write_of(tables(), provenance())


def column(task: str) -> ColumnReadWrite:
    return next(column for column in parts().columns if column.task == task)


@pytest.mark.parametrize("task", LOST)
def test_losses_are_the_shares_of_items_that_are_lost(task: str) -> None:
    found = column(task)
    for layer in range(NUM_LAYERS):
        read, wrote = (losses[task][layer] / NUM_ITEMS for losses in (READ, WROTE))
        assert found.reading[layer].value == pytest.approx(read)
        assert found.writing[layer].value == pytest.approx(wrote)
        for part in (found.reading[layer], found.writing[layer]):
            assert part.low <= part.value <= part.high


def test_nats_that_are_added_are_losses() -> None:
    found = column("language_rolling")
    (whole,) = (own for own in tables()["layer"][0].columns if own.task == found.task)
    for layer, effect in enumerate(whole.effects):
        assert found.reading[layer].value == pytest.approx(0.25 * effect.change.value)
        assert found.writing[layer].value == pytest.approx(0.5 * effect.change.value)


def test_layers_are_called_by_what_is_significant() -> None:
    found = column("retrieval_generation")
    assert (found.reads, found.writes) == ((0, 2), (0, 4))
    found = column("knowledge_continuation")
    assert (found.reads, found.writes) == ((0,), (0, 5))


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


def test_parts_survive_the_disk_and_are_told_and_drawn(tmp_path: Path) -> None:
    found = parts()
    found.save(tmp_path / ReadWrite.FILE)
    assert ReadWrite.load(tmp_path / ReadWrite.FILE) == found
    lines = found.in_words().splitlines()
    assert len(lines) == len(found.columns) + 1
    assert lines[1] == "retrieval/generation: reading is needed in layers 0, 2, writing in layers 0, 4"
    assert "hidden writing, retrieval_continuation against retrieval_generation: +0." in lines[-1]
    assert "most in layer 4: +0.3" in lines[-1]
    figure = read_write_figure(found)
    assert [ax.get_title(loc="left").split("\n")[0] for ax in figure.axes] == [
        "retrieval/continuation: acc lost (n = 80)",
        "retrieval/generation: acc lost (n = 80)",
        "knowledge/continuation: acc lost (n = 80)",
        "language/rolling: nats per token added (n = 80)",
        "Share kept, likelihood minus generation",
    ]
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert list(lines["reading"].get_ydata()) == pytest.approx([n / 80 for n in READ["retrieval_generation"]])  # pyright: ignore
    assert "hidden writing" in save_figure(figure, tmp_path / "reading.svg").decode()


@pytest.fixture(scope="module")
def planted_parts(tmp_path_factory: pytest.TempPathFactory) -> ReadWrite:
    model, tables = planted_model(), {}
    for operator in OF_LAYERS:
        units = components_of(operator, model)
        scores = planted_scores(tmp_path_factory.mktemp("tasks"), model, units)
        tables[operator] = table_of(operator, units, *scores)
    return read_write_of(tables, provenance())


def test_layers_that_act_on_the_last_token_alone_are_found_to_write_and_not_to_read(planted_parts: ReadWrite) -> None:
    found = {column.task: column for column in planted_parts.columns}
    assert found["planted_retrieval_generation"].writes == (COPY, TAME)
    assert found["planted_knowledge_continuation"].writes == (TABLE,)
    for column in planted_parts.columns:
        assert column.reads == ()
        assert all(one.value == 0 for one in column.reading)


def test_likelihood_hides_the_writing_that_generation_needs_where_it_was_planted(planted_parts: ReadWrite) -> None:
    assert len(planted_parts.hidden_writing) == 2
    for writing, reading in zip(planted_parts.hidden_writing, planted_parts.hidden_reading, strict=True):
        assert writing.gaps[TAME].value == 1.0
        assert writing.gaps[TAME].low > 0.5
        assert all(gap.value == 0 for gap in reading.gaps)
