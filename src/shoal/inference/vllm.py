"""vLLM over a finished checkpoint: whether it can run here, and the engine, in the precision that shoal reads it in."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from shoal.errors import UserError
from shoal.ranks import world_size

if TYPE_CHECKING:
    from shoal.models.load import Checkpoint


def check_vllm(setting: str) -> None:
    """Refuse vLLM where it cannot run, before models are loaded. ``setting`` asks for it.

    Raises:
        UserError: vLLM is not installed, or several ranks would each start it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"{setting}: vllm is not installed; install it, or set backend: transformers")
    if world_size() > 1:
        raise UserError(
            f"{setting}: vllm manages its own processes and cannot run under {world_size()} ranks; run this stage "
            "once without a launcher (any number of ranks can read its result), or set it to transformers"
        )


def vllm_version() -> str:
    """Version of vLLM that is installed here."""
    return importlib.metadata.version("vllm")


def vllm_dtype(checkpoint: Checkpoint) -> str:
    """Precision in which vLLM runs ``checkpoint``: the one that transformers would load it in."""
    return str(checkpoint.loaded_dtype()).removeprefix("torch.")


def vllm_engine(checkpoint: Checkpoint, *, seed: int, **settings: Any) -> Any:
    """A vllm.LLM of ``checkpoint``, with further ``settings`` of it. vLLM takes "auto" of a float32 checkpoint for
    float16, so it is told the precision."""
    from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    return LLM(
        model=str(checkpoint.folder),
        dtype=vllm_dtype(checkpoint),
        trust_remote_code=checkpoint.load.trust_remote_code,
        seed=seed,
        **settings,
    )


def end_engine(engine: Any) -> None:
    """End the process of a vllm.LLM, which else holds its memory until Python collects it."""
    engine.llm_engine.engine_core.shutdown()
