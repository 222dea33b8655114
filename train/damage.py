"""Shares of the training sources by what a cut took from each: measured once, on a sample of each source's own rows.

S sequence, D hidden, N predicted tokens.

Damage says where training has most to bring back, as PASER allots instructions (He et al. 2025, arXiv:2502.12594); how
fast it comes back, it does not say: see pilot.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifacts.artifact import Provenance, differences
from shoal.artifacts.shares import Shares, SourceShare
from shoal.data.packing import IGNORED, PackedRows
from shoal.data.sources import source_names, texts_fingerprint
from shoal.errors import UserError
from shoal.models.load import Checkpoint, logits_from_hidden
from shoal.progress import each
from shoal.recipe.distill import Distill
from shoal.runtime import agreed, barrier, device, free_memory, is_main, rank, together, world_size

from .dataset import inputs_of_rows, training_rows
from .objective.objective import final_hidden

log = logging.getLogger(__name__)

SAMPLE_ROWS = 8
"""Rows of a source that damage is measured on."""
SAMPLE_SEED = 7919
"""Distance of the sample's seed from the training rows': it is drawn in another order, from the same documents."""
FLOOR = 0.1
"""Part of the tokens that is shared by the recipe's weights, whatever was measured."""
HEAD_CHUNK = 256
"""Tokens whose full-vocabulary logits exist at one time."""


def shares_of(weights: Sequence[float], values: Sequence[float]) -> list[float]:
    """Shares that sum to 1: FLOOR of all by the weights, the rest by weight times value; all by weight if no value is
    above 0. So a source whose value is 0 keeps FLOOR of what the weights give it."""
    total = math.fsum(weights)
    worth = [weight * value for weight, value in zip(weights, values, strict=True)]
    if not any(worth):
        return [weight / total for weight in weights]
    whole = math.fsum(worth)
    return [FLOOR * weight / total + (1 - FLOOR) * part / whole for weight, part in zip(weights, worth, strict=True)]


def split_by_ability(settings: Distill) -> Distill:
    """``settings`` with one source for every ability where a source mixes them."""
    return replace(settings, data=tuple(part for source in settings.data for part in source.parts))


def by_damage(
    settings: Distill,
    teacher: Checkpoint,
    student: Checkpoint | None,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    file: Path,
    folder: Path,
    inputs: dict[str, Any],
) -> Distill:
    """``settings`` with shares by damage for the weights of its sources. Every rank calls this.

    Shares are those of ``file`` where the same cut, data and seed made it, and measured and written there otherwise.
    ``student`` None = read them, whoever has measured. ``texts`` is what stands for the source `teacher_text`,
    ``folder`` that of packed rows, ``inputs`` the identity of the training.

    Raises:
        UserError: nobody has measured and there is no student, or nats that are not finite.
    """
    if student is not None:
        keys = ("model", "student", "prune.drop", "dtype", "attention")
        identity = {key: inputs[key] for key in keys} | {"teacher_text": texts_fingerprint(texts)}
        identity |= {**inputs_of_rows(settings, inputs), "sample_rows": SAMPLE_ROWS}
        if not agreed(lambda: _is_known(file, identity)):
            measured = _measured(settings, teacher, student, tokenizer, texts, folder=folder, inputs=inputs)
            if is_main():
                Shares(Provenance(identity), measured).write(file)
            barrier()
    elif not file.is_file():
        raise UserError(
            f"{file}: is gone, and the rows of this training follow from it; delete distill.json beside it, which "
            "trains the student again, or choose another run_dir"
        )
    shares = Shares.read(file)
    for share in shares.sources:
        log.info(
            "data: %s: %.3f nats per token, %.3f once cut: %.1f %% of the tokens (%.1f %% by the recipe's weights)",
            *(share.source, share.teacher_nats, share.student_nats, 100 * share.share, 100 * share.weight),
        )
    data = zip(settings.data, shares.shares, strict=True)
    return replace(settings, data=tuple(replace(source, weight=share) for source, share in data))


def _is_known(file: Path, identity: dict[str, Any]) -> bool:
    if not file.is_file():
        return False
    changed = differences(identity, Shares.read(file).provenance.inputs)
    if changed:
        log.info("data: %s is out of date (%s), measuring again", file.name, "; ".join(changed))
    return not changed


def _measured(
    settings: Distill,
    teacher: Checkpoint,
    student: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    folder: Path,
    inputs: dict[str, Any],
) -> tuple[SourceShare, ...]:
    samples = sample_rows(settings, tokenizer, texts, folder=folder, inputs=inputs)
    nats = []
    for role, checkpoint in (("teacher", teacher), ("pruned student", student)):
        nats.append(nats_by_source(checkpoint.model(device=device()), samples, label=f"damage: {role}"))
        free_memory()
    weights = [source.weight for source in settings.data]
    shares = shares_of(weights, [max(0.0, after - before) for before, after in zip(*nats, strict=True)])
    counts = [int((rows.labels_NS != IGNORED).sum()) for rows in samples]
    parts = [weight / math.fsum(weights) for weight in weights]
    names = source_names(settings.data)
    return tuple(map(SourceShare, names, parts, *nats, counts, shares))


def sample_rows(
    settings: Distill,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    folder: Path,
    inputs: dict[str, Any],
) -> list[PackedRows]:
    """SAMPLE_ROWS packed rows of every source, kept in ``folder`` as training rows are."""
    samples = []
    for source in settings.data:
        alone = replace(
            settings, data=(replace(source, weight=1.0),), num_tokens=SAMPLE_ROWS * settings.sequence_length
        )
        seed = inputs["seed"] + SAMPLE_SEED
        identity = inputs_of_rows(alone, {**inputs, "seed": seed})
        rows = partial(training_rows, alone, tokenizer, num_rows=SAMPLE_ROWS, seed=seed, folder=folder)
        samples.append(rows(teacher_text=texts, inputs=identity))
    return samples


def nats_by_source(model: PreTrainedModel, samples: Sequence[PackedRows], *, label: str) -> list[float]:
    """Mean nats per learnt token of every sample, the same on every rank. All ranks call this with whole models.

    Rows are dealt to the ranks and read one by one, so that their number changes no bit.

    Raises:
        UserError: nats that are not finite.
    """
    rows = [(number, row) for number, sample in enumerate(samples) for row in range(len(sample))]
    own, was_training = rows[rank() :: world_size()], model.training
    model.eval()
    by_place = {place: _row_nats(model, samples[place[0]], place[1]) for place in each(own, label, unit="rows")}
    model.train(was_training)
    nats = {place: value for part in together(lambda: by_place) for place, value in part.items()}
    means = []
    for number, sample in enumerate(samples):
        total = math.fsum(nats[number, row] for row in range(len(sample)))
        means.append(total / int((sample.labels_NS != IGNORED).sum()))
    if not all(map(math.isfinite, means)):
        raise UserError(
            f"{label}: nats per token are {means} in {model.dtype}; set dtype: float32, or look for damaged weights"
        )
    return means


@torch.inference_mode()
def _row_nats(model: PreTrainedModel, rows: PackedRows, row: int) -> float:
    """The sum over the learnt tokens of one row."""
    to_logits, head = logits_from_hidden(model, prepared=True), model.get_output_embeddings()
    assert head is not None
    item = {key: value.to(model.device) for key, value in rows[row].items()}
    hidden_SD: Tensor = final_hidden(model, item["input_ids"][None], item["position_ids"][None])[0]
    label_S = item["labels"][1:]
    learnt_S = label_S != IGNORED
    sums = [
        cross_entropy(to_logits(hidden_ND, head).float(), label_N, reduction="none").double().sum()
        for hidden_ND, label_N in zip(
            hidden_SD[:-1][learnt_S].split(HEAD_CHUNK), label_S[learnt_S].split(HEAD_CHUNK), strict=True
        )
    ]
    return float(torch.stack(sums).sum())
