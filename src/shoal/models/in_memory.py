"""Models and tokenizers that a caller has in memory: what is asked of them, and that they are left as they were."""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from shoal.errors import UserError
from shoal.machine import fast_dtype
from shoal.model_names import DEMO_PREFIX, refuse_no_model
from shoal.models.anatomy import decoder_body, text_config
from shoal.models.attention import named
from shoal.models.checkpoint_files import NOT_CAUSAL, wrong_token
from shoal.models.families import family
from shoal.models.hub_kernels import from_pretrained, tell_of_kernels
from shoal.models.load import Checkpoint, LoadSettings, load_config, pad_with_end, refuse_ids_beyond
from shoal.models.packed_attention import VARLEN
from shoal.models.resolve import resolve_model
from shoal.runtime import device

log = logging.getLogger(__name__)

WEIGHTS = "weights"
"""Name, among the inputs of a result, of what weights_of says of its model."""
Model = PreTrainedModel | str | Path
"""A model in memory, or the name of one: a folder, an id of the Hub, `demo:smollm2-135m`."""


def as_model(model: Model, name: str = "model", *, is_placed: bool = True, **settings: Any) -> PreTrainedModel:
    """``model``, called ``name`` in messages; one that is named is loaded as from_pretrained does with ``settings``, in
    the precision that this machine multiplies fast in, and put on the accelerator where ``is_placed``.

    Raises:
        UserError: there is none of that name, it cannot be loaded, or as require_usable.
    """
    if torch.get_default_device().type == "meta":
        raise UserError(f"{name}: torch's default device is meta, which computes nothing; call shoal outside of that")
    if isinstance(model, str | Path):
        model = str(model)
        given = {"dtype": fast_dtype(device()).dtype, **settings}
        given["hub_kernels"] = given.pop("use_kernels", False)
        refuse_no_model(model, revision := given.pop("revision", None))
        folder = resolve_model(model, revision=revision)
        try:
            stored = load_config(folder, trust_remote_code=given.get("trust_remote_code", False))
            loaded: Any = from_pretrained(AutoModelForCausalLM, folder, stored=stored, **given)
        except (TypeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{name}: {model} cannot be loaded ({reason}); give another, or the model itself"
            ) from error
        loaded.config.name_or_path = model
        return as_model((loaded.to(device()) if is_placed else loaded).eval(), name)
    require_usable(model, name)
    tell_of_kernels(model, name)
    if is_placed and model.device.type == "cpu" and torch.accelerator.is_available():
        log.warning(
            "%s: is on the CPU and will compute there, so %s is not used: call .to(%r)", name, *[device().type] * 2
        )
    return model


def require_usable(model: PreTrainedModel, name: str = "model") -> None:
    """Refuse a model, called ``name`` in messages, that nothing here could be done with.

    Raises:
        UserError: it is no causal PreTrainedModel, it has no weights or adapters besides, or its attention is none that
            keeps documents of one row apart.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{name}: is {type(model).__name__}; give a model of transformers (of PEFT: merge_and_unload() first)"
        )
    count = getattr(text_config(model.config), "num_hidden_layers", sys.maxsize)
    numbers = [getattr(module, "layer_idx", None) or 0 for module in decoder_body(model).modules()]
    lists = [each for each in decoder_body(model).modules() if isinstance(each, nn.ModuleList)]
    rows, ends = vocabulary_rows(model), getattr(model, "generation_config", None)
    token = wrong_token(vars(text_config(model.config)), rows) or wrong_token(vars(ends) if ends else {}, rows)
    writes = model.can_generate() or model.get_output_embeddings() is not None
    is_empty = not hasattr(model, "hf_device_map") and any(parameter.is_meta for parameter in model.parameters())
    wrong = {
        "is on the meta device and has no weights; load it with from_pretrained": is_empty,
        f"{type(model).__name__} {NOT_CAUSAL}": not writes or getattr(model.config, "is_encoder_decoder", False),
        "holds adapters of PEFT; merge them first": any(".base_layer." in each for each, _ in model.named_parameters()),
        "has no layers, or one of them twice; give each its own": any(
            not 0 < len(each) == len({*each}) for each in lists
        ),
        f"has weights in {_both_dtypes(model)}; give all one, with .to(dtype)": _both_dtypes(model),
        f"{token} names a token beyond the {rows:,} rows of its embeddings; correct its configurations": token,
        f"numbers a layer beyond its {count}; drop layers with shoal.cut_model": max(numbers) >= count,
        "its config.return_dict is false; set it to True": getattr(model.config, "return_dict", True) is False,
    }
    if problem := next(filter(wrong.get, wrong), None):
        raise UserError(f"{name}: {problem}")
    kernels, kind = getattr(model.config, "_attn_implementation", None) or "sdpa", text_config(model.config)
    attention = named(kernels)
    exception = family(kind.model_type).no_flash if attention == "flash" and kernels != VARLEN else ""
    if attention not in ("flash", "sdpa", "eager") or exception:
        raise UserError(
            f"{name}: its attention is {attention}, which for {kind.model_type} {exception or 'is not known'} to "
            "keep apart documents that share a row; load it with attn_implementation='sdpa', or call "
            "set_attn_implementation('sdpa')"
        )


def _both_dtypes(model: PreTrainedModel) -> str:
    """Two precisions of embeddings, or of maps of one name in several layers; empty if there are none."""
    found: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.is_floating_point():
            found.setdefault(re.sub(r"\d+", "N", name), set()).add(module.weight.dtype)
    return next((" and ".join(sorted(map(str, own))) for own in found.values() if len(own) > 1), "")


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the embeddings, whose weight may be sharded; of embeddings that do not tell, more than there can be."""
    embeddings = model.get_input_embeddings()
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else sys.maxsize


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer, None = that of the name of ``model``; where it has no pad token a copy that pads with its end
    token.

    Raises:
        UserError: it is no tokenizer of transformers, there is none of that name, or it has neither of these tokens.
    """
    if tokenizer is None:
        if not (source := model.config.name_or_path):
            raise UserError("tokenizer: is missing, and the model has no name to load it from; pass the tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(resolve_model(source) if DEMO_PREFIX in source else source)
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer: none found under the model's name, {source!r}; pass the tokenizer") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer: is {type(tokenizer).__name__}; give a tokenizer of transformers")
    rows = vocabulary_rows(model)
    has_more = max(tokenizer.get_vocab().values(), default=0) >= rows
    pad: Any = tokenizer.pad_token_id
    if has_more or pad is None:
        tokenizer = copy.deepcopy(tokenizer)
    if has_more:
        refuse_ids_beyond(rows, tokenizer, "tokenizer")
    if pad is None or pad >= rows:
        pad_with_end(tokenizer, "tokenizer")
    return tokenizer


@contextmanager
def left_as_it_was(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """``model`` in eval mode; after the block its mode, place, trained parameters and use of a cache are as before.

    Its values are not looked at: a model that was trained meanwhile stays so.
    """
    mode, cache, place = model.training, model.config.use_cache, model.device
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield model.eval()
    finally:
        model.train(mode)
        if model.device != place:
            model.to(place)  # pyright: ignore[reportArgumentType]
        model.config.use_cache = cache
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def checkpoint_of(model: PreTrainedModel) -> Checkpoint:
    """What is known of a model without its weights, as if it lay in a folder of its name."""
    attention = getattr(model.config, "_attn_implementation", None) or "sdpa"
    load = LoadSettings(str(model.dtype).removeprefix("torch."), named(attention))
    return Checkpoint(Path(name_of(model)), model.config, load)


def identity_of(model: PreTrainedModel, *, seed: int) -> dict[str, Any]:
    """What a result of ``model`` is made from besides settings."""
    return {"model": name_of(model), "dtype": str(model.dtype).removeprefix("torch."), "seed": seed}


def weights_of(model: PreTrainedModel) -> tuple[list[int], list[float]]:
    """What tells ``model`` from others: the shape of its embeddings, and the largest number in some of their rows, none
    if they are not here."""
    weight: Any = model.get_input_embeddings().weight
    some = weight.detach()[:: max(1, len(weight) // 64)]
    is_here = not weight.is_meta and weight.numel()
    return [*weight.shape], some.abs().amax(dim=-1).to(torch.bfloat16).tolist() if is_here else []


def has_weights(model: PreTrainedModel, known: tuple[list[int], list[float]], dtype: str | None) -> bool:
    """Whether ``known``, of weights_of, may be of this model, in whichever precision either was loaded, ``known`` in
    ``dtype``.

    Of numbers that were rounded to float16 and then to bfloat16, one in sixteen has another last bit than if it was
    rounded once.
    """
    (shape, numbers), (own_shape, own) = known, weights_of(model)
    same = sum(number == other for number, other in zip(numbers, own, strict=False))
    least = 0.75 if "float16" in (dtype, str(model.dtype).removeprefix("torch.")) else 1
    return list(shape) == own_shape and same >= least * min(len(numbers), len(own))


def name_of(model: PreTrainedModel) -> str:
    """What the model was loaded as, or its family where it was made in memory."""
    return model.config.name_or_path or text_config(model.config).model_type
