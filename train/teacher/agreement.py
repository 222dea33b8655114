"""The engine that runs a teacher in place of transformers, let in once it says what the teacher says."""

from __future__ import annotations

import logging

from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.load import Checkpoint
from shoal.progress import doing
from shoal.recipe.distill import Record
from shoal.runtime import agreed, together

from .in_process import VllmEngine
from .prompt_scores import PromptEngine, Reference, bucket_kl, prompt_signals
from .recording_format import TokenRows
from .server import ServerEngine

log = logging.getLogger(__name__)


def agreeing(settings: Record, teacher: Checkpoint, rows: TokenRows, reference: Reference | None) -> PromptEngine:
    """The engine of ``settings``, which says of the first of ``rows`` what ``reference`` does. Every rank calls this;
    the first one compares.

    Raises:
        UserError: it is not there, or says something else.
    """
    length = rows.input_ids_NS.shape[1]
    opened: list[PromptEngine] = []
    together(lambda: opened.append(_opened(settings, teacher, length=length)))
    (engine,) = opened
    if settings.check is None:
        log.warning("%s: record.check is null, so that nothing shows whether it runs the teacher", engine.place)
        return engine
    assert reference is not None
    engine.about |= agreed(lambda: _compare(engine, settings, teacher, rows, reference))
    return engine


def _opened(settings: Record, teacher: Checkpoint, *, length: int) -> PromptEngine:
    if settings.server is None:
        return VllmEngine(settings, teacher, length=length)
    return ServerEngine(settings, length=length)


def _compare(
    engine: PromptEngine, settings: Record, teacher: Checkpoint, rows: TokenRows, reference: Reference
) -> dict[str, float]:
    """How far the engine is from the teacher, and of how many tokens that is the mean."""
    check = settings.check
    assert check is not None
    num_rows = -(-check.num_tokens // rows.input_ids_NS.shape[1])
    ids_NS, positions_NS = rows.input_ids_NS[:num_rows], rows.position_ids_NS[:num_rows]
    with doing("comparing the engine with the teacher"):
        # the teacher first: what it takes is free again before vLLM takes what there is
        hidden_NSD, to_logits = reference(ids_NS, positions_NS)
        vocab_size = text_config(teacher.config).vocab_size
        said = prompt_signals(engine, ids_NS, positions_NS, top_k=settings.top_k, vocab_size=vocab_size)
        kl = bucket_kl(said, hidden_NSD, to_logits)
    if not kl < check.max_kl:
        raise UserError(
            f"{engine.place}: does not say what the teacher says: {kl:.2g} nats of bucket KL per token from "
            f"{teacher.folder} over {ids_NS.numel():,} tokens, where record.check.max_kl allows {check.max_kl:g}. It "
            "runs another model, precision or quantisation; start it with the recipe's model, or allow more"
        )
    log.info("%s: %.2g nats of bucket KL from the teacher, over %s tokens", engine.place, kl, f"{ids_NS.numel():,}")
    return {"bucket_kl": kl, "compared_tokens": ids_NS.numel()}
