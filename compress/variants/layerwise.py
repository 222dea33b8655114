"""A decoder run one layer at a time, so that many variants of a model share what is below their first difference.

The model's own body says how every layer is called: it runs once with all layers replaced by recorders, which gives
the first hidden state and each layer's mask, positions and other arguments. None of these depend on what layers
return, so any layer can then be called with any state, on its own.

B batch, S sequence, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_body, decoder_layers, given_state, state_of, text_config, watched
from shoal.models.document_masks import documents_apart

from ..surgery.cut_model import skipped

log = logging.getLogger(__name__)

Inputs = dict[str, Any]
"""Keyword arguments of a model's body."""


@dataclass(frozen=True)
class Call:
    """How the body calls one layer, its hidden state left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool
    """Whether the hidden state goes by its name."""

    def of(self, layer: nn.Module, hidden_BSD: Tensor) -> Tensor:
        """(B, S, D) The state after ``layer``."""
        if self.by_name:
            return state_of(layer(*self.args, hidden_states=hidden_BSD, **self.kwargs))
        return state_of(layer(hidden_BSD, *self.args, **self.kwargs))

    def replacing(self, old: Any, new: Any) -> Call:
        """The same call with ``new`` wherever it hands over ``old``, by name or, as GPT-2 does it, by position."""
        args = tuple(new if value is old else value for value in self.args)
        return replace(
            self, args=args, kwargs={name: new if value is old else value for name, value in self.kwargs.items()}
        )


@dataclass(frozen=True)
class Prepared:
    """One batch on its way into the layers."""

    inputs: Inputs
    calls: tuple[Call, ...]
    hidden_BSD: Tensor
    """State that the first layer gets."""

    def without_hidden(self) -> Prepared:
        """The rest, for whoever keeps the state elsewhere."""
        return replace(self, hidden_BSD=self.hidden_BSD.new_empty(0))


class Layerwise:
    """The body of a model, taken apart into its layers and what lies before and behind them.

    Raises:
        UserError: an architecture whose layers cannot be run alone with the same result; found out by comparing every
            single skipped layer, bit for bit, on a few tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self.num_layers = len(self.layers)
        self._body: Any = decoder_body(model)
        self._final_norm: nn.Module | None = None
        self._lengths: list[int | None] = [None] * self.num_layers
        """Length of the tuple that each layer returns; None = it returns a tensor."""
        if model not in _refusals:
            _refusals[model] = self._prove()
        if refusal := _refusals[model]:
            raise UserError(refusal)
        self._learn()

    @torch.no_grad()
    def prepare(self, inputs: Inputs, position_ids_BS: Tensor | None = None) -> Prepared:
        """The state that the first layer gets for ``inputs``, and how every layer is called.

        ``position_ids_BS`` tell documents of a row apart where ``inputs`` have none, as for bodies that take none.
        """
        calls: list[Call] = []
        given_BSD: list[Tensor] = []

        def record(layer: int, *args: Any, **kwargs: Any) -> Any:
            by_name = not args
            hidden_BSD = kwargs.pop("hidden_states") if by_name else args[0]
            given_BSD.append(hidden_BSD)
            calls.append(Call(args[1:], kwargs, by_name))
            return self._as_output(layer, hidden_BSD)

        with self._replaced(record), documents_apart(self._body, inputs.get("position_ids", position_ids_BS)):
            self._body(**inputs)
        return Prepared(inputs, tuple(calls), given_BSD[0])

    @torch.no_grad()
    def run(self, layer: int, hidden_BSD: Tensor, call: Call) -> Tensor:
        """(B, S, D) The state after ``layer``; ``hidden_BSD`` stays as it is."""
        return call.of(self.layers[layer], hidden_BSD.clone())  # some layers write into their input

    @torch.no_grad()
    def finish(self, hidden_BSD: Tensor, prepared: Prepared) -> Tensor:
        """(B, S, D) What the body returns when its last layer returns ``hidden_BSD``."""
        if self._final_norm is not None:
            return self._final_norm(hidden_BSD)
        last = self.num_layers - 1

        # where more than a norm follows, the body itself runs once more, around layers that do nothing
        def replay(layer: int, *args: Any, **kwargs: Any) -> Any:
            return self._as_output(layer, hidden_BSD if layer == last else given_state(args, kwargs))

        with self._replaced(replay):
            return self._body(**prepared.inputs).last_hidden_state

    def _as_output(self, layer: int, hidden_BSD: Tensor) -> Any:
        """The state in the form in which ``layer`` returns it."""
        length = self._lengths[layer]
        return hidden_BSD if length is None else (hidden_BSD, *[None] * (length - 1))

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Call ``forward(layer, ...)`` in the place of every layer; its hooks still run."""
        before = [layer.__dict__.get("forward") for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = lambda *args, _index=index, **kwargs: forward(_index, *args, **kwargs)
        try:
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                del layer.forward
                if own is not None:  # accelerate puts one of its own on the module
                    layer.forward = own

    @torch.no_grad()
    def _learn(self) -> Tensor:
        """Learn how layers return their state and what follows the last one.

        Returns the body's result (1, S, D) for the probe.
        """
        last_BSD: list[Tensor] = []

        def after(layer: int, _: Any, __: Any, output: Any) -> None:
            self._lengths[layer] = len(output) if isinstance(output, tuple | list) else None
            if layer == self.num_layers - 1:
                last_BSD.append(state_of(output).clone())  # what follows may write into it

        with watched(self.layers, after=after):
            result_BSD = self._body(**self._probe()).last_hidden_state
        # only where the norm alone gives the body's result is it all that follows
        norm = anatomy(self.model).final_norm
        if norm is not None and torch.equal(norm(last_BSD[0]), result_BSD):
            self._final_norm = norm
        return result_BSD

    def _probe(self) -> Inputs:
        """Eight tokens; ids below 6 are often padding and the like."""
        ids = torch.arange(6, 14, device=self.model.device).unsqueeze(0) % text_config(self.model.config).vocab_size
        return {"input_ids": ids, "use_cache": False}

    def _prove(self) -> str:
        """Why layers cannot be run alone here; empty if they can."""
        family = self.model.config.model_type
        try:
            wrong = self._wrong_layers()
        except torch.OutOfMemoryError:  # says nothing of the architecture, and the slow way would not fit either
            raise
        except Exception as error:  # an architecture that is built otherwise fails anywhere, in any way
            log.debug("layers of %s cannot be run alone", family, exc_info=True)
            return f"{family}: its layers cannot be run one by one ({type(error).__name__}: {error})"
        if wrong:
            return (
                f"{family}: layer {wrong[0]}, run alone, gives another result than inside the model; layers of this "
                "family share more than the hidden state"
            )
        return ""

    def _wrong_layers(self) -> list[int]:
        """The layers whose removal gives another result layer by layer than with the whole body."""
        whole_BSD = self._learn()
        prepared = self.prepare(self._probe())
        none = self.num_layers
        states_BSD = {none: prepared.hidden_BSD}  # by the layer that is skipped
        for layer, call in enumerate(prepared.calls):
            above_BSD = {left_out: self.run(layer, hidden, call) for left_out, hidden in states_BSD.items()}
            # the state without this layer is its input; the order in which states are run does not matter
            states_BSD = {**above_BSD, layer: states_BSD[none]}
        wrong = [] if torch.equal(self.finish(states_BSD[none], prepared), whole_BSD) else [0]
        for layer in range(self.num_layers):
            with skipped(self.model, [layer]), torch.no_grad():
                expected_BSD = self._body(**self._probe()).last_hidden_state
            if not torch.equal(self.finish(states_BSD[layer], prepared), expected_BSD):
                wrong.append(layer)
        return wrong


_refusals: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""What _prove found."""
