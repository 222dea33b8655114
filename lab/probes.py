"""At which depth a concept can be read off: logistic probes on every layer's states (arXiv:2404.07066).

N items, D hidden, L layers. Depth l is the state after l layers: 0 = embeddings, L = what the final norm gets.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.compress.edits.sublayers import probing
from shoal.data.sources import load_labelled, sources_fingerprint
from shoal.errors import UserError
from shoal.figures.style import FAINT, INK, SERIES_COLOURS, clean, figure_style, panels
from shoal.launch.verbs.run import Run
from shoal.models.anatomy import decoder_layers
from shoal.progress import each
from shoal.recipe.section import DataSource, Positive, Section, Text
from shoal.stats.intervals import wilson

from .depth.runs import Prompt, batch_of_prompts, require_finite, require_one_path, run_body, states_at
from .diagnostics import layer_axis, mark
from .part import identity, made, model_of, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JUMP = 1.1
"""A depth at which accuracy grows by this factor is a jump."""
CONVERGED = 0.03
"""Accuracy that changes by less than this share has converged."""
ENOUGH = 0.95
"""Share of the best accuracy at which a concept counts as there."""
MIN_PER_CLASS = 10
"""Items of the rarest class; with fewer neither part holds enough of it."""
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class ProbeSet(Section):
    """A labelled text set whose concept is looked for at every depth."""

    path: Text
    """A local .jsonl, .json, .csv or .parquet file, a folder of them, or a Hub data set id."""
    text: str = "text"
    """The column that holds the text."""
    label: str = "label"
    """The column that holds the class: a word, a number, or true and false."""
    split: str = "train"
    """Split of a Hub data set; of a folder the files that are named after it."""
    name: str | None = None
    """Configuration name of a Hub data set."""
    max_items: Positive = 2000
    """Most items; where there are more, so many are drawn by the seed."""
    max_tokens: Positive = 512
    """Tokens of a longer text that are read: its last ones, since the last one's state is probed."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the items that a probe is scored on."""

    @property
    def source(self) -> DataSource:
        """Where the texts come from."""
        return DataSource(self.path, split=self.split, name=self.name)


@dataclass(frozen=True)
class Settings(Section):
    """Which labelled texts are probed."""

    sets: Annotated[tuple[ProbeSet, ...], Field(min_length=1)]
    """Labelled texts whose classes are looked for after every layer."""


@dataclass(frozen=True)
class DepthPoint:
    """A depth, 0 to 1, or None with the reason."""

    depth: float | None
    reason: str = ""


@dataclass(frozen=True)
class ConceptDepth:
    """One set's probes; curves have L + 1 entries, by depth."""

    path: str
    classes: tuple[str, ...]
    """Names of the classes, sorted; F1 is that of the second of two, or the mean over more."""
    num_train: int
    num_test: int
    accuracy: tuple[float, ...]
    """Accuracy on the test part, as F1 and AUC are."""
    accuracy_low: tuple[float, ...]
    accuracy_high: tuple[float, ...]
    """Upper end of the 95 % Wilson interval."""
    f1: tuple[float, ...]
    auc: tuple[float, ...]
    """Area under the ROC curve; with more than two classes the mean of one against the rest."""
    majority: float
    """Accuracy on the test part of always saying the training part's most frequent class."""
    variation: tuple[float | None, ...]
    """Variation b_l = accuracy_l / accuracy_{l-1} for l = 1 to L; None where the one before is 0."""
    jump: DepthPoint
    """First l / L with b_l >= 1.1."""
    converging: DepthPoint
    """Last l / L with |b_l - 1| < 0.03."""
    enough: DepthPoint
    """First l / L with 95 % of the best accuracy."""

    def in_words(self) -> str:
        """One line for the log."""
        best = max(self.accuracy)
        return (
            f"{self.path}: best accuracy {best:.1%} (majority {self.majority:.1%}, n {self.num_test}), 95 % of it at "
            f"depth {self.enough.depth:.2f} of the layers"
        )


@dataclass(frozen=True)
class Probes(Artifact):
    """probes.json: at which depth concepts can be read off."""

    FILE: ClassVar[str] = "probes.json"

    num_layers: int
    sets: tuple[ConceptDepth, ...]

    def in_words(self) -> str:
        """A line per set."""
        return "\n".join(concept.in_words() for concept in self.sets)


def work(run: Run, settings: Settings) -> str:
    """The depth at which every set's classes can be read off, in words."""
    inputs = identity(run, settings, content=sources_fingerprint([probe.source for probe in settings.sets]))

    def probed(provenance: Provenance) -> Probes:
        model, tokenizer, measure = model_of(run), run.tokenizer(), run.recipe.measure
        sets = [
            probe_depth(model, tokenizer, probe, batch_size=measure.batch_size, seed=run.recipe.seed)
            for probe in settings.sets
        ]
        return Probes(provenance, run.num_layers, tuple(sets))

    return told(run, made(run, Probes, inputs, probed, probes_figure))


def probe_depth(
    model: PreTrainedModel, tokenizer: Any, probe_set: ProbeSet, *, batch_size: int, seed: int = 0
) -> ConceptDepth:
    """How well a logistic probe on the last token's raw state tells the classes apart, after every number of layers.

    Features are standardised on the training part alone; the split is stratified and drawn from ``seed``, and a text
    that is there twice counts once. Costs one forward over the texts and L + 1 fits; holds N x (L + 1) x D float32.

    Raises:
        UserError: a set that cannot be read, with one class or too few items, or states that are not finite.
    """
    require_one_path(model)
    items = _items(probe_set, seed)  # a text in both parts of the split would be learnt by heart
    classes = sorted({label for _, label in items})
    labels_N = np.array([classes.index(label) for _, label in items])
    train, test = _stratified(labels_N, probe_set, seed)
    prompts = [_prompt(tokenizer, text, probe_set) for text, _ in items]
    states_NLD = _last_states(model, prompts, batch_size, probe_set.path)
    scores = [
        _score(states_NLD[:, depth], labels_N, train, test)
        for depth in each(range(states_NLD.shape[1]), f"measure: fitting the probe {probe_set.path}", unit="depths")
    ]
    accuracy = tuple(right / len(test) for right, _, _ in scores)
    intervals = [wilson(right, len(test)) for right, _, _ in scores]
    most_frequent = np.bincount(labels_N[train]).argmax()
    return ConceptDepth(
        path=probe_set.path,
        classes=tuple(classes),
        num_train=len(train),
        num_test=len(test),
        accuracy=accuracy,
        accuracy_low=tuple(low for low, _ in intervals),
        accuracy_high=tuple(high for _, high in intervals),
        f1=tuple(f1 for _, f1, _ in scores),
        auc=tuple(auc for _, _, auc in scores),
        majority=float((labels_N[test] == most_frequent).mean()),
        **depth_points(accuracy),
    )


def depth_points(accuracy: Sequence[float]) -> dict[str, Any]:
    """The fields of ConceptDepth that follow from its accuracies, after 0 to L layers."""
    num_layers = len(accuracy) - 1
    variation = tuple(None if before == 0 else after / before for before, after in itertools.pairwise(accuracy))
    known = [(layer, value) for layer, value in enumerate(variation, 1) if value is not None]
    jumps = [layer for layer, value in known if value >= JUMP]
    still = [layer for layer, value in known if abs(value - 1) < CONVERGED]
    enough = [layer for layer, value in enumerate(accuracy) if value >= ENOUGH * max(accuracy)]

    def point(layers: Sequence[int], reason: str = "") -> DepthPoint:
        return DepthPoint(layers[0] / num_layers) if layers else DepthPoint(None, reason)

    return {
        "variation": variation,
        "jump": point(jumps, f"no layer raises the accuracy by a factor of {JUMP}"),
        "converging": point(still[-1:], f"every layer changes the accuracy by {CONVERGED:.0%} or more"),
        "enough": point(enough),
    }


def _items(probe_set: ProbeSet, seed: int) -> list[tuple[str, str]]:
    """Texts and labels, each text once."""
    unique: dict[str, str] = {}
    for text, label in load_labelled(probe_set.source, probe_set.text, probe_set.label):
        unique.setdefault(text, str(label))
    items = list(unique.items())
    if len(items) > probe_set.max_items:
        drawn = np.random.default_rng(seed).choice(len(items), probe_set.max_items, replace=False)
        items = [items[index] for index in sorted(drawn)]
    counts = Counter(label for _, label in items)
    if len(counts) < 2 or min(counts.values()) < MIN_PER_CLASS:
        told = ", ".join(f"{count} of class {label!r}" for label, count in sorted(counts.items()))
        raise UserError(
            f"probe {probe_set.path!r}: column {probe_set.label!r} holds different texts {told or 'of no class'}; a "
            f"probe needs two classes or more with {MIN_PER_CLASS} each"
        )
    return items


def _stratified(labels_N: NDArray[np.int64], probe_set: ProbeSet, seed: int) -> list[NDArray[np.int64]]:
    """Places to train on, and to test on: every class gives its share to the latter, at least one item to each part."""
    order = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels_N):
        members = order.permutation(np.flatnonzero(labels_N == label))
        count = min(max(1, round(len(members) * probe_set.test_share)), len(members) - 1)  # both parts get one
        test.append(members[:count])
        train.append(members[count:])
    return [np.sort(np.concatenate(part)) for part in (train, test)]


def _prompt(tokenizer: Any, text: str, probe_set: ProbeSet) -> Prompt:
    """The text's tokens, its end where it is too long."""
    ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise UserError(f"probe {probe_set.path!r}: {text[:40]!r} tokenises to nothing; leave it out")
    if len(ids) > probe_set.max_tokens:
        # the end is kept, because the last token's state is read; a begin token stays, since models expect one
        starts = [ids[0]] if ids[0] == tokenizer.bos_token_id and probe_set.max_tokens > 1 else []
        ids = [*starts, *ids[len(starts) - probe_set.max_tokens :]]
    return Prompt(tuple(ids))


@torch.no_grad()
def _last_states(model: PreTrainedModel, prompts: Sequence[Prompt], batch_size: int, path: str) -> NDArray[np.float32]:
    """(N, L + 1, D) raw states of the prompts' last tokens."""
    states_NLD: list[Tensor] = [torch.empty(0)] * len(prompts)
    # longest first: rows of a batch are about equally long, and memory that does not suffice shows at once
    by_length = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].input_ids), index))
    with probing(model):
        for start in each(range(0, len(prompts), batch_size), f"measure: states for the probe {path}", unit="batches"):
            chosen = by_length[start : start + batch_size]
            batch = batch_of_prompts([prompts[index] for index in chosen])
            last_B = batch.real_BS.sum(1).to(model.device) - 1
            places = torch.arange(len(last_B), device=model.device), last_B
            with states_at(decoder_layers(model), places) as states:
                run_body(model, batch)
            for index, state_LD in zip(chosen, torch.stack(states, dim=1).float().cpu(), strict=True):
                states_NLD[index] = state_LD
    stacked_NLD = torch.stack(states_NLD)
    require_finite(model, f"probe {path!r}", stacked_NLD)
    return stacked_NLD.numpy()


def _score(
    states_ND: NDArray[np.float32], labels_N: NDArray[np.int64], train: NDArray[np.int64], test: NDArray[np.int64]
) -> tuple[int, float, float]:
    """Right answers, F1 and AUC of one depth's probe on the test part."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score, roc_auc_score
    from sklearn.preprocessing import StandardScaler

    train_ND, test_ND = (states_ND[part].astype(np.float64) for part in (train, test))
    # per unit: a few units of the residual stream are a thousand times as large as the others
    scaler = StandardScaler().fit(train_ND)
    # which warns by itself where it has not converged
    probe = LogisticRegression(max_iter=MAX_ITERATIONS).fit(scaler.transform(train_ND), labels_N[train])
    truth_N, test_ND = labels_N[test], scaler.transform(test_ND)
    said_N, chances_NC = probe.predict(test_ND), probe.predict_proba(test_ND)
    binary = chances_NC.shape[1] == 2
    f1 = f1_score(truth_N, said_N, average="binary" if binary else "macro")
    auc = roc_auc_score(truth_N, chances_NC[:, 1] if binary else chances_NC, multi_class="ovr")
    return int(np.sum(said_N == truth_N)), float(f1), float(auc)


def probes_figure(probes: Probes) -> Figure:
    """One panel per labelled set: accuracy by depth with its 95 % interval, and the majority's."""
    figure, axes = panels([2.4] * len(probes.sets))
    with figure_style():
        for ax, concept in zip(axes, probes.sets, strict=True):
            num_layers, colour = len(concept.accuracy) - 1, SERIES_COLOURS[0]
            depths = range(num_layers + 1)
            ax.fill_between(depths, concept.accuracy_low, concept.accuracy_high, color=colour, alpha=0.25, lw=0)
            ax.plot(depths, concept.accuracy, color=colour, marker="o", markersize=3)
            ax.axhline(concept.majority, color=FAINT, linewidth=1, linestyle="--")
            ax.text(num_layers, concept.majority, "majority", ha="right", va="bottom", fontsize=8, color=INK)
            if concept.enough.depth is not None:
                layer = round(concept.enough.depth * num_layers)
                mark(ax, layer, f"95 % of the best: {concept.enough.depth:.2f}", num_layers)
            ax.set_title(f"{clean(concept.path)[-60:]}: accuracy, n {concept.num_test}")
            layer_axis(ax, num_layers + 1)
            ax.set_xlabel("layers behind the state")
    return figure
