"""Where a causal language model keeps its decoder layers, final norm, embeddings and head, and a layer its state.

One generic rule finds them: the decoder that transformers names, a list of as many modules as the configuration has
layers, the norm beside that list. families.py holds what the rule cannot know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.checkpoint_files import refuse_long_rows
from shoal.models.families import family

LAYER_LISTS = ("layers", "h", "blocks", "block")
"""Names of the list of decoder layers, by family."""
FINAL_NORMS = (
    *("norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm", "final_norm", "layer_norm", "layernorm"),
    *("output_layernorm", "ln_out", "out_norm"),
    "embedding_norm",  # LFM2 norms its output with it, not the embeddings
)
"""Names of the norm between the last layer and the head, by family; it stands beside the list of layers."""
CHANNELS = ("intermediate_size", "ffn_dim", "ffn_hidden_size")
"""Fields of a configuration that say how many channels every MLP has, by family."""


@dataclass(frozen=True)
class Anatomy:
    """Modules of one model; a part that the model lacks is None."""

    layers: nn.ModuleList
    layers_name: str
    """Name of ``layers`` in ``named_modules``."""
    final_norm: nn.Module | None
    embeddings: nn.Module | None
    head: nn.Module | None


def anatomy(model: PreTrainedModel) -> Anatomy:
    """The parts of ``model``.

    Raises:
        UserError: an architecture whose decoder layers are not one list of ``num_hidden_layers`` modules.
    """
    names = {id(module): name for name, module in model.named_modules()}
    owner, layers = _layers(model)
    norm = next((part for name in FINAL_NORMS if isinstance(part := getattr(owner, name, None), nn.Module)), None)
    return Anatomy(layers, names[id(layers)], norm, model.get_input_embeddings(), model.get_output_embeddings())


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order."""
    return _layers(model)[1]


def decoder_body(model: PreTrainedModel) -> nn.Module:
    """The part of ``model`` that turns token ids into final hidden states.

    That is the decoder that transformers names, but of Llama 4 it names the model with its head, and of ModernBERT's
    decoder the head itself.
    """
    named = model.get_decoder()
    decoder = named if isinstance(named, PreTrainedModel) else model.base_model
    inner = getattr(decoder, "model", None)
    return inner if isinstance(inner, PreTrainedModel) else decoder


def given_state(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state in what a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def state_of(output: Any) -> Tensor:
    """The hidden state in what a decoder layer, or a half of one, returns."""
    return output[0] if isinstance(output, tuple | list) else output


def called_on(layer: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], state: Tensor) -> Any:
    """What ``layer`` returns for ``state``, called with all else that these arguments of a decoder layer hold."""
    return layer(state, *args[1:], **kwargs) if args else layer(**{**kwargs, "hidden_states": state})


def with_state(output: Any, state: Tensor) -> Any:
    """``output`` with another hidden state in it."""
    return type(output)([state, *output[1:]]) if isinstance(output, tuple | list) else state


@contextmanager
def watched(
    layers: Iterable[nn.Module],
    *,
    before: Callable[[int, Any, Any], None] | None = None,
    after: Callable[[int, Any, Any, Any], None] | None = None,
) -> Iterator[None]:
    """Show every call of ``layers`` inside the block: ``before(index, args, kwargs)``, ``after(..., output)``."""

    def numbered(show: Callable[..., None], index: int) -> Callable[..., None]:
        return lambda _, *call: show(index, *call)

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            if before is not None:
                stack.enter_context(layer.register_forward_pre_hook(numbered(before, index), with_kwargs=True))
            if after is not None:
                stack.enter_context(layer.register_forward_hook(numbered(after, index), with_kwargs=True))
        yield


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the text decoder; the whole of it for text-only models."""
    return config.get_text_config(decoder=True)


def require_gradients(model: PreTrainedModel) -> None:
    """Refuse a model that takes no gradients."""
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError("model: torch.inference_mode takes no gradients; make the model and call shoal outside of that")


def require_positions(config: Any, sequence_length: int, setting: str, *, remedy: str = "lower it") -> None:
    """Refuse rows longer than the positions that a model has."""
    refuse_long_rows(getattr(text_config(config), "max_position_embeddings", None), sequence_length, setting, remedy)


def deepstack_layers(config: Any) -> tuple[int, ...]:
    """Layers of the text decoder behind which features of the image are added to the states, by place.

    Qwen3-VL adds those of its n-th named vision block behind the n-th text layer (DeepStack, arXiv:2406.04334).
    """
    parts = (getattr(config, name, None) for name in config.sub_configs)
    count = max((len(getattr(part, "deepstack_visual_indexes", None) or ()) for part in parts), default=0)
    return tuple(range(count))


def image_layers(config: Any) -> tuple[int, ...]:
    """Layers of the text decoder that read the image past the tokens that stand for it.

    Those of `deepstack_layers`, and Llama 3.2 Vision's layers of cross-attention, which rows without an image pass by.
    """
    return (*deepstack_layers(config), *(getattr(text_config(config), "cross_attention_layers", None) or ()))


def refuse_both_directions(config: Any) -> None:
    """Refuse to score or train a language model whose tokens see those behind them."""
    if getattr(text_config(config), "use_bidirectional_attention", None) in (True, "all"):
        raise UserError(
            f"{config.model_type}: its language model reads text in both directions, so shoal can neither score nor "
            "train an answer token by token; shoal can only drop the layers named in prune.drop"
        )


def refuse_text_alone(config: Any) -> None:
    """Refuse to measure a model with text where text passes some of its layers by, or is read in both directions."""
    refuse_both_directions(config)
    if unread := getattr(text_config(config), "cross_attention_layers", None):
        raise UserError(
            f"measure: {config.model_type} skips its layers {list(unread)} if there is no image, so text cannot "
            "measure them; do not measure, and name the layers to drop in prune.drop"
        )


def _layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the list of decoder layers, and the list."""
    config = text_config(model.config)
    if path := family(config.model_type).layers:
        owner_name, _, leaf = path.rpartition(".")
        owner, names = model.get_submodule(owner_name), (leaf,)
    else:
        owner, names = decoder_body(model), LAYER_LISTS
    for name in names:
        layers = getattr(owner, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers) == getattr(config, "num_hidden_layers", None):
            return owner, layers
    raise UserError(
        f"{type(model).__name__}: shoal does not know where this architecture keeps its decoder layers; it looks for "
        "one list of num_hidden_layers modules"
    )
