"""Train the run's student on the teacher's attention, on its values or on pooled states, beside the recipe's losses.

B batch, S sequence, D hidden, N counted tokens, W windows, C a chunk of queries, K keys, H query heads, G key-value
heads, d size of a head.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.launch.verbs.run import Run
from shoal.models.document_masks import document_starts
from shoal.recipe.distill import Recorded
from shoal.recipe.losses import HiddenStates, StateTerm
from shoal.recipe.section import Section
from shoal.train.objective.host_batch import queued
from shoal.train.objective.layer_losses import Captured, StateLosses, Tokens, again, distances, pairs_with, widened

from .attention.calls import AttentionInputs, attention_calls
from .local_heal import described, train

WINDOW = 4
"""Neighbouring tokens of a document whose states are averaged where a term is multi-scale."""
SCORES = 1 << 24
"""Most scores of one relation (heads x queries x keys) that exist at one time."""
REMEDY = "take attention_relation and value_relation out of the terms"


@dataclass(frozen=True, kw_only=True)
class AttentionRelation(StateTerm):
    """KL between teacher's and student's attention distributions over the tokens that a layer sees."""

    kind: Literal["attention_relation"] = "attention_relation"


@dataclass(frozen=True, kw_only=True)
class ValueRelation(StateTerm):
    """KL between teacher's and student's softmax(V V^T / sqrt(d)) (MiniLM, Wang et al. 2020, arXiv:2002.10957)."""

    kind: Literal["value_relation"] = "value_relation"


@dataclass(frozen=True, kw_only=True)
class MultiScale(StateTerm):
    """States as hidden_states compares them; early layers match those of tokens, the upper half of the student those
    pooled over neighbouring tokens (Wang et al. 2023, arXiv:2303.05251)."""

    kind: Literal["multi_scale"] = "multi_scale"
    map: Literal["gap_closing", "own"] = "gap_closing"
    """As hidden_states has it."""
    distance: Literal["mse", "cosine"] = "mse"
    """As hidden_states has it."""

    @property
    def plain(self) -> HiddenStates:
        """The term that compares tokens everywhere."""
        return HiddenStates(weight=self.weight, layers=self.layers, map=self.map, distance=self.distance)


Relation = AttentionRelation | ValueRelation
Term = Annotated[Relation | MultiScale, Field(discriminator="kind")]


@dataclass(frozen=True)
class Settings(Section):
    """What is trained on beside the recipe's losses."""

    terms: Annotated[tuple[Term, ...], Field(min_length=1)] = (AttentionRelation(),)
    """Terms; relations compare a layer with the same one of the teacher, if no layers are named the last (MiniLM)."""


def work(run: Run, settings: Settings) -> str:
    """Train the run's student with these terms into lab/relations; say what became of it.

    Raises:
        UserError: compiled layers or recorded signals beside relations.
    """
    distill = run.recipe.distill
    if any(isinstance(term, Relation) for term in settings.terms):
        if distill.trainer.get("torch_compile"):
            raise UserError("distill.trainer.torch_compile: compiled layers show no attention; set it to false")
        if isinstance(distill.teacher, Recorded):
            raise UserError("distill.teacher: recorded signals hold no attention; set it to live")
    spec, inputs = described(run, "relations", settings)
    spec = dataclasses.replace(
        spec, settings=spec.settings.with_losses(lambda losses: (*losses, *settings.terms)), state_losses=RelationLosses
    )
    return train(run, spec, inputs, run.dir / "lab" / "relations")


@dataclass
class Attended(Captured):
    """Raw states, and what attention was computed from, by layer of the model that ran."""

    attention: dict[int, AttentionInputs] = field(default_factory=dict)


@dataclass(frozen=True)
class Neighbours(Tokens):
    """Which tokens count, and what lies next to each other."""

    document_BS: Tensor
    """Number of every token's document."""
    per_window_W: Tensor
    """Counted tokens of every window that has some. Windows are tokens 0 to 3, 4 to 7, ... of a document."""

    @classmethod
    def of(cls, labels_BS: Tensor, position_ids_BS: Tensor, device: torch.device) -> Neighbours:
        plain, first_BS = Tokens.of(labels_BS, position_ids_BS, device), document_starts(position_ids_BS)
        # a running number of windows over the flattened tokens: one begins with a document and at every WINDOW tokens
        window = (first_BS | (position_ids_BS % WINDOW == 0)).flatten().cumsum(0)
        places = torch.tensor(plain.counted, dtype=torch.long, device=window.device)
        _, per_window_W = window[places].unique_consecutive(return_counts=True)
        next_to = (queued(values, device) for values in (first_BS.cumsum(1), per_window_W))
        return cls(plain.counted_N, plain.counted, *next_to)

    def between(self, start: int, end: int) -> Tensor:
        """The places from ``start`` to ``end`` of the flattened (B x S) that count, from ``start`` on."""
        # found in the host's copy: asking the device's for a place would wait for it
        return self.counted_N[bisect_left(self.counted, start) : bisect_left(self.counted, end)] - start


class RelationLosses(StateLosses):
    """The core's losses on states, and these."""

    @property
    def _attended(self) -> tuple[set[int], set[int]]:
        """Layers of student and teacher whose attention is compared."""
        pairs = [pair for term in self.terms if isinstance(term, Relation) for pair in self.pairs(term)]
        return {layer for layer, _ in pairs}, {target for _, target in pairs}

    def pairs(self, term: StateTerm) -> tuple[tuple[int, int], ...]:
        if not isinstance(term, Relation):
            return super().pairs(term.plain if isinstance(term, MultiScale) else term)
        own = [layer for layer in range(len(self.plan.keep)) if layer not in self.plan.new_layers]
        return pairs_with(term, self.plan.keep, own[-1:], num_shared=self.num_shared)

    @contextmanager
    def capturing_student(self) -> Iterator[Captured]:
        with super().capturing_student() as seen, _attending(self.student, self._attended[0], seen) as both:
            yield both

    @contextmanager
    def capturing_teacher(self) -> Iterator[Captured]:
        assert self.teacher is not None
        with super().capturing_teacher() as seen, _attending(self.teacher, self._attended[1], seen) as both:
            yield both

    def tokens(self, labels_BS: Tensor, position_ids_BS: Tensor, device: torch.device) -> Neighbours:
        return Neighbours.of(labels_BS, position_ids_BS, device)

    def pair_sum(
        self, term: StateTerm, pair: tuple[int, int], student: Captured, teacher: Captured, tokens: Tokens
    ) -> Tensor:
        assert isinstance(tokens, Neighbours)
        if isinstance(term, MultiScale):
            if 2 * pair[0] < len(self.plan.keep):
                return super().pair_sum(term.plain, pair, student, teacher, tokens)
            return again(_pooled_sum, *self.states(pair, student, teacher), tokens, term.distance)
        if not isinstance(term, Relation):
            return super().pair_sum(term, pair, student, teacher, tokens)
        assert isinstance(student, Attended)
        assert isinstance(teacher, Attended)
        ours, theirs = student.attention[pair[0]], teacher.attention[pair[1]]
        if isinstance(term, ValueRelation):
            ours, theirs = _of_values(ours), _of_values(theirs)
        return _relation_sum(ours, theirs, tokens)


@contextmanager
def _attending(model: PreTrainedModel, layers: set[int], seen: Captured) -> Iterator[Attended]:
    """What is ``seen`` of a forward pass, with the inputs of the attention of ``layers``.

    Raises:
        UserError: a layer whose attention does not go through transformers' attention interface.
    """
    both = Attended(seen.states)
    # checkpointing shows a layer a second time
    with attention_calls(model, layers, both.attention.setdefault, remedy=REMEDY):
        yield both
    if missing := sorted(layers - both.attention.keys()):
        raise UserError(
            f"{model.config.model_type}: layer {missing[0]} has no attention that shoal can look into (no softmax "
            f"attention, or not by transformers' attention interface); name other layers, or {REMEDY}"
        )


def _pooled_sum(student_BSD: Tensor, teacher_BSD: Tensor, tokens: Neighbours, distance: str) -> Tensor:
    """Every counted token has the distance of its window's mean states; a window's mean is that of its counted tokens.

    Coarser targets for late layers: local multi-scale reconstruction (Wang et al. 2023, arXiv:2303.05251).
    """
    if not len(tokens.per_window_W):
        return distances(tokens.of_states(student_BSD), tokens.of_states(teacher_BSD), distance).sum()
    ours_WD, theirs_WD = (
        # unsafe: a look at the lengths would wait for the device
        torch.segment_reduce(tokens.of_states(states_BSD), "mean", lengths=tokens.per_window_W, unsafe=True)
        for states_BSD in (student_BSD, teacher_BSD)
    )
    # weighted by its counted tokens, so that a term's sum stays one over tokens
    return (distances(ours_WD, theirs_WD, distance) * tokens.per_window_W).sum()


def _of_values(inputs: AttentionInputs) -> AttentionInputs:
    """Attention of the values themselves (MiniLM, Wang et al. 2020, arXiv:2002.10957, equation 5)."""
    value_BGSd = inputs.value_BGSd
    scale = value_BGSd.shape[-1] ** -0.5
    return dataclasses.replace(inputs, query_BHSd=value_BGSd, key_BGSd=value_BGSd, scale=scale, softcap=None)


def _relation_sum(student: AttentionInputs, teacher: AttentionInputs, tokens: Neighbours) -> Tensor:
    """KL(teacher || student) of every counted token's distribution over the tokens it sees, mean over heads, in nats.

    What it sees is what the teacher's layer sees; no sink takes its share. Queries come in chunks whose scores are not
    kept, so that memory does not grow with S squared.
    """
    # the R heads of a group read the same keys
    ours_BGRSd, theirs_BGRSd = (own.query_BHSd.unflatten(1, (own.key_BGSd.shape[1], -1)) for own in (student, teacher))
    if ours_BGRSd.shape[:4] != theirs_BGRSd.shape[:4]:
        raise UserError(
            f"attention: the student's heads {tuple(ours_BGRSd.shape[1:3])} are not the teacher's "
            f"{tuple(theirs_BGRSd.shape[1:3])}; {REMEDY}"
        )
    batch, num_groups, num_readers, length, _ = ours_BGRSd.shape
    step = max(1, SCORES // (num_groups * num_readers * length))
    seen_BSS = None if teacher.seen_B1SS is None else teacher.seen_B1SS.squeeze(1).expand(batch, -1, -1)
    total = widened(ours_BGRSd)[..., :0, :].sum()
    for row in range(batch):
        for start in range(0, length, step):
            end = min(start + step, length)
            counted = tokens.between(row * length + start, row * length + end)
            if not len(counted):
                continue
            total = total + again(
                _chunk_sum,
                ours_BGRSd[row, :, :, start:end],
                student.key_BGSd[row, :, :end],
                theirs_BGRSd[row, :, :, start:end].detach(),
                teacher.key_BGSd[row, :, :end].detach(),
                (tokens.document_BS[row, :end], None if seen_BSS is None else seen_BSS[row, start:end, :end]),
                counted,
                (student, teacher),
            )
    return total


def _chunk_sum(
    x_GRCd: Tensor,
    y_GKd: Tensor,
    teacher_x_GRCd: Tensor,
    teacher_y_GKd: Tensor,
    visible: tuple[Tensor, Tensor | None],
    counted_N: Tensor,
    relations: tuple[AttentionInputs, AttentionInputs],
) -> Tensor:
    ours, theirs = relations  # for scale and softcap alone: their vectors are cut to the chunk above
    document_K, seen_CK = visible
    if seen_CK is None:  # what stands in a query's document and not after it
        key_K = torch.arange(len(document_K), device=document_K.device)
        queries = slice(len(document_K) - x_GRCd.shape[2], None)
        seen_CK = (key_K[queries, None] >= key_K) & (document_K[queries, None] == document_K)
    student_GRCK = _log_relation(x_GRCd, y_GKd, seen_CK, ours)
    teacher_GRCK = _log_relation(teacher_x_GRCd, teacher_y_GKd, seen_CK, theirs)
    kl_GRCK = functional.kl_div(student_GRCK, teacher_GRCK, reduction="none", log_target=True)
    return kl_GRCK.sum(-1).mean((0, 1))[counted_N].sum()


def _log_relation(x_GRCd: Tensor, y_GKd: Tensor, seen_CK: Tensor, how: AttentionInputs) -> Tensor:
    scores_GRCK = x_GRCd @ y_GKd.unsqueeze(1).mT * how.scale
    if how.softcap is not None:
        scores_GRCK = how.softcap * torch.tanh(scores_GRCK / how.softcap)
    # not -inf: log p - log q of what nobody sees would be NaN
    return scores_GRCK.masked_fill(~seen_CK, torch.finfo(scores_GRCK.dtype).min).log_softmax(-1)
