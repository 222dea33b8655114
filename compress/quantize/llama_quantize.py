"""llama.cpp's quantiser: the checkpoint as a proven GGUF file in full precision, then that one in fewer bits."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.machine import num_cores
from shoal.models.checkpoint_files import copy_beside
from shoal.models.load import Checkpoint
from shoal.progress import doing
from shoal.recipe.track import Format

from ..targets.gguf import export_gguf


def save_gguf(source: Checkpoint, folder: Path, format: Format) -> None:
    """One GGUF file of ``source`` in ``folder``, with the configuration that tells its size and its positions.

    Tensors whose rows a format cannot divide into its blocks are put into a larger one by llama.cpp itself.

    Raises:
        UserError: as export_gguf, or the quantiser failed.
    """
    import llama_cpp

    binding: Any = llama_cpp
    whole, path = folder / "whole.gguf", folder / f"model-{format}.gguf"
    export_gguf(source.folder, whole)
    settings = binding.llama_model_quantize_default_params()
    settings.ftype = getattr(binding, f"LLAMA_FTYPE_MOSTLY_{format.upper()}")
    settings.nthread = num_cores()
    with doing(f"quantising to {format}"):
        failed = binding.llama_model_quantize(bytes(whole), bytes(path), ctypes.byref(settings))
    if failed or not path.is_file():
        raise UserError(
            f"{source.folder}: llama.cpp cannot quantise it to {format} (code {failed}); choose another format"
        )
    whole.unlink()
    copy_beside(source.folder, folder, ("config.json", "generation_config.json"))
