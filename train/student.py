"""The student during training: hidden states, loss at the head, and what is shared with the teacher.

B batch, S sequence, D hidden, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from shoal.anatomy import decoder_body
from shoal.data import IGNORED
from shoal.errors import UserError
from shoal.models import decoder_layers, logits_from_hidden
from shoal.terms import LogitTerm, LossTerm

from .head import Dense, chunked_head_loss


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The module that turns hidden states into logits.

    Raises:
        UserError: for an architecture whose head is no plain linear map; the chunked loss could not be exact.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__}: its output head is {type(head).__name__}, distillation needs nn.Linear"
        )
    return head


def install_objective(
    student: PreTrainedModel, teacher: PreTrainedModel, *, terms: tuple[LossTerm, ...], chunk: int
) -> Callable[[], None]:
    """Make ``student(...)`` return (loss sum, term sums) over supervised tokens; the returned function undoes it.

    Only the two forward methods of this instance change, the model's and its head's: class, parameters and state
    dict stay, so that Trainer, DeepSpeed and save_pretrained see an ordinary model. The loss is computed *inside* the
    head's call because under ZeRO-3 the head's weight exists in full only there.
    """
    logit_terms = [term for term in terms if isinstance(term, LogitTerm)]
    if len(logit_terms) < len(terms):
        raise UserError("distill.losses: terms of hidden states cannot be trained yet; leave them out")
    head = output_head(student)
    to_logits = logits_from_hidden(student)
    teacher_to_logits = logits_from_hidden(teacher)
    teacher_head = output_head(teacher)

    def head_forward(head: nn.Linear, hidden_BSD: Tensor, teacher_hidden_BSD: Tensor | None, labels_BS: Tensor):
        # position t predicts token t + 1; a row's first token is no one's target
        supervised = labels_BS[:, 1:] != IGNORED
        parameters = (head.weight,) if head.bias is None else (head.weight, head.bias)
        targets = None
        if teacher_hidden_BSD is not None:
            teacher_hidden_ND = teacher_hidden_BSD[:, :-1][supervised]
            targets = Dense(teacher_hidden_ND, lambda hidden: teacher_to_logits(hidden, teacher_head))
        loss, term_sums, _ = chunked_head_loss(
            hidden_BSD[:, :-1][supervised],
            labels_BS[:, 1:][supervised],
            targets,
            student_head=lambda hidden, *weights: to_logits(hidden, lambda h: functional.linear(h, *weights)),
            student_parameters=parameters,
            terms=logit_terms,
            chunk=chunk,
        )
        return loss, term_sums

    def forward(
        student: Any, input_ids: Tensor, position_ids: Tensor, labels: Tensor, teacher_hidden_BSD: Tensor | None
    ):
        hidden_BSD = final_hidden(student, input_ids, position_ids)
        return head(hidden_BSD, teacher_hidden_BSD, labels)

    student.forward = MethodType(forward, student)
    head.forward = MethodType(head_forward, head)

    def undo() -> None:
        del student.forward, head.forward

    return undo


def final_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """What the head reads, (B, S, D). Documents packed in one row do not see each other: see shoal.data."""
    decoder = decoder_body(model)
    return decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


class SharedPrefix:
    """Below the first cut a frozen student *is* the teacher: those layers are run once, by the teacher, for both.

    The teacher's state at the first cut is recorded as it passes; in the student the layers below hand their input on
    untouched, and the last of them hands out the recorded state. So no second forward, no backward, no activations.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, *, first_change: int) -> None:
        self._state: Any = None
        self._layers = list(decoder_layers(student)[:first_change])
        self._teacher_layer = decoder_layers(teacher)[first_change - 1]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While the teacher runs: keep its state at the cut."""

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self._state = output

        handle = self._teacher_layer.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def replaying(self, dtype: torch.dtype) -> Iterator[None]:
        """While the student runs: the layers below the cut cost nothing."""
        is_tuple = isinstance(self._state, tuple)
        recorded = self._state[0] if is_tuple else self._state

        def pass_on(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return (hidden,) if is_tuple else hidden

        def replay(_hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            state = recorded.to(dtype)
            return (state,) if is_tuple else state

        for layer in self._layers[:-1]:
            layer.forward = pass_on
        self._layers[-1].forward = replay
        try:
            yield
        finally:
            self._state = None
            for layer in self._layers:
                del layer.forward
