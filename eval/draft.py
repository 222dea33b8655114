"""The cut models as drafts for their teacher: what it accepts of their tokens, on text that evaluation has anyway.

B batch, S sequence, N positions, V vocabulary, D hidden.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.draft import MOST_DRAFTED, Acceptance, Drafts, DraftText, TextKind
from shoal.artifacts.evaluation import Interval
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.inference.prefix_sharing import even_batches
from shoal.models.load import Checkpoint
from shoal.progress import progress
from shoal.recipe.evaluate import Eval
from shoal.runtime import device, rank, together
from shoal.stats.drafting import accepted_along
from shoal.stats.paired import bootstrap_mean

from .evaluate import num_items, scores_of
from .harness.engine import CausalLM, connect_ranks
from .harness.item_cache import ItemCache, identity_of
from .harness.perplexity import windows
from .harness.tokenizer_check import tokenizer_difference

log = logging.getLogger(__name__)

Text = tuple[Sequence[int], Sequence[int]]
"""Tokens that are read, one at least, and those after them, at which a draft is judged."""


USUAL_TOKENS = 4
"""Tokens that a written answer is taken to have, for asking no more items than are needed."""


def measure_drafts(
    teacher: Checkpoint,
    drafts: Mapping[str, Checkpoint],
    settings: Eval,
    *,
    provenance: Provenance,
    tasks: dict[str, Any],
    seed: int,
    items: Path | None = None,
) -> Drafts:
    """What the teacher accepts of every draft's tokens. All ranks take part, and all get it.

    Texts are the windows of the perplexity and what the teacher, known as ``provenance.inputs["model"]``, writes for
    those of ``tasks`` that ask for text; what lies in the folder ``items`` is not written again. The teacher and one
    draft are in memory together.

    Raises:
        UserError: a draft of other tokens than the teacher's, or as evaluate does.
    """
    for role, checkpoint in drafts.items():
        trusted = teacher.load.trust_remote_code
        if difference := tokenizer_difference(checkpoint.folder, teacher.folder, trust_remote_code=trusted):
            field, of_draft, of_teacher = difference
            raise UserError(
                f"{checkpoint.folder}: {field} is {of_draft!r} in the tokenizer of {role}, but {of_teacher!r} in the "
                "teacher's; a draft has to have the teacher's tokens: choose another one, or set eval.draft: false"
            )
    model, tokenizer = teacher.model(device=device()), teacher.tokenizer()
    connect_ranks(model.device)
    identity = identity_of(provenance.inputs["model"], model)
    cache = ItemCache() if items is None else ItemCache(items, identity, rank=rank())
    lm = CausalLM(model, tokenizer, settings.batch_size, items=cache, called="draft")
    pieces = [(window.context, window.scored) for window in windows(tokenizer, settings)]
    texts: dict[TextKind, Sequence[Text]] = {"held_out": pieces[lm.rank :: lm.world_size]}
    written = _written(lm, tasks, settings, seed=seed)
    if any(together(lambda: bool(written))):
        texts["written"] = written
    decoder, roles = Decoder(model), {}
    for role, checkpoint in drafts.items():
        draft = Decoder(checkpoint.model(device=device()))
        roles[role] = tuple(
            _draft_text(kind, decoder, draft, own, called=f"draft: {role}", batch_size=settings.batch_size)
            for kind, own in texts.items()
        )
    return Drafts(provenance, roles)


def overlaps(
    teacher: Decoder, draft: Decoder, texts: Sequence[Text], *, batch_size: int, called: str = "draft"
) -> list[tuple[Tensor, Tensor]]:
    """Of every text, by position (N,): sum_x min(p, q) of both models' distributions, and whether first choices agree.

    In fp32; as 1 - half the sum of |p - q|, which is 1 to the last bit where the models are the same. Rows of the
    vocabulary that only one model has, padding as a rule, count as its own.
    """
    overlap_of: dict[int, tuple[Tensor, Tensor]] = {}
    rows = [[*read, *judged][:-1] for read, judged in texts]
    order = sorted(range(len(texts)), key=lambda index: -len(rows[index]))
    with progress(called, total=len(texts), unit="texts") as step:
        for batch in even_batches(
            order, batch_size, length=lambda index: len(rows[index]), enough_tokens=teacher.enough_tokens
        ):
            ids_BS = teacher.right_padded([rows[index] for index in batch])
            teacher_BSD, draft_BSD = teacher.hidden(ids_BS), draft.hidden(ids_BS)
            for place, index in enumerate(batch):
                judged = slice(len(texts[index][0]) - 1, len(rows[index]))
                overlap_of[index] = _overlap(teacher, draft, teacher_BSD[place, judged], draft_BSD[place, judged])
            step(len(batch))
    return [overlap_of[index] for index in range(len(texts))]


def _overlap(teacher: Decoder, draft: Decoder, teacher_ND: Tensor, draft_ND: Tensor) -> tuple[Tensor, Tensor]:
    shares, agree = [], []
    size = max(1, min(teacher.positions_at_once(), draft.positions_at_once()) // 2)
    for start in range(0, len(teacher_ND), size):
        p_NV = teacher.logits(teacher_ND[start : start + size]).softmax(dim=-1)
        q_NV = draft.logits(draft_ND[start : start + size]).softmax(dim=-1)
        agree.append(p_NV.argmax(dim=-1) == q_NV.argmax(dim=-1))
        both = min(p_NV.shape[1], q_NV.shape[1])
        apart_N = (p_NV[:, :both] - q_NV[:, :both]).abs().sum(dim=-1)
        apart_N += p_NV[:, both:].sum(dim=-1) + q_NV[:, both:].sum(dim=-1)
        shares.append((1 - apart_N / 2).clamp(min=0))
    return torch.cat(shares).cpu(), torch.cat(agree).cpu()


def _draft_text(
    kind: TextKind, teacher: Decoder, draft: Decoder, texts: Sequence[Text], *, called: str, batch_size: int
) -> DraftText:
    called = f"{called}, {kind.replace('_', ' ')} text"
    judged = overlaps(teacher, draft, texts, batch_size=batch_size, called=called)
    own = [(shares.tolist(), agree.tolist()) for shares, agree in judged]
    shares_of_texts = [text for part in together(lambda: own) for text in part]
    sampled, greedy = (acceptance([text[way] for text in shares_of_texts]) for way in (0, 1))
    log.info(
        "%s: %.3f [%.3f, %.3f] of its tokens are accepted, %.3f where both take their first choice",
        *(called, sampled.share.value, sampled.share.ci_low, sampled.share.ci_high, greedy.share.value),
    )
    return DraftText(kind, len(shares_of_texts), sum(len(shares) for shares, _ in shares_of_texts), sampled, greedy)


def acceptance(texts: Sequence[Sequence[float]]) -> Acceptance:
    """Of texts' chances by position: their mean with its interval over the texts, and what rounds accept."""
    means, weights = [math.fsum(text) / len(text) for text in texts], [float(len(text)) for text in texts]
    value = math.fsum(map(math.fsum, texts)) / math.fsum(weights)
    share = Interval(value, *bootstrap_mean(means, weights))
    return Acceptance(share, tuple(accepted_along(texts, count) for count in range(1, MOST_DRAFTED + 1)))


def _written(lm: CausalLM, tasks: dict[str, Any], settings: Eval, *, seed: int) -> list[Text]:
    """What the model writes for ``tasks`` of this rank's items: some of every task, with no more tokens in all than
    held-out text has."""
    texts: list[Text] = []
    lm.texts = texts
    generated = {name: task for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"}
    if not generated:
        return []
    # a rank without an item would be refused
    most = max(lm.world_size, math.ceil(settings.perplexity_tokens / USUAL_TOKENS / len(generated)))
    asked = num_items(tasks, settings)
    scores_of(lm, generated, replace(settings, limits={name: min(most, asked[name]) for name in generated}), seed=seed)
    some = [text for text in texts if text[1]]
    num_tokens = sum(len(judged) for _, judged in some) * lm.world_size
    return some[:: max(1, math.ceil(num_tokens / settings.perplexity_tokens))]
