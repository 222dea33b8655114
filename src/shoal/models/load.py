"""Load and save causal language models."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from shoal.errors import UserError
from shoal.machine import available_memory, device_memory, ranks_on_this_node
from shoal.models import checkpoint_files as files
from shoal.models.anatomy import text_config
from shoal.models.attention import implementation
from shoal.models.checkpoint_files import DOWNLOAD_AGAIN
from shoal.models.families import family
from shoal.models.hub_kernels import DEQUANTISED, from_pretrained, quantisation
from shoal.progress import doing
from shoal.ranks import rank, world_size

log = logging.getLogger(__name__)

ALIGNMENT = 64
"""Bytes; torch gives every tensor it makes on the CPU an address that is a multiple of this."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Plain floating-point dtypes by their names in safetensors files."""
SAID = {
    "trust_remote_code": files.NEEDS_CODE,
    "model type": files.UNKNOWN_TYPE,
    "Unrecognized configuration class": files.NOT_CAUSAL,
    "attn_implementation": "does not have the attention that the recipe sets; set attn_implementation: auto",
    "ignore_mismatched_sizes": files.WRONG_SHAPES,
    "negative dimension": f"config.json gives a negative size; {DOWNLOAD_AGAIN}",
}
"""Words of a library's error -> what they mean."""


@contextmanager
def _explained(name: object, otherwise: str) -> Iterator[None]:
    """Turn what a library raises over the files or the settings of ``name`` into a UserError: what SAID knows, or
    ``otherwise`` with the reason in place of {}."""
    try:
        yield
    except Exception as error:  # no code foresaw these files, so it is of any kind; tokenizers raise plain Exception
        known = next((words for part, words in SAID.items() if part in str(error)), None)
        if isinstance(error, UserError) or (isinstance(error, RuntimeError) and known is None):  # memory, or a device
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{name}: {known or otherwise.format(reason)}") from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at ``folder``; without a pad token that the model can read it pads with its end token.

    Padding is masked wherever shoal pads, so the choice of token changes no number.

    Raises:
        UserError: none there, a damaged one, one that needs code, one with neither pad nor end token, or with more
            tokens than the model beside it has embeddings.
    """
    files.refuse_no_tokenizer(folder)  # of some families transformers would make one that knows no word
    with _explained(folder, files.NO_TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}")
        tokenizer("a")  # a class may not fit its files
    rows = _embedding_rows(folder, tokenizer, trust_remote_code=trust_remote_code)
    if rows is not None:
        refuse_ids_beyond(rows, tokenizer, str(folder))
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        pad_with_end(tokenizer, str(folder))
    return tokenizer


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """What makes a model's inputs of images and text, from the files at ``folder``.

    Raises:
        UserError: none there, one that reads no images, or one that needs a package that is not installed.
    """
    remedy = (
        "no usable image processor ({}); copy processor_config.json or preprocessor_config.json of the base model "
        "there, or install the missing package"
    )
    with _explained(folder, remedy):
        processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not hasattr(processor, "image_processor"):
            raise ValueError("it reads only text")
    return processor


def pad_with_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Let ``tokenizer``, called ``name`` in messages, pad with its end token."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: {files.NO_END}")
    tokenizer.pad_token = tokenizer.eos_token


def _embedding_rows(folder: Path, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool) -> int | None:
    """Rows of embeddings of the model at ``folder``, where the tokenizer has ids beyond them; None where all fit, or
    where there is no model."""
    if not (folder / "config.json").is_file():
        return None
    config, largest = load_config(folder, trust_remote_code=trust_remote_code), max(tokenizer.get_vocab().values())
    if largest < text_config(config).vocab_size:
        return None
    # some families have more rows than their vocabulary says
    embeddings: Any = without_data(config, trust_remote_code=trust_remote_code).get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    return rows if largest >= rows else None


def refuse_ids_beyond(rows: int, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer, called ``name`` in messages, that makes ids from ``rows`` on out of text.

    Published checkpoints have special tokens beyond their embeddings that no text holds: for padding, or for images.
    One that has such tokens refuses from now on each text that holds one.
    """
    fast: Any = tokenizer
    ids, added, template = fast.get_vocab(), fast.get_added_vocab(), str(fast.chat_template or "")
    used = {fast.bos_token, fast.eos_token, fast.unk_token}
    beyond = [
        token for token in ids if ids[token] >= rows and (token not in added or token in used or token in template)
    ]
    if beyond:
        worst = max(beyond, key=lambda token: ids[token])
        raise UserError(
            f"{name}: the tokenizer's largest token id is {ids[worst]:,} ({worst!r}), but the model has embeddings "
            f"only for the ids 0 to {rows - 1:,}; give the tokenizer that the model was trained with, or resize the "
            "embeddings"
        )
    setattr(tokenizer, "_encode_plus", partial(_encoded_below, rows, name, tokenizer))  # noqa: B010


def _encoded_below(rows: int, name: str, tokenizer: Any, *args: Any, **settings: Any) -> Any:
    """What ``tokenizer`` makes of texts, all of it ids below ``rows``."""
    encoded = type(tokenizer)._encode_plus(tokenizer, *args, **settings)
    if (largest := max((int(np.max(ids)) for ids in encoded["input_ids"] if np.size(ids)), default=0)) >= rows:
        raise UserError(
            f"{name}: a text holds {tokenizer.convert_ids_to_tokens(largest)!r} (token id {largest:,}), but the model "
            f"has only {rows:,} embeddings; remove it from the text, give the tokenizer that the model was trained "
            "with, or resize the embeddings"
        )
    return encoded


def load_model(
    folder: Path,
    *,
    dtype: str = "stored",
    attention: str | None = "sdpa",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    hub_kernels: bool = False,
    offload: Path | None = None,
) -> PreTrainedModel:
    """The causal language model at ``folder`` in eval mode, from safetensors only; with the tower that reads images
    where `reads_images` says so. With ``offload``, a folder, weights that ``device`` has no room for wait in memory or
    on disk for their turn in every forward (accelerate's dispatch); such a model can be run and not changed.

    ``dtype``: a name of torch's, or stored = that of the checkpoint. ``attention``: as in a recipe but for auto; None =
    SDPA where the family has it, else eager. ``hub_kernels``: as in a recipe.

    Raises:
        UserError: an architecture this transformers does not know, remote code without consent, a damaged file, weights
            that do not fit the configuration or are missing: transformers would fill those with random numbers.
    """
    files.check_checkpoint(folder)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    placed: dict[str, Any] = {}
    if offload is not None and (rooms := rooms_to_share(folder, config, dtype, torch.device(device))):
        placed = {"device_map": "auto", "max_memory": rooms, "offload_folder": offload}
    elif torch.device(device).type != "cpu":
        placed = {"device_map": {"": str(device)}}  # straight there: eight ranks would need eight copies on the host
    remedy = f"transformers cannot load it as a causal language model ({{}}); give another model, or {DOWNLOAD_AGAIN}"
    with _explained(folder, remedy), doing(f"loading {folder}"):
        loaded: Any = from_pretrained(
            automatic_class(config),
            folder,
            stored=config,
            hub_kernels=hub_kernels,
            dtype=named_dtype(dtype) or "auto",
            attn_implementation=implementation(attention, config, hub_kernels=hub_kernels),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **placed,
        )
    model, report = loaded
    files.refuse_incomplete(folder, model.config.model_type, report["missing_keys"])
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s: ignores %d tensors that do not belong to the model (%s, ...)", folder, len(unused), unused[0])
    return model.eval()  # never moved: what ZeRO 3 has dealt out over GPUs would lie on the CPU


def named_dtype(name: str) -> torch.dtype | None:
    """The dtype that torch calls ``name``; None for `stored`, which each checkpoint says itself."""
    return None if name == "stored" else getattr(torch, name)


def loaded_dtype(config: PreTrainedConfig, wanted: str = "stored", shards: Iterable[files.Shard] = ()) -> torch.dtype:
    """The precision of a model of ``config`` that is loaded as ``wanted``: a name of torch's, or "stored".

    Stored is what transformers takes it for: what config.json says, else the first floating-point tensor of ``shards``;
    float32 where there is none.
    """
    if named := named_dtype(wanted):
        return named
    if said := getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None):
        return said
    floats = (FLOATS[tensor.dtype] for shard in shards for tensor in shard.tensors.values() if tensor.dtype in FLOATS)
    return next(floats, torch.float32)


def loaded_bytes(folder: Path, config: PreTrainedConfig, wanted: str = "stored") -> int:
    """Bytes of the weights in ``folder`` in the precision that they are loaded in; quantised ones stay as stored, but
    for formats that need kernels of the Hub."""
    shards = files.read_shards(folder)
    size = loaded_dtype(config, wanted, shards).itemsize
    method = quantisation(config)
    stored = sum(
        part.end - part.start if method or part.dtype not in FLOATS else size * math.prod(part.shape)
        for shard in shards
        for part in shard.tensors.values()
    )
    return stored * DEQUANTISED.get(method, 1)


ROOM = 0.8
"""Share of free memory that weights may take."""


def rooms_to_share(folder: Path, config: PreTrainedConfig, dtype: str, device: torch.device) -> dict[int | str, int]:
    """Bytes by device that weights may take where ``device`` has no room for all of them; empty where it has."""
    rooms: dict[int | str, int] = {"cpu": int(ROOM * available_memory() / ranks_on_this_node())}
    if device.type != "cpu":
        rooms = {device.index or 0: int(ROOM * device_memory(device)), **rooms}
    return {} if loaded_bytes(folder, config, dtype) <= next(iter(rooms.values())) else rooms


@dataclass(frozen=True)
class LoadSettings:
    """How checkpoints are loaded."""

    dtype: str = "stored"
    """Name of torch's for the precision of the weights; stored = that of the checkpoint."""
    attention: str = "sdpa"
    """Kernels of attention as in a recipe, but for auto (see shoal.models.attention)."""
    trust_remote_code: bool = False
    hub_kernels: bool = False
    """Whether transformers may compute parts of the model with kernels that it downloads."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in a folder, as its configuration tells of it before any weight is read."""

    folder: Path
    config: PreTrainedConfig
    load: LoadSettings = LoadSettings()

    @classmethod
    def read(cls, folder: Path, load: LoadSettings) -> Checkpoint:
        """The checkpoint at ``folder``."""
        return cls(folder, load_config(folder, trust_remote_code=load.trust_remote_code), load)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Precision of the weights in the files."""
        return self.loaded_dtype("stored")

    def loaded_dtype(self, wanted: str | None = None) -> torch.dtype:
        """Precision that the weights are loaded in, where it is ``wanted`` in place of that of the settings.

        The files are read only where config.json does not say.
        """
        return loaded_dtype(self.config, wanted or self.load.dtype, self._headers())

    def _headers(self) -> Iterator[files.Shard]:
        if any(self.folder.glob("*.safetensors")):  # none of a student that is still to be written
            yield from files.read_shards(self.folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; raises as load_tokenizer does."""
        return load_tokenizer(self.folder, trust_remote_code=self.load.trust_remote_code)

    def model(self, *, dtype: str | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model in eval mode, in ``dtype`` where that is given; raises as load_model does."""
        return load_model(
            self.folder,
            dtype=dtype or self.load.dtype,
            attention=self.load.attention,
            device=device,
            trust_remote_code=self.load.trust_remote_code,
            hub_kernels=self.load.hub_kernels,
        )


@torch.inference_mode(mode=False)  # the model stays one that can be trained, wherever this is called
def align_weights(model: nn.Module) -> None:
    """Move weights that are mapped from a file to memory of their own wherever they lie at an odd address there.

    Kernels may add up in another order at another alignment, and two files with the same tensors need not have them at
    the same offsets. Whoever compares two models bit for bit calls this for both.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def refuse_broken_weights(models: Mapping[str, nn.Module | None]) -> None:
    """Refuse models, by what they are called, whose weights are no numbers. Every rank looks at what it holds."""
    for called, model in models.items():
        for name, parameter in () if model is None else model.named_parameters():
            held = _held(parameter)
            if held.is_meta or not held.numel() or not held.is_floating_point() or held.itemsize == 1:
                continue
            # which makes no copy, and gives a NaN for both where there is one
            if not torch.stack(held.aminmax()).isfinite().all():
                raise UserError(f"{called}: {name} holds NaN or infinite numbers; {DOWNLOAD_AGAIN}")


def not_finite_in(dtype: torch.dtype) -> str:
    """Where numbers of a model are not finite, and what to do: a dtype with a wider range or more digits, if any."""
    wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(dtype)
    change = f"set dtype: {wider} in the recipe, or " if wider else ""
    return f"in {dtype}; {change}check the weights for damage"


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of ``parameter``: under ZeRO 3 its share, whose end may be padding of any bits, and nothing
    of one that lies on a disk or is shared in another way."""
    share = getattr(parameter, "ds_tensor", None)
    if share is None:
        return parameter.detach()
    whole: int = parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
    is_plain = share.numel() * world_size() >= whole
    return share.flatten()[: max(0, whole - rank() * share.numel()) if is_plain else 0]


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration at ``folder``, for checks that must not wait for weights.

    Raises:
        UserError: one that transformers cannot read, or of no model that writes text from left to right.
    """
    files.check_config(folder)  # shows what is wrong before transformers makes a list of layers
    with _explained(folder, f"config.json cannot be used ({{}}); correct it, or {DOWNLOAD_AGAIN}"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether a model of ``config`` is loaded with the tower through which it reads images."""
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    with_tower = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return has_no_text_model(config) or (text is not None and text == with_tower)


def has_no_text_model(config: PreTrainedConfig) -> bool:
    """Whether transformers has models of this type that read images, and no text model, or one that cannot be loaded
    again once saved."""
    if config.model_type not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or config.is_encoder_decoder:
        return False
    alone = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return not alone or family(text_config(config).model_type).with_images


def automatic_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds and loads models of ``config``."""
    return AutoModelForImageTextToText if has_no_text_model(config) else AutoModelForCausalLM


def before_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that final hidden states pass through before the linear head; None = none, as nearly everywhere."""
    prepares = family(text_config(model.config).model_type).head_prepares
    return model.get_submodule("lm_head") if prepares else None


def logits_from_hidden(
    model: PreTrainedModel, *, prepared: bool = False
) -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
    """The model's own way from final hidden states (..., D) to logits (..., V), given the head or its linear map.

    ``prepared``: the states have passed through `before_head` already.

    Some families scale or soft-cap what the head returns; a loss or score that takes hidden states to the head by
    itself and forgets this is silently wrong (Cohere's and Granite's scale, Gemma 2's soft-cap). Inkling divides what
    the head reads, and has no logits for the padding of its vocabulary.
    """
    config = text_config(model.config)
    prepare = None if prepared else before_head(model)
    scale = divisor = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    if config.model_type.startswith("hyperclovax"):
        scale *= config.logits_scaling
    else:
        divisor = getattr(config, "logits_scaling", None) or 1.0
    caps = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
    cap = next(filter(None, (getattr(config, name, None) for name in caps)), None)
    width, words = (
        (config.logits_mup_width_multiplier, config.unpadded_vocab_size)
        if config.model_type == "inkling_text"
        else (1.0, None)
    )

    def logits(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        if width != 1.0:
            hidden = hidden / width
        raw = head(hidden if prepare is None else prepare(hidden))[..., :words]
        if scale != 1.0:
            raw = raw * scale
        if divisor != 1.0:
            raw = raw / divisor
        return raw if cap is None else cap * torch.tanh(raw / cap)

    return logits


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def without_data(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """The causal language model of ``config`` on the meta device, in eval mode; ``settings`` go to its constructor.

    Raises:
        UserError: transformers has no causal language model of that type, or needs a package that is not installed.
    """
    remedy = "cannot be built from config.json ({}); correct it, or install the package that it needs"
    with _explained(config.model_type, remedy):
        with torch.device("meta"), no_init_weights():
            # transformers writes precision and attention into what it is given
            model = automatic_class(config).from_config(copy.deepcopy(config), **settings)
        model.tie_weights()  # is part of the initialisation that was left out
    return model.eval()
