"""Losses on what happens inside the layers: hidden states, attention and value relations, as sums over tokens.

Which student layer answers to which teacher layer follows from the plan. What is compared comes from capture.py, or
from a recording. All arithmetic is at least float32, whatever the models' precision.

B batch, S sequence, D hidden, N counted tokens, W windows, C a chunk of queries, K keys, H query heads, G key-value
heads, d size of a head.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shoal.artifacts.plan import PruningPlan
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, text_config
from shoal.models.attention_calls import AttentionInputs
from shoal.models.document_masks import document_starts
from shoal.recipe.edits import Merge, Replace
from shoal.recipe.losses import AttentionRelation, HiddenStates, StateTerm

from .capture import Captured, capturing
from .host_batch import learnt_places, queued

WINDOW = 4
"""Neighbouring tokens of a document whose states are averaged where a term is multi-scale."""
SCORES = 1 << 24
"""Most scores of one relation (heads x queries x keys) that exist at one time."""


def layer_map(plan: PruningPlan, kind: Literal["gap_closing", "own"]) -> tuple[int, ...]:
    """For every student layer the teacher layer after which its target state is found.

    `own`: the layer itself; for a merged or replaced run its last one, since the run's new layer stands for all of it.
    `gap_closing`: the layer before the next kept one, for the last student layer the teacher's last. The two differ
    only where layers are dropped: there `gap_closing` asks the layer before the gap for what comes after it, which is
    LLM-Streamline's target (arXiv:2403.19135) for every gap.
    """
    if kind == "gap_closing":
        ends = (*(after - 1 for after in plan.keep[1:]), plan.num_layers - 1)
        # a layer below a new one has its own state: what comes after is the new one's work
        return tuple(map(max, plan.keep, ends))
    ends = {edit.layers[0]: edit.layers[-1] for edit in plan.edits if isinstance(edit, Merge | Replace)}
    return tuple(ends.get(layer, layer) for layer in plan.keep)


def layer_pairs(term: StateTerm, plan: PruningPlan, *, num_shared: int = 0) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) of every comparison that ``term`` makes.

    Layers that a term does not name are: for hidden states all from the first whose pair is not equal from the start;
    for relations, which are compared with the same layer in the teacher, the last one, as MiniLM does
    (arXiv:2002.10957). New layers stand for none of the teacher's and are passed over, unless they are named. Below
    ``num_shared`` the student is the teacher and frozen: nothing there could be learnt.

    Raises:
        UserError: a layer that the student does not have, or no layer left.
    """
    num_layers = len(plan.keep)
    named, own = term.layers, [layer for layer in range(num_layers) if layer not in plan.new_layers]
    if named and max(named) >= num_layers:
        raise UserError(
            f"{term.kind}: layers: the student has {num_layers} layers, 0 to {num_layers - 1} (got {max(named)}); name "
            "only these"
        )
    if isinstance(term, HiddenStates):
        targets = layer_map(plan, term.map)
        changed = plan.first_change if plan.changes_layers else 0
        chosen = [s for s in own if s != targets[s] or s >= changed] if named is None else sorted(named)
    else:
        targets = plan.keep
        chosen = [own[-1]] if named is None else sorted(named)
    pairs = tuple((layer, targets[layer]) for layer in chosen if layer >= num_shared)
    if not pairs:
        raise UserError(
            f"{term.kind}: layers: all below the first cut, where the student is the frozen teacher (got {chosen}); "
            f"name layers from {num_shared} to {num_layers - 1}, or train them too"
        )
    return pairs


class StateLosses:
    """The state terms of a run: what to capture of student and teacher, and the loss of what was captured.

    ``teacher`` is None where its states are recorded. ``num_shared`` are the lowest layers that student and teacher
    share (SharedPrefix) or that are frozen copies.

    Raises:
        UserError: a plan that does not belong to these models, layers that do not exist, relations without a teacher.
    """

    def __init__(
        self,
        terms: Sequence[StateTerm],
        plan: PruningPlan,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        num_shared: int = 0,
    ) -> None:
        _check(terms, plan, student, teacher)
        self.terms = tuple(terms)
        self._student, self._teacher, self._plan = student, teacher, plan
        self._num_layers = len(plan.keep)
        self._pairs = tuple(layer_pairs(term, plan, num_shared=num_shared) for term in terms)
        states = [pair for term, pairs in self._of_terms() if isinstance(term, HiddenStates) for pair in pairs]
        attention = [pair for term, pairs in self._of_terms() if not isinstance(term, HiddenStates) for pair in pairs]
        # one capture serves all terms: the union of what they compare, side 0 the student's and side 1 the teacher's
        self.student_layers, self.teacher_layers = (tuple(sorted({pair[side] for pair in states})) for side in (0, 1))
        """Layers whose raw states are compared."""
        self.student_attention, self.teacher_attention = (
            tuple(sorted({pair[side] for pair in attention})) for side in (0, 1)
        )
        """Layers whose attention is compared."""

    def capturing_student(self) -> AbstractContextManager[Captured]:
        """What the terms need of one forward pass of the student, with its graph."""
        return capturing(self._student, self.student_layers, self.student_attention)

    def capturing_teacher(self) -> AbstractContextManager[Captured]:
        """What the terms need of one forward pass of the teacher."""
        assert self._teacher is not None
        return capturing(self._teacher, self.teacher_layers, self.teacher_attention)

    def __call__(
        self,
        student: Captured,
        teacher: Captured,
        labels: Tensor | Sequence[Tensor],
        position_ids_BS: Tensor,
        *,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of all terms over the counted tokens (scalar), and each term's own unweighted sum, float64.

        A token counts if its next one is supervised, as for the head, and if it is not its document's first: that one
        holds attention sinks, states of a hundred times the norm that say nothing. A term is the mean over its pairs.
        What is between states and loss is computed again in backward, so that only the states themselves are kept.
        ``labels`` (B, S) are those of all terms, or of each. ``device`` is where the states are, if labels and
        positions are still on the host.

        Raises:
            UserError: no gradient would reach the student.
        """
        device = device or position_ids_BS.device
        labels = [labels] * len(self.terms) if isinstance(labels, Tensor) else labels
        # by identity: terms that learn from the same tokens are given the same tensor
        tokens_by_labels = {id(each_BS): Tokens.of(each_BS, position_ids_BS, device) for each_BS in labels}
        loss = torch.zeros((), device=device)
        sums: list[Tensor] = []
        for (term, pairs), labels_BS in zip(self._of_terms(), labels, strict=True):
            tokens = tokens_by_labels[id(labels_BS)]
            # a term of weight 0 is computed for its curve alone
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight > 0):
                total = torch.stack([self._pair_sum(term, *pair, student, teacher, tokens) for pair in pairs]).mean()
            if torch.is_grad_enabled() and term.weight > 0 and not total.requires_grad:
                raise UserError(
                    f"{term.kind}: no gradient reaches the student: all it looks at is frozen; train these layers, or "
                    "set weight: 0. Relations also need gradient checkpointing with use_reentrant: false"
                )
            loss = loss + term.weight * total
            sums.append(total.detach().double())  # added up over a whole step, where fp32 would lose digits
        return loss, torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device=device)

    def _of_terms(self) -> Iterator[tuple[StateTerm, tuple[tuple[int, int], ...]]]:
        return zip(self.terms, self._pairs, strict=True)

    def _pair_sum(
        self, term: StateTerm, layer: int, target: int, student: Captured, teacher: Captured, tokens: Tokens
    ) -> Tensor:
        if isinstance(term, HiddenStates):
            # where factors make up for dropped layers, the student's states are smaller than those they stand for
            ours_BSD = (
                student.states[layer] * scale
                if (scale := self._plan.state_scale(target)) != 1
                else student.states[layer]
            )
            states_BSD = (ours_BSD, teacher.states[target].detach())
            # only the upper half of the student looks at coarser targets
            pooled = term.multi_scale and 2 * layer >= self._num_layers
            return _again(_pooled_sum if pooled else _token_sum, *states_BSD, tokens, term.distance)
        sides = (student.attention[layer], teacher.attention[target])
        return _relation_sum(*sides, tokens, _queries_keys if isinstance(term, AttentionRelation) else _values)


@dataclass(frozen=True)
class Tokens:
    """Which tokens count, and what lies next to each other."""

    counted_N: Tensor
    """Places of counted tokens in the flattened (B x S), rising."""
    document_BS: Tensor
    """Number of every token's document."""
    per_window_W: Tensor
    """Counted tokens of every window that has some. Windows are tokens 0 to 3, 4 to 7, ... of a document."""
    counted: list[int]
    """counted_N, for decisions that must not wait for the device."""

    @classmethod
    def of(cls, labels_BS: Tensor, position_ids_BS: Tensor, device: torch.device) -> Tokens:
        """For use on ``device``, where it need not be asked anything if labels and positions are on the host."""
        first_BS = document_starts(position_ids_BS)
        learnt_N = learnt_places(labels_BS)
        counted_N = learnt_N[~first_BS.flatten()[learnt_N]]
        # a running number of windows over the flattened tokens: one begins with a document and at every WINDOW tokens
        window = (first_BS | (position_ids_BS % WINDOW == 0)).flatten().cumsum(0)
        _, per_window_W = window[counted_N].unique_consecutive(return_counts=True)
        on_device = (queued(values, device) for values in (counted_N, first_BS.cumsum(1), per_window_W))
        return cls(*on_device, counted=counted_N.tolist())

    def of_states(self, states_BSD: Tensor) -> Tensor:
        """The states of the tokens that count, (N, D)."""
        return states_BSD.flatten(0, 1)[self.counted_N]

    def between(self, start: int, end: int) -> Tensor:
        """The places from ``start`` to ``end`` of the flattened (B x S) that count, from ``start`` on."""
        # found in the host's copy: asking the device's for a place would wait for it
        return self.counted_N[bisect_left(self.counted, start) : bisect_left(self.counted, end)] - start


def _check(
    terms: Sequence[StateTerm], plan: PruningPlan, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> None:
    models = {"student": (student, len(plan.keep)), **({"teacher": (teacher, plan.num_layers)} if teacher else {})}
    for role, (model, expected) in models.items():
        if len(decoder_layers(model)) != expected:
            raise UserError(
                f"{role}: has {len(decoder_layers(model))} layers, but {expected} by plan.json; run shoal prune again, "
                "or take hidden_states and relations out of distill.losses"
            )
    if teacher is None:
        relations = [term.kind for term in terms if not isinstance(term, HiddenStates)]
        if relations:
            raise UserError(
                f"{relations[0]}: is not in recorded signals, which hold states only; take it out of distill.losses, "
                "or train with the teacher itself"
            )
    elif (ours := text_config(student.config).hidden_size) != (theirs := text_config(teacher.config).hidden_size):
        raise UserError(
            f"student: hidden size {ours}, the teacher's is {theirs}; states cannot be compared: take hidden_states "
            "and relations out of distill.losses"
        )


def _again(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """The function's value; nothing of what it computes is kept for backward, which computes it again."""
    return checkpoint(_in_full_precision, function, *arguments, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


def _in_full_precision(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.autocast(device.type, enabled=False):
        return function(
            *(_full(each) if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments)
        )


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _token_sum(student_BSD: Tensor, teacher_BSD: Tensor, tokens: Tokens, distance: str) -> Tensor:
    return distances(tokens.of_states(student_BSD), tokens.of_states(teacher_BSD), distance).sum()


def _pooled_sum(student_BSD: Tensor, teacher_BSD: Tensor, tokens: Tokens, distance: str) -> Tensor:
    """Every counted token has the distance of its window's mean states; a window's mean is that of its counted tokens.

    Coarser targets for late layers: local multi-scale reconstruction (Wang et al. 2023, arXiv:2303.05251).
    """
    if not len(tokens.per_window_W):
        return _token_sum(student_BSD, teacher_BSD, tokens, distance)
    ours_WD, theirs_WD = (
        # unsafe: a look at the lengths would wait for the device
        torch.segment_reduce(tokens.of_states(states_BSD), "mean", lengths=tokens.per_window_W, unsafe=True)
        for states_BSD in (student_BSD, teacher_BSD)
    )
    # weighted by its counted tokens, so that a term's sum stays one over tokens
    return (distances(ours_WD, theirs_WD, distance) * tokens.per_window_W).sum()


def distances(student_ND: Tensor, teacher_ND: Tensor, distance: str) -> Tensor:
    """Distances (N,) of pairs of states (N, D): squared error relative to the teacher's squared norm (`mse`), or 1 -
    cosine."""
    if distance == "mse":
        smallest = torch.finfo(teacher_ND.dtype).tiny
        return (student_ND - teacher_ND).square().sum(-1) / teacher_ND.square().sum(-1).clamp_min(smallest)
    # half the squared distance on the unit sphere is 1 - cosine, and exactly 0 for equal states
    return (functional.normalize(student_ND, dim=-1) - functional.normalize(teacher_ND, dim=-1)).square().sum(-1) / 2


@dataclass(frozen=True)
class _Relation:
    """Between tokens: scores are scale * x y^T, then the softcap."""

    x_BGRSd: Tensor
    """Vectors of the reading side; the R heads of a group read the same y."""
    y_BGSd: Tensor
    """Vectors of the side that is read."""
    scale: float
    """Factor of the scores."""
    softcap: float | None
    """Bound that scores are bent to; None = they are not."""


def _queries_keys(inputs: AttentionInputs) -> _Relation:
    """The layer's own attention, before any sink takes its share."""
    num_groups = inputs.key_BGSd.shape[1]
    x_BGRSd = inputs.query_BHSd.unflatten(1, (num_groups, -1))
    return _Relation(x_BGRSd, inputs.key_BGSd, inputs.scale, inputs.softcap)


def _values(inputs: AttentionInputs) -> _Relation:
    """Scaled products of the values themselves (MiniLM, Wang et al. 2020, arXiv:2002.10957, equation 5)."""
    value_BGSd = inputs.value_BGSd
    return _Relation(value_BGSd.unsqueeze(2), value_BGSd, value_BGSd.shape[-1] ** -0.5, None)


def _relation_sum(
    student: AttentionInputs, teacher: AttentionInputs, tokens: Tokens, relation: Callable[[AttentionInputs], _Relation]
) -> Tensor:
    """KL(teacher || student) of every counted token's distribution over the tokens it sees, mean over heads, in nats.

    What it sees is what the teacher's layer sees. Queries come in chunks whose scores are not kept, so that memory does
    not grow with S squared.
    """
    ours, theirs = relation(student), relation(teacher)
    if ours.x_BGRSd.shape[:4] != theirs.x_BGRSd.shape[:4]:
        raise UserError(
            f"attention: the student's heads {tuple(ours.x_BGRSd.shape[1:3])} are not the teacher's "
            f"{tuple(theirs.x_BGRSd.shape[1:3])}; take relations out of distill.losses"
        )
    batch, num_groups, num_readers, length, _ = ours.x_BGRSd.shape
    step = max(1, SCORES // (num_groups * num_readers * length))
    seen_BSS = None if teacher.seen_B1SS is None else teacher.seen_B1SS.squeeze(1).expand(batch, -1, -1)
    total = _full(ours.x_BGRSd)[..., :0, :].sum()
    for row in range(batch):
        for start in range(0, length, step):
            end = min(start + step, length)
            counted = tokens.between(row * length + start, row * length + end)
            if not len(counted):
                continue
            total = total + _again(
                _chunk_sum,
                ours.x_BGRSd[row, :, :, start:end],
                ours.y_BGSd[row, :, :end],
                theirs.x_BGRSd[row, :, :, start:end].detach(),
                theirs.y_BGSd[row, :, :end].detach(),
                tokens.document_BS[row, :end],
                None if seen_BSS is None else seen_BSS[row, start:end, :end],
                counted,
                (ours, theirs),
            )
    return total


def _seen_CK(document_K: Tensor, start: int) -> Tensor:
    """Which keys the queries from ``start`` on see without a mask: those of their document that are not after them."""
    key_K = torch.arange(len(document_K), device=document_K.device)
    return (key_K[start:, None] >= key_K) & (document_K[start:, None] == document_K)


def _chunk_sum(
    x_GRCd: Tensor,
    y_GKd: Tensor,
    teacher_x_GRCd: Tensor,
    teacher_y_GKd: Tensor,
    document_K: Tensor,
    seen_CK: Tensor | None,
    counted_N: Tensor,
    relations: tuple[_Relation, _Relation],
) -> Tensor:
    ours, theirs = relations  # for scale and softcap alone: their vectors are cut to the chunk above
    if seen_CK is None:
        seen_CK = _seen_CK(document_K, len(document_K) - x_GRCd.shape[2])
    student_GRCK = _log_relation(x_GRCd, y_GKd, seen_CK, ours)
    teacher_GRCK = _log_relation(teacher_x_GRCd, teacher_y_GKd, seen_CK, theirs)
    kl_GRCK = functional.kl_div(student_GRCK, teacher_GRCK, reduction="none", log_target=True)
    return kl_GRCK.sum(-1).mean((0, 1))[counted_N].sum()


def _log_relation(x_GRCd: Tensor, y_GKd: Tensor, seen_CK: Tensor, how: _Relation) -> Tensor:
    scores_GRCK = x_GRCd @ y_GKd.unsqueeze(1).mT * how.scale
    if how.softcap is not None:
        scores_GRCK = how.softcap * torch.tanh(scores_GRCK / how.softcap)
    # not -inf: log p - log q of what nobody sees would be NaN
    return scores_GRCK.masked_fill(~seen_CK, torch.finfo(scores_GRCK.dtype).min).log_softmax(-1)
