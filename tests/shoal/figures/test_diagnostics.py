"""Figures of depth hold what they claim and repeat bit for bit."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.depth import ConceptDepth, DepthPoint, Diagnostics, EffectiveDepth, Probes
from shoal.errors import UserError
from shoal.figures.diagnostics import diagnostics_figure, probes_figure
from shoal.figures.style import save_figure

L = 6
NONE = EffectiveDepth(None, None, "needs the logit lens")
DIAGNOSTICS = Diagnostics(
    Provenance({}, {}, ""),
    num_layers=L,
    num_tokens=100,
    cosines={
        name: (-0.2, -0.1, 0.0, 0.1, 0.2, shift) for name, shift in (("layer", 0.3), ("attention", 0.1), ("mlp", 0))
    },
    sizes={name: (2.0, 1.0, 0.5, 0.3, 0.3, size) for name, size in (("layer", 0.4), ("attention", 0.2), ("mlp", 0.1))},
    parallel=(False,) * L,
    halves_refusal="",
    lens_tokens=50,
    lens_kl=(9.0, 8.0, 6.0, 3.0, 2.0, 1.0),
    lens_overlap=(0.0, 0.1, 0.2, 0.4, 0.5, 0.9),
    lens_refusal="",
    num_cuts=8,
    skip_effect=tuple(tuple(0.1 * (later - s) if later > s else 0.0 for later in range(L)) for s in range(L)),
    skip_output=(0.4, 0.3, 0.2, 0.1, 0.1, 0.0),
    erasure_output=(0.5, 0.4, 0.4, 0.2, 0.1, 0.0),
    effects_refusal="",
    gradient_steps=0,
    attributions=(),
    effective_depth={"cosine": EffectiveDepth(1, 2 / L), "kl": EffectiveDepth(3, 4 / L), "overlap": NONE},
)
CONCEPT = ConceptDepth(
    path="data/cities.jsonl",
    classes=("false", "true"),
    num_train=70,
    num_test=30,
    num_repeated=0,
    num_shortened=0,
    accuracy=(0.5, 0.5, 0.6, 0.9, 0.9, 0.9, 0.9),
    accuracy_low=(0.4, 0.4, 0.5, 0.8, 0.8, 0.8, 0.8),
    accuracy_high=(0.6, 0.6, 0.7, 0.97, 0.97, 0.97, 0.97),
    f1=(0.5,) * 7,
    auc=(0.5,) * 7,
    majority=0.5,
    variation=(1.0, 1.2, 1.5, 1.0, 1.0, 1.0),
    jump=DepthPoint(2 / 6),
    converging=DepthPoint(1.0),
    enough=DepthPoint(0.5),
)


def texts(path: Path) -> list[str]:
    return [node.text or "" for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.slow
def test_every_curve_stands_in_its_panel_and_depths_are_marked(tmp_path: Path) -> None:
    figure = diagnostics_figure(DIAGNOSTICS)
    cosines, sizes, divergence, overlap, output, matrix, _ = figure.axes
    for ax, curves in ((cosines, DIAGNOSTICS.cosines), (sizes, DIAGNOSTICS.sizes)):
        drawn = {str(line.get_label()): line for line in ax.lines}
        for name, label in (("layer", "layer"), ("attention", "attention"), ("mlp", "MLP")):
            assert tuple(drawn[label].get_ydata()) == curves[name]  # pyright: ignore[reportArgumentType]
        assert len({(drawn[label].get_marker(), drawn[label].get_linestyle()) for label in ("layer", "attention")}) == 2
    assert tuple(divergence.lines[0].get_ydata()) == DIAGNOSTICS.lens_kl  # pyright: ignore[reportArgumentType]
    assert tuple(overlap.lines[0].get_ydata()) == DIAGNOSTICS.lens_overlap  # pyright: ignore[reportArgumentType]
    assert [tuple(line.get_ydata()) for line in output.lines] == [DIAGNOSTICS.skip_output, DIAGNOSTICS.erasure_output]  # pyright: ignore[reportArgumentType]
    shown = matrix.images[0].get_array()
    assert shown is not None
    assert shown[1, 3] == pytest.approx(0.2)
    assert [bool(np.ma.getmaskarray(shown)[row, column]) for row, column in ((1, 3), (3, 1), (2, 2))] == [
        False,
        True,
        True,
    ]
    save_figure(figure, tmp_path / "depth.svg")
    found = texts(tmp_path / "depth.svg")
    assert [text for text in found if text.startswith("effective depth")] == [
        "effective depth 33%",
        "effective depth 67%",
    ]


@pytest.mark.slow
def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    probes = Probes(Provenance({}, {}, ""), L, (CONCEPT,))
    for name in ("one.svg", "other.svg"):
        save_figure(diagnostics_figure(DIAGNOSTICS), tmp_path / f"d{name}")
        save_figure(probes_figure(probes), tmp_path / f"p{name}")
    assert (tmp_path / "done.svg").read_bytes() == (tmp_path / "dother.svg").read_bytes()
    assert (tmp_path / "pone.svg").read_bytes() == (tmp_path / "pother.svg").read_bytes()


@pytest.mark.slow
def test_what_was_not_measured_has_no_panel(tmp_path: Path) -> None:
    bare = replace(
        DIAGNOSTICS,
        cosines={"layer": DIAGNOSTICS.cosines["layer"]},
        sizes={"layer": (0.0,) * L},
        lens_kl=(),
        lens_overlap=(),
        skip_effect=(),
        skip_output=(),
        erasure_output=(),
        effective_depth=dict.fromkeys(("cosine", "kl", "overlap"), NONE),
    )
    figure = diagnostics_figure(bare)
    assert len(figure.axes) == 2
    assert figure.axes[1].get_yscale() == "linear"
    save_figure(figure, tmp_path / "bare.png")


def test_probes_show_interval_majority_and_the_depth_of_enough(tmp_path: Path) -> None:
    markup = replace(CONCEPT, path="<b>&" + "x" * 90 + ".jsonl")
    figure = probes_figure(Probes(Provenance({}, {}, ""), L, (CONCEPT, markup)))
    first, _ = figure.axes
    assert tuple(first.lines[0].get_ydata()) == CONCEPT.accuracy  # pyright: ignore[reportArgumentType]
    assert tuple(first.lines[1].get_ydata()) == (0.5, 0.5)  # pyright: ignore[reportArgumentType]
    assert len(first.collections) == 1
    save_figure(figure, tmp_path / "probes.svg")
    found = texts(tmp_path / "probes.svg")
    assert found.count("95 % of the best: 0.50") == 2
    assert "data/cities.jsonl: accuracy, n 30" in found
    assert any(text.startswith("…xxx") and text.endswith(".jsonl: accuracy, n 30") for text in found)


def test_no_labelled_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"holds no labelled set to draw; name one in measure.probes"):
        probes_figure(Probes(Provenance({}, {}, ""), L, ()))
