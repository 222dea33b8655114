"""One checkpoint to one format: who does it, what it is calibrated on, what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from torch import Tensor

from shoal.artifacts.artifact import Json, Provenance
from shoal.artifacts.evaluation import Quantized
from shoal.errors import UserError
from shoal.models.checkpoint_files import checkpoint_bytes, copy_beside, model_fingerprint
from shoal.models.load import Checkpoint, has_no_text_model
from shoal.progress import doing
from shoal.recipe.track import CompressorFormat, Format, is_gguf
from shoal.runtime import device

from ..surgery.quantised import without_quantization
from ..targets.gguf import check_export, refuse_gguf
from .compressor import save_compressed
from .formats import CALIBRATED, check_format, library_of
from .in_transformers import save_quantised
from .llama_quantize import save_gguf


def check_quantisable(source: Checkpoint, format: Format, setting: str) -> None:
    """Refuse, before any work, what could not be put into ``format``; ``setting`` is what names it.

    Raises:
        UserError: no library for it here, weights that are quantised already, a model that reads images, or one that
            llama.cpp cannot run.
    """
    if has_no_text_model(source.config):
        raise UserError(
            f"{setting}: {source.folder} reads images ({source.config.model_type}), and shoal makes no quantised "
            "copies of such models; leave it out"
        )
    check_format(format, setting)
    if without_quantization(source.config)[1]:
        raise UserError(
            f"{source.folder}: is quantised already; give the full-precision model, or leave out the section quantize"
        )
    if is_gguf(format):
        check_export(source.config)
        refuse_gguf(source.config)


def quantised_copy(
    source: Checkpoint,
    folder: Path,
    format: Format,
    *,
    role: str,
    group_size: int,
    calibration: Callable[[], Tensor],
    inputs: dict[str, Json],
) -> Quantized:
    """What is made of ``source``, the model of ``role``, in ``folder``: weights, configuration and tokenizer.

    ``calibration`` gives token ids (B, S), and is asked where the format takes text.
    """
    started = time.monotonic()
    rows_BS = calibration() if format in CALIBRATED else None
    with doing(f"quantising {source.folder} to {format}"):
        if is_gguf(format):
            save_gguf(source, folder, format)
        elif format in get_args(CompressorFormat):
            save_compressed(source, folder, format, group_size=group_size, rows_BS=rows_BS, device=device())
        else:
            save_quantised(source, folder, format, group_size=group_size, device=device())
    copy_beside(source.folder, folder)
    record = Quantized(
        Provenance(inputs),
        source=role,
        format=format,
        library=library_of(format).version,
        num_bytes=checkpoint_bytes(folder),
        source_bytes=checkpoint_bytes(source.folder),
        num_tokens=0 if rows_BS is None else rows_BS.numel(),
        seconds=time.monotonic() - started,
        content=model_fingerprint(folder),
    )
    record.write(folder / Quantized.FILE)
    return record
