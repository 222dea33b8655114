"""At which depth a concept can be read off: logistic probes on every layer's states (arXiv:2404.07066).

N items, D hidden, L layers. Depth l is the state after l layers: 0 = embeddings, L = what the final norm gets.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.depth import ConceptDepth, DepthPoint
from shoal.data.sources import load_labelled
from shoal.errors import UserError
from shoal.progress import each
from shoal.recipe.measure import ProbeSet
from shoal.stats.intervals import wilson

from ..edits.sublayers import probing
from .runs import Prompt, batch_of_prompts, require_one_path, run_body, states_at

log = logging.getLogger(__name__)

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
class _Split:
    train: NDArray[np.int64]
    test: NDArray[np.int64]


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
    items, num_repeated = _items(probe_set, seed)  # a text in both parts of the split would be learnt by heart
    classes = sorted({label for _, label in items})
    labels_N = np.array([classes.index(label) for _, label in items])
    split = _stratified(labels_N, probe_set, seed)
    prompts = [_prompt(tokenizer, text, probe_set) for text, _ in items]
    states_NLD = _last_states(model, [prompt for prompt, _ in prompts], batch_size, probe_set.path)
    scores = [
        _score(states_NLD[:, depth], labels_N, split, probe_set.path)
        for depth in each(range(states_NLD.shape[1]), f"measure: fitting the probe {probe_set.path}", unit="depths")
    ]
    accuracy = tuple(right / len(split.test) for right, _, _ in scores)
    intervals = [wilson(right, len(split.test)) for right, _, _ in scores]
    most_frequent = np.bincount(labels_N[split.train]).argmax()
    return ConceptDepth(
        path=probe_set.path,
        classes=tuple(classes),
        num_train=len(split.train),
        num_test=len(split.test),
        num_repeated=num_repeated,
        num_shortened=sum(shortened for _, shortened in prompts),
        accuracy=accuracy,
        accuracy_low=tuple(low for low, _ in intervals),
        accuracy_high=tuple(high for _, high in intervals),
        f1=tuple(f1 for _, f1, _ in scores),
        auc=tuple(auc for _, _, auc in scores),
        majority=float((labels_N[split.test] == most_frequent).mean()),
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


def _items(probe_set: ProbeSet, seed: int) -> tuple[list[tuple[str, str]], int]:
    """Texts and labels, each text once, and how many were left out for being repeated."""
    read = load_labelled(probe_set.source, probe_set.label)
    unique: dict[str, str] = {}
    for text, label in read:
        unique.setdefault(text, str(label))
    items = list(unique.items())
    if len(items) > probe_set.max_items:
        drawn = np.random.default_rng(seed).choice(len(items), probe_set.max_items, replace=False)
        items = [items[index] for index in sorted(drawn)]
    counts = Counter(label for _, label in items)
    if len(counts) < 2:
        only = ", ".join(counts) or "none"
        raise UserError(
            f"probe {probe_set.path!r}: column {probe_set.label!r} holds one class only ({only}); a probe "
            "tells classes apart, name a set with two or more"
        )
    rarest = min(counts, key=lambda label: (counts[label], label))
    if counts[rarest] < MIN_PER_CLASS:
        raise UserError(
            f"probe {probe_set.path!r}: class {rarest!r} has {counts[rarest]} items among {len(items)} different texts;"
            f" every class needs {MIN_PER_CLASS}"
        )
    return items, len(read) - len(unique)


def _stratified(labels_N: NDArray[np.int64], probe_set: ProbeSet, seed: int) -> _Split:
    """Every class gives its share to the test part, at least one item to each part."""
    order = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels_N):
        members = order.permutation(np.flatnonzero(labels_N == label))
        count = min(max(1, round(len(members) * probe_set.test_share)), len(members) - 1)  # both parts get one
        test.append(members[:count])
        train.append(members[count:])
    return _Split(np.sort(np.concatenate(train)), np.sort(np.concatenate(test)))


def _prompt(tokenizer: Any, text: str, probe_set: ProbeSet) -> tuple[Prompt, bool]:
    """The text's tokens, its end where it is too long, and whether it was."""
    ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise UserError(f"probe {probe_set.path!r}: {text[:40]!r} tokenises to nothing; leave it out")
    shortened = len(ids) > probe_set.max_tokens
    if shortened:
        # the end is kept, because the last token's state is read; a begin token stays, since models expect one
        starts = [ids[0]] if ids[0] == tokenizer.bos_token_id and probe_set.max_tokens > 1 else []
        ids = [*starts, *ids[len(starts) - probe_set.max_tokens :]]
    return Prompt(tuple(ids), 0), shortened


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
            with states_at(model, torch.arange(len(last_B), device=model.device), last_B) as states:
                run_body(model, batch)
            for index, state_LD in zip(chosen, torch.stack(states, dim=1).float().cpu(), strict=True):
                states_NLD[index] = state_LD
    stacked_NLD = torch.stack(states_NLD)
    if not bool(stacked_NLD.isfinite().all()):
        raise UserError(
            f"probe {path!r}: the model's states overflow in {model.dtype}; set dtype: bfloat16 or dtype: float32 in "
            "the recipe"
        )
    return stacked_NLD.numpy()


def _score(
    states_ND: NDArray[np.float32], labels_N: NDArray[np.int64], split: _Split, path: str
) -> tuple[int, float, float]:
    """Right answers, F1 and AUC of one depth's probe on the test part."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score, roc_auc_score
    from sklearn.preprocessing import StandardScaler

    train_ND, test_ND = (states_ND[part].astype(np.float64) for part in (split.train, split.test))
    # per unit: a few units of the residual stream are a thousand times as large as the others
    scaler = StandardScaler().fit(train_ND)
    probe = LogisticRegression(max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(scaler.transform(train_ND), labels_N[split.train])
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        log.warning("probe %r: a fit stopped after %d iterations before it converged", path, MAX_ITERATIONS)
    truth_N, test_ND = labels_N[split.test], scaler.transform(test_ND)
    said_N, chances_NC = probe.predict(test_ND), probe.predict_proba(test_ND)
    binary = chances_NC.shape[1] == 2
    f1 = f1_score(truth_N, said_N, average="binary" if binary else "macro")
    auc = roc_auc_score(truth_N, chances_NC[:, 1] if binary else chances_NC, multi_class="ovr")
    return int(np.sum(said_N == truth_N)), float(f1), float(auc)
