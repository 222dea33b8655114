"""lm-eval's own model over vLLM, for checkpoints that are finished, with what scores ask of engine.py's besides.

Never run on a GPU: tested with a stand-in of vLLM's interface whose answers are those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shoal.inference.vllm import end_engine, vllm_dtype
from shoal.models.load import Checkpoint
from shoal.runtime import free_memory

from .engine import CausalLM, Ending


@contextmanager
def vllm_lm(checkpoint: Checkpoint, *, seed: int) -> Iterator[Any]:
    """The model of ``checkpoint`` as lm-eval asks vLLM for it, until the block ends; then its memory is free."""
    from lm_eval.models import vllm_causallms  # imports vllm

    theirs: Any = vllm_causallms.VLLM

    class VllmLM(theirs):
        engine = "vllm"
        apply_chat_template = CausalLM.apply_chat_template
        count_tokens = CausalLM.count_tokens
        log_likelihoods = CausalLM.log_likelihoods
        gather_object = CausalLM.gather_object
        endings: dict[tuple[str, str], Ending] = {}  # noqa: RUF012 - vLLM's texts are counted anew

    lm = VllmLM(
        pretrained=str(checkpoint.folder),
        dtype=vllm_dtype(checkpoint),
        trust_remote_code=checkpoint.load.trust_remote_code,
        seed=seed,
    )
    try:
        yield lm
    finally:
        end_engine(lm.model)
        del lm
        free_memory()
