"""The atlas of a model whose layers were made by hand finds what was put where."""

from __future__ import annotations

import pytest
from planted import COPY, NUM_LAYERS, TABLE, TAME, planted_model, planted_scores

from shoal.artifacts.importance import Atlas
from shoal.compress.edits.layer_edits import components_of
from shoal.compress.sweeps.atlas import build_atlas


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    model = planted_model()
    return build_atlas(*planted_scores(tmp_path_factory.mktemp("tasks"), model, components_of("layer", model)))


@pytest.mark.parametrize(
    ("label", "critical"),
    [
        ("retrieval/continuation", [COPY]),
        ("knowledge/continuation", [TABLE]),
        ("retrieval/generation", [COPY, TAME]),
        ("knowledge/generation", [TAME, TABLE]),
    ],
)
def test_a_layer_is_critical_for_what_it_does_and_for_nothing_else(
    atlas: Atlas, label: str, critical: list[int]
) -> None:
    (found,) = atlas.of(label)
    assert found.baseline.value == 1.0
    assert list(found.critical) == critical
    spared = [layer for layer in range(NUM_LAYERS) if layer not in critical]
    assert all(found.importances[layer] == 0 for layer in spared)


def test_likelihood_hides_what_generation_shows_where_it_was_planted(atlas: Atlas) -> None:
    assert {gap.likelihood for gap in atlas.gaps} == {
        "planted_retrieval_continuation",
        "planted_knowledge_continuation",
    }
    for gap in atlas.gaps:
        assert gap.gaps[TAME].value == 1.0
        assert gap.gaps[TAME].low > 0.5
        for layer in set(range(NUM_LAYERS)) - {TAME, COPY, TABLE}:
            assert gap.gaps[layer].value == 0.0


def test_retrieval_lies_below_knowledge_as_it_was_planted(atlas: Atlas) -> None:
    depth = {profile.task: profile.centroid for profile in atlas.depth}
    retrieval, knowledge = depth["planted_retrieval_continuation"], depth["planted_knowledge_continuation"]
    assert retrieval is not None
    assert knowledge is not None
    assert retrieval.value == pytest.approx(COPY / (NUM_LAYERS - 1))
    assert knowledge.value == pytest.approx(TABLE / (NUM_LAYERS - 1))
