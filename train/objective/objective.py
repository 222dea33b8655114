"""The student during training: hidden states, loss at the head, and what is shared with the teacher.

B batch, S sequence, D hidden, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from shoal.data.image_rows import on_device
from shoal.data.packing import IGNORED
from shoal.errors import UserError
from shoal.models.anatomy import decoder_body, decoder_layers, state_of, with_state
from shoal.models.document_masks import documents_apart
from shoal.models.load import before_head, logits_from_hidden
from shoal.recipe.losses import LOGIT_TERMS, TAID, LossTerm, asked_sources, reads_distributions, term_names
from shoal.runtime import queued

from ..engine.kernels import Compiled, Fused
from .chunked_loss import Dense, TermInput, TopK, block_loss, chunked_head_loss
from .divergences import TaidState
from .host_batch import OnHost, learnt_places
from .layer_losses import Captured, StateLosses


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The module that turns hidden states into logits.

    Raises:
        UserError: for an architecture whose head is no plain linear map; the chunked loss could not be exact.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__}: the output head is {type(head).__name__}, not nn.Linear; choose another model"
        )
    return head


@dataclass(frozen=True)
class Signals:
    """What a teacher says about one micro-batch. What no loss term asks for is absent, and of a row of which none asks
    anything it is 0. K recorded tokens."""

    hidden_BSD: Tensor | None = None
    """Final hidden states that the teacher's head reads; its logits are made chunk by chunk inside the loss."""
    ids_BSK: Tensor | None = None
    """Recorded instead of the above: the most probable next tokens in falling order."""
    log_probs_BSK: Tensor | None = None
    """Log-probabilities of these tokens under the full softmax, in nats, never renormalised."""
    tail_BS: Tensor | None = None
    """Probability of all other tokens together, where that was recorded."""
    temperature: float = 1.0
    """Temperature that the recorded ones were recorded at."""
    captured: Captured = field(default_factory=Captured)
    """States and attention inputs that state terms compare with."""


class Objective:
    """The distillation loss inside the student's forward: ``student(...)`` gives (loss, sums) while it is installed.

    loss is the weighted sum of all terms over supervised tokens, differentiable. sums, float64, holds every term's own
    sum.

    Only the two forward methods of this instance change, the model's and its head's: class, parameters and state
    dict stay, so that Trainer, DeepSpeed and save_pretrained see an ordinary model. The loss is computed *inside* the
    head's call because under ZeRO-3 the head's weight exists in full only there.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher_to_logits: Callable[[Tensor], Tensor] | None,
        *,
        terms: tuple[LossTerm, ...],
        chunk: int,
        states: StateLosses | None = None,
        sources: Sequence[frozenset[int] | None] | None = None,
        compiled_layers: Sequence[nn.Module] | None = None,
    ) -> None:
        """``teacher_to_logits`` is a live teacher's way from final hidden states to logits (see ``to_logits``),
        ``sources`` are those of the data whose tokens every term learns from, None = all. ``compiled_layers`` run
        compiled, and so does the loss at the head."""
        self.terms = terms
        self.student = student
        self._teacher_to_logits = teacher_to_logits
        self._chunk = chunk
        self._states = states
        self._sources = tuple(sources or [None] * len(terms))
        self._asked = asked_sources(terms, self._sources, reads_distributions)
        self._at_head = [index for index, term in enumerate(terms) if isinstance(term, LOGIT_TERMS)]
        self._at_layers = [index for index, term in enumerate(terms) if not isinstance(term, LOGIT_TERMS)]
        self._taid = {index: TaidState(term) for index, term in enumerate(terms) if isinstance(term, TAID)}

        self.fused: Fused | None = None
        """Kernels that are installed with it."""
        self._compiled = None if compiled_layers is None else Compiled(compiled_layers)
        self._compiled_loss = self._compiled.function(block_loss) if self._compiled else None

    def install(self) -> None:
        """Put the objective in the place of the two forwards."""
        for part in (self.fused, self._compiled):
            if part is not None:
                part.install()
        head = output_head(self.student)
        self.student.forward = MethodType(self._forward, self.student)
        head.forward = MethodType(self._head_forward, head)

    def uninstall(self) -> None:
        """Give the model and its head their own forwards back."""
        del self.student.forward, output_head(self.student).forward
        for part in (self._compiled, self.fused):
            if part is not None:
                part.uninstall()

    def _forward(
        self,
        student: Any,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        signals: Signals,
        on_host: OnHost | None = None,
        images: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        states, host = self._states, on_host or OnHost(labels.cpu(), position_ids.cpu())
        learnt_N, num_asked = self._asked_first(host)
        own_labels = self._own_labels(host)
        places_N = queued(learnt_N, labels.device)
        inputs = [
            TermInput(
                self._taid[index].t if index in self._taid else 1.0,
                None if own_labels[index] is host.labels_BS else own_labels[index].flatten()[learnt_N + 1] != IGNORED,
            )
            for index in self._at_head
        ]
        with nullcontext(Captured()) if states is None else states.capturing_student() as seen:
            hidden_BSD = final_hidden(student, input_ids, position_ids, images)
        loss, head_sums = output_head(student)(hidden_BSD, labels, places_N, num_asked, signals, inputs)
        # one by one: a list of indices would be copied to the device, which waits for it
        sums = dict(zip(self._at_head, head_sums.unbind(), strict=True))
        if states is not None:
            at_layers = [own_labels[index] for index in self._at_layers]
            state_loss, state_sums = states(
                seen, signals.captured, at_layers, host.position_ids_BS, device=labels.device
            )
            loss = loss + state_loss
            sums |= zip(self._at_layers, state_sums.unbind(), strict=True)
        return loss, torch.stack([sums[index] for index in range(len(self.terms))])

    def _asked_first(self, host: OnHost) -> tuple[Tensor, int]:
        """The learnt places as learnt_places says, (N,), those of whose tokens a term asks for the teacher's
        distribution before the others, and their number."""
        learnt_N, asked_BS = learnt_places(host.labels_BS), host.labels_from(self._asked)
        if asked_BS is host.labels_BS:
            return learnt_N, len(learnt_N)
        asks_N = asked_BS.flatten()[learnt_N + 1] != IGNORED
        return torch.cat([learnt_N[asks_N], learnt_N[~asks_N]]), int(asks_N.sum())

    def _own_labels(self, host: OnHost) -> list[Tensor]:
        """The labels that every term learns, (B, S): the host's own where it learns all, else IGNORED in other places.

        Terms that learn from the same sources have the same tensor.
        """
        by_sources = {sources: host.labels_from(sources) for sources in set(self._sources)}
        return [by_sources[sources] for sources in self._sources]

    def tokens_by_term(self, host: OnHost) -> list[int]:
        """Number of supervised tokens of a micro-batch that every term learns from."""
        return [len(learnt_places(own)) for own in self._own_labels(host)]

    def _head_forward(
        self,
        head: nn.Linear,
        hidden_BSD: Tensor,
        labels_BS: Tensor,
        places_N: Tensor,
        num_asked: int,
        signals: Signals,
        inputs: Sequence[TermInput],
    ) -> tuple[Tensor, Tensor]:
        def asked(plane: Tensor) -> Tensor:
            return plane.flatten(0, 1)[places_N[:num_asked]]

        targets: Dense | TopK | None = None
        if signals.hidden_BSD is not None:
            assert self._teacher_to_logits is not None
            targets = Dense(asked(signals.hidden_BSD), _in_own_precision(self._teacher_to_logits))
        elif signals.ids_BSK is not None:
            assert signals.log_probs_BSK is not None
            assert signals.tail_BS is not None
            planes = asked(signals.ids_BSK), asked(signals.log_probs_BSK)
            targets = TopK(*planes, signals.temperature, asked(signals.tail_BS))
        if not len(places_N) or not self._at_head:  # of a micro-batch; the step as a whole has some
            # zero, but through every parameter: ranks that share gradients must all have the same ones to share
            nothing = torch.stack([part[:0].sum() for part in (hidden_BSD, *head.parameters())]).sum()
            return nothing, hidden_BSD.new_zeros(len(self._at_head), dtype=torch.float64)
        through = logits_from_hidden(self.student, prepared=True)
        return chunked_head_loss(
            hidden_BSD.flatten(0, 1)[places_N],
            labels_BS.flatten()[places_N + 1],  # position t predicts token t + 1
            targets,
            student_head=lambda hidden, *weights: through(hidden, lambda h: functional.linear(h, *weights)),
            student_parameters=(head.weight,) if head.bias is None else (head.weight, head.bias),
            terms=[self.terms[index] for index in self._at_head],  # pyright: ignore[reportArgumentType]
            chunk=self._chunk,
            inputs=inputs,
            compiled=self._compiled_loss,
        )

    def end_step(self, means: Sequence[float | None], *, step: int, num_steps: int) -> None:
        """What a term learns from a step: TAID moves its target on. ``means`` are the terms' means over the tokens of
        all ranks that they learn from; None = there were none."""
        for index, state in self._taid.items():
            state.update(means[index], step, num_steps)

    def curves(self) -> dict[str, float]:
        """What terms keep between steps, by name."""
        names = term_names(self.terms)
        return {f"{names[index]}_t": state.t for index, state in self._taid.items()}

    def state(self) -> dict[str, Any]:
        """What ``end_step`` has changed, for a checkpoint."""
        return {str(index): state.state_dict() for index, state in self._taid.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        for index, taid in self._taid.items():
            taid.load_state_dict(state[str(index)])


def to_logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The way from what the head reads, (..., D), to logits, (..., V), scale and soft cap included.

    Under ZeRO 3 the head has to be `gathered`, and its own forward is passed by: the hooks there let go of the weight
    after every call and gather it for the next one. Ranks have unequal numbers of chunks, and a rank that gathers waits
    for all others. A head that is offloaded would come over for every chunk, unless it is `gathered` too.
    """
    through, head = logits_from_hidden(model, prepared=True), output_head(model)

    def linear(hidden: Tensor) -> Tensor:
        is_held = hasattr(head.weight, "ds_id") or (hasattr(head, "_hf_hook") and not head.weight.is_meta)
        return functional.linear(hidden, head.weight, head.bias) if is_held else head(hidden)

    return lambda hidden: through(hidden, linear)


def _in_own_precision(to_logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same whatever the student is trained in: a teacher's layers have not seen autocast, nor should its head."""

    def logits(hidden_ND: Tensor) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return to_logits(hidden_ND)

    return logits


def final_hidden(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, images: Mapping[str, Tensor] | None = None
) -> Tensor:
    """What the head reads, (B, S, D). Attention keeps documents packed in one row apart: see shoal.data.packing.

    With ``images``, what the processor makes beside the tokens, every row is one document and padding, and the whole
    model with its tower makes positions and masks of it as it does of any input.
    """
    if images is not None:
        inputs = on_device(images, input_ids.device, model.dtype)
        hidden_BSD = model.base_model(input_ids=input_ids, **inputs, use_cache=False).last_hidden_state
    else:
        decoder = decoder_body(model)
        with documents_apart(decoder, position_ids):
            hidden_BSD = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    # here and not in the chunked loss, which takes gradients of the head alone
    return hidden_BSD if (prepare := before_head(model)) is None else prepare(hidden_BSD)


class _AtTheCut(Exception):
    """Ends the teacher's forward: what lies above has nobody to speak to."""


def _joined(parts: Sequence[tuple[Tensor | None, Any]]) -> Any:
    """What a layer would have returned of all rows of a micro-batch, from what it has of some of them at a time."""
    (rows, output), *others = parts
    if rows is None:
        return output
    places = torch.cat([rows, *(more for more, _ in others if more is not None)]).argsort()

    def in_place(*values: Any) -> Any:
        # what has no rows is the same for all
        of_rows = isinstance(values[0], Tensor) and values[0].ndim and len(values[0]) == len(rows)
        return torch.cat(values)[queued(places, values[0].device)] if of_rows else values[0]

    return tree_map(in_place, output, *(more for _, more in others))


class SharedPrefix:
    """Below the first cut a frozen student *is* the teacher: those layers are run once, by the teacher, for both.

    The teacher's state at the first cut is kept as it passes; in the student the layers below hand their input on
    untouched, and the last of them hands out that state. So no second forward, no backward, no activations. Without a
    ``teacher`` the state is one that was recorded, and nobody runs these layers.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, *, first_change: int) -> None:
        self._state_BSD: Tensor | None = None
        self._like: Any = None
        """Return value of a layer of this family: its state alone, or the first of several values."""
        self._parts: list[tuple[Tensor | None, Any]] = []
        """What the teacher's layer has returned of these rows; None = of all."""
        self._layers = list(decoder_layers(student)[:first_change])
        self._teacher_layer = None if teacher is None else decoder_layers(teacher)[first_change - 1]

    def forget(self) -> None:
        """Before another micro-batch: the state of the last one, which no student may have gone on from."""
        self._state_BSD, self._parts = None, []

    @contextmanager
    def recording(self, rows: Tensor | None = None, *, goes_on: bool = True) -> Iterator[None]:
        """While the teacher runs over these rows of the micro-batch, None = over all: keep its state at the cut. Unless
        it ``goes_on`` its forward ends there, and with it the block."""
        assert self._teacher_layer is not None

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            # layers above may read the other values too, the tokens that GLM's indexer has chosen for one
            self._parts.append((rows, output))
            if not goes_on:
                raise _AtTheCut

        handle = self._teacher_layer.register_forward_hook(keep)
        try:
            yield
        except _AtTheCut:
            pass
        finally:
            handle.remove()

    def take(self, state_BSD: Tensor) -> None:
        """The state at the cut of the rows that the student reads next."""
        self._state_BSD = state_BSD

    @contextmanager
    def replaying(self, dtype: torch.dtype) -> Iterator[None]:
        """While the student runs: the layers below the cut cost nothing."""
        if self._parts:
            self._like, self._parts = _joined(self._parts), []
            self._state_BSD = state_of(self._like)
        recorded_BSD = self._state_BSD
        assert recorded_BSD is not None
        first, *_ = self._layers
        own_forward = first.forward

        def shaped(state: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._like is None:  # no teacher has shown it: one layer runs, once
                with torch.no_grad():
                    shown = own_forward(*args, **kwargs)
                # its other values are not those at the cut
                self._like = type(shown)([None] * len(shown)) if isinstance(shown, tuple | list) else state[:0]
            return with_state(self._like, state)

        def pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return shaped(hidden, hidden, *args, **kwargs)

        def replay(*args: Any, **kwargs: Any) -> Any:
            return shaped(recorded_BSD.to(dtype), *args, **kwargs)

        for layer in self._layers[:-1]:
            layer.forward = pass_on
        self._layers[-1].forward = replay
        try:
            yield
        finally:
            self.forget()
            if self._teacher_layer is not None:
                self._like = None
            for layer in self._layers:
                del layer.forward
