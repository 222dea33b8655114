"""Losses on what happens inside the layers, hidden states, as sums over tokens.

Which student layer answers to which teacher layer follows from the plan. What is compared is taken while models run, or
comes from a recording. All arithmetic is at least float32, whatever the models' precision.

B batch, S sequence, D hidden, N counted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, state_of
from shoal.models.document_masks import document_starts
from shoal.recipe.losses import NO_GRADIENT, HiddenStates
from shoal.runtime import queued

from .host_batch import learnt_places

NO_STATES = "remove hidden_states from distill.losses, and distill.teacher.prefix"


@dataclass
class Captured:
    """What was seen of one forward pass, by layer of the model that ran. Recorded states make one too."""

    states: dict[int, Tensor] = field(default_factory=dict)
    """(B, S, D) after a layer, before any final norm."""


@contextmanager
def raw_states(model: PreTrainedModel, layers: Collection[int], keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While ``model`` runs: tell ``keep`` every one of ``layers`` as it is run, with its raw state (B, S, D).

    Raises:
        UserError: a layer whose output is not one such stream.
    """

    def seen(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        state = state_of(output)
        if not isinstance(state, Tensor) or state.ndim != 3:
            family = model.config.model_type
            raise UserError(f"{family}: layer {layer} does not return one stream of hidden states; {NO_STATES}")
        keep(layer, state)

    decoder = decoder_layers(model)
    with ExitStack() as stack:
        for layer in sorted(layers):
            stack.callback(decoder[layer].register_forward_hook(partial(seen, layer)).remove)
        yield


@contextmanager
def capturing(model: PreTrainedModel, layers: Collection[int]) -> Iterator[Captured]:
    """While ``model`` runs once: the raw states after ``layers``.

    By hooks, because the last state that transformers returns is behind the final norm. What runs again when gradient
    checkpointing recomputes a layer is not taken a second time. No parameter is touched: ZeRO-3 may have sharded them.

    Raises:
        UserError: layers whose output is not one (B, S, D) stream or is overwritten later.
    """
    seen = Captured()
    versions: dict[int, int] = {}

    def keep(layer: int, state: Tensor) -> None:
        if layer not in seen.states:  # else checkpointing runs the layer a second time
            seen.states[layer] = state
            versions[layer] = _version(state)

    with raw_states(model, layers, keep):
        yield seen
    for layer, state in seen.states.items():
        if _version(state) != versions[layer]:
            family = model.config.model_type
            raise UserError(f"{family}: the layer after layer {layer} overwrites its output; {NO_STATES}")


def _version(state: Tensor) -> int:
    return 0 if state.is_inference() else state._version


def layer_map(plan: Plan, kind: Literal["gap_closing", "own"]) -> tuple[int, ...]:
    """For every student layer the teacher layer after which its target state is found.

    `own`: the layer itself; for a merged or replaced run its last one, since the run's new layer stands for all of it.
    `gap_closing`: the layer before the next kept one, for the last student layer the teacher's last. The two differ
    only where layers are dropped: there `gap_closing` asks the layer before the gap for what comes after it, which is
    LLM-Streamline's target (arXiv:2403.19135) for every gap.
    """
    if kind == "gap_closing":
        return (*(after - 1 for after in plan.keep[1:]), plan.num_layers - 1)
    ends = dict(run for change in plan.changes for run in change.runs)
    return tuple(ends.get(layer, layer) for layer in plan.keep)


def layer_pairs(term: HiddenStates, plan: Plan, *, num_shared: int = 0) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) of every comparison that ``term`` makes.

    Where it names no layers they are all from the first whose pair is not equal from the start. Below ``num_shared``
    the student is the teacher and frozen: nothing there could be learnt.

    Raises:
        UserError: a layer that the student does not have, or no layer left.
    """
    targets = layer_map(plan, term.map)
    changed = plan.first_change if plan.changes_layers else 0
    unnamed = [layer for layer, target in enumerate(targets) if layer != target or layer >= changed]
    num_layers = len(targets)
    if term.layers and max(term.layers) >= num_layers:
        raise UserError(
            f"{term.kind}: layers: the student has {num_layers} layers, 0 to {num_layers - 1} (got "
            f"{max(term.layers)}); name only these"
        )
    chosen = unnamed if term.layers is None else sorted(term.layers)
    term.refuse_frozen(chosen, num_shared, num_layers)
    return tuple((layer, targets[layer]) for layer in chosen if layer >= num_shared)


class StateLosses:
    """The state terms of a run: what to capture of student and teacher, and the loss of what was captured.

    ``teacher`` is None where its states are recorded. ``num_shared`` are the lowest layers that student and teacher
    share (SharedPrefix) or that are frozen copies.

    Raises:
        UserError: layers that do not exist.
    """

    def __init__(
        self,
        terms: Sequence[HiddenStates],
        plan: Plan,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        num_shared: int = 0,
    ) -> None:
        self.terms = tuple(terms)
        self.student, self.teacher, self.plan = student, teacher, plan
        self._pairs = [layer_pairs(term, plan, num_shared=num_shared) for term in terms]
        # one capture serves all terms: the union of what they compare, side 0 the student's and side 1 the teacher's
        pairs = [pair for own in self._pairs for pair in own]
        self.student_layers, self.teacher_layers = (tuple(sorted({pair[side] for pair in pairs})) for side in (0, 1))
        """Layers whose raw states are compared."""

    def capturing_student(self) -> AbstractContextManager[Captured]:
        """What the terms need of one forward pass of the student, with its graph."""
        return capturing(self.student, self.student_layers)

    def capturing_teacher(self) -> AbstractContextManager[Captured]:
        """What the terms need of one forward pass of the teacher."""
        assert self.teacher is not None
        return capturing(self.teacher, self.teacher_layers)

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
        counted_by_labels = {id(each_BS): counted_places(each_BS, position_ids_BS, device) for each_BS in labels}
        loss = torch.zeros((), device=device)
        sums: list[Tensor] = []
        for term, pairs, labels_BS in zip(self.terms, self._pairs, labels, strict=True):
            counted_N = counted_by_labels[id(labels_BS)]
            # a term of weight 0 is computed for its curve alone
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight > 0):
                sums_P = [self._sum(term, pair, student, teacher, counted_N) for pair in pairs]
                total = torch.stack(sums_P).mean()
            if torch.is_grad_enabled() and term.weight > 0 and not total.requires_grad:
                raise UserError(NO_GRADIENT)
            loss = loss + term.weight * total
            sums.append(total.detach().double())  # added up over a whole step, where fp32 would lose digits
        return loss, torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device=device)

    def _sum(
        self, term: HiddenStates, pair: tuple[int, int], student: Captured, teacher: Captured, counted_N: Tensor
    ) -> Tensor:
        """The loss of one comparison, as a sum over tokens."""
        layer, target = pair
        ours_BSD, scale = student.states[layer], self.plan.state_scale(target)
        # where factors make up for dropped layers, the student's states are smaller than those they stand for
        states = ours_BSD if scale == 1 else ours_BSD * scale, teacher.states[target].detach()
        summed = checkpoint(
            _sum_of_distances, *states, counted_N, term.distance, use_reentrant=False, preserve_rng_state=False
        )
        assert isinstance(summed, Tensor)
        return summed


def counted_places(labels_BS: Tensor, position_ids_BS: Tensor, device: torch.device) -> Tensor:
    """Places (N,) of the tokens that count in the flattened (B x S), rising, on ``device``, which need not be asked
    anything if labels and positions are on the host."""
    first_BS, learnt_N = document_starts(position_ids_BS), learnt_places(labels_BS)
    return queued(learnt_N[~first_BS.flatten()[learnt_N]], device)


def _sum_of_distances(student_BSD: Tensor, teacher_BSD: Tensor, counted_N: Tensor, distance: str) -> Tensor:
    """Sum over the tokens that count, in at least float32: of the squared error relative to the teacher's squared norm
    (`mse`), or of 1 - cosine."""
    with torch.autocast(student_BSD.device.type, enabled=False):
        student_ND, teacher_ND = (
            state_BSD.to(torch.promote_types(state_BSD.dtype, torch.float32)).flatten(0, 1)[counted_N]
            for state_BSD in (student_BSD, teacher_BSD)
        )
        if distance == "mse":
            smallest = torch.finfo(teacher_ND.dtype).tiny
            errors_N = (student_ND - teacher_ND).square().sum(-1) / teacher_ND.square().sum(-1).clamp_min(smallest)
            return errors_N.sum()
        student_ND, teacher_ND = (functional.normalize(state_ND, dim=-1) for state_ND in (student_ND, teacher_ND))
        # half the squared distance on the unit sphere is 1 - cosine, and exactly 0 for equal states
        return ((student_ND - teacher_ND).square().sum(-1) / 2).sum()
