"""A teacher that vLLM runs in this process while signals are recorded, let in once it says what transformers computes.

Every document of a row is a prompt, since documents do not see each other. vLLM tells of every token of a prompt what
was likely in its place, and that token: entries that stand one place behind the position that predicts them. So a token
that nobody reads is put behind every document, and the last position is told of like the others.

Never run on a GPU: written from the code of vLLM's main branch of November 2026, and tested with a stand-in of its
interface whose answers are those of transformers.

B rows, S sequence, K tokens told of a position, N rows of a sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.inference.vllm import check_vllm, vllm_dtype, vllm_engine, vllm_version
from shoal.models.anatomy import text_config
from shoal.models.load import Checkpoint, logits_from_hidden
from shoal.progress import doing
from shoal.recipe.losses import ForwardKL
from shoal.runtime import device, free_memory

from ..objective.chunked_loss import CHUNK, TopK, chunked_head_loss
from ..objective.objective import final_hidden

log = logging.getLogger(__name__)

ROUNDED_TAIL = 1e-8
"""Least probability that what vLLM says leaves to all other words: its rounded log-probabilities may add up to more
than 1."""
SPARE_POSITIONS = 2
"""Positions that a document needs beside its own: for the token that nobody reads, and for the one that is written."""
TOKENS_AT_ONCE = 2048
"""Tokens of a forward: logits of all of them exist at one time, which vLLM does not reckon with."""
AT_ONCE = 64
"""Prompts that are handed over together; Python holds all that is told of them."""
COMPARED_TOKENS = 4096
"""Tokens of the first rows that vLLM and transformers both read, rounded up to whole rows."""
MAX_KL = 1e-3
"""Mean bucket KL in nats per token above which vLLM is refused."""
PLACE = "distill.teacher.backend: vllm"
TopTokens = tuple[Tensor, Tensor, Tensor]
"""Ids (B, S, K), most probable first, their log-probabilities (B, S, K) under the full softmax in fp32, and the
probability (B, S) of all others: one minus the rest, so it has few digits where that is all. On the CPU."""


class VllmTeacher:
    """The teacher in vLLM, loaded when it is first asked.

    Raises:
        UserError: vLLM is not installed, or several ranks would each start it.
    """

    def __init__(self, teacher: Checkpoint, *, top_k: int, length: int) -> None:
        check_vllm("distill.teacher.backend")
        self._teacher, self._top_k, self._length = teacher, top_k, length
        self.about: dict[str, Any] = {"engine": "vllm", "version": vllm_version(), "dtype": vllm_dtype(teacher)}
        """What recording.json says of it."""

    @cached_property
    def _llm(self) -> Any:
        return vllm_engine(
            self._teacher,
            seed=0,  # nothing of what is drawn is read
            max_logprobs=self._top_k,
            max_model_len=self._length + SPARE_POSITIONS,
            max_num_batched_tokens=TOKENS_AT_ONCE,
            enable_prefix_caching=False,
        )

    def says(
        self, ids_BS: Tensor, positions_BS: Tensor, *, tell: Callable[[int], object] = lambda rows: None
    ) -> TopTokens:
        """What it says of rows of packed documents; ``tell`` is told of every row that is done.

        Raises:
            UserError: it tells of too few tokens, or of others than the teacher has.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        how = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=self._top_k, detokenize=False)
        rows, length = ids_BS.shape
        ids, log_probs = np.empty((rows, length, self._top_k), np.int64), np.empty((rows, length, self._top_k))
        places = [
            (row, start, stop)
            for row, positions in enumerate(positions_BS.numpy())
            for start, stop in pairwise([*(0, *(1 + np.flatnonzero(positions[1:] == 0))), length])
        ]
        for part in (places[first : first + AT_ONCE] for first in range(0, len(places), AT_ONCE)):
            prompts = [[*ids_BS[row, start:stop].tolist(), int(ids_BS[row, stop - 1])] for row, start, stop in part]
            asked = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = self._llm.generate(asked, how, use_tqdm=False)
            for (row, start, stop), prompt, output in zip(part, prompts, outputs, strict=True):
                ids[row, start:stop], log_probs[row, start:stop] = self._read(prompt, output.prompt_logprobs)
                tell(int(stop == length))
        tail = np.clip(1 - np.exp(log_probs).sum(-1), ROUNDED_TAIL, None)
        return torch.from_numpy(ids), torch.from_numpy(log_probs).float(), torch.from_numpy(tail).float()

    def _read(self, prompt: Sequence[int], answer: Sequence[Mapping[int, Any] | None]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (S, K) and log-probabilities (S, K) of the positions before the last.

        The token that stands there is told of even where it is not among the likeliest: then it is one entry more, the
        least.
        """
        told = [sorted((entries or {}).items(), key=lambda pair: -pair[1].logprob) for entries in answer[1:]]
        known = range(text_config(self._teacher.config).vocab_size)
        best = [[token for token, _ in pairs[: self._top_k] if token in known] for pairs in told]
        if len(answer) != len(prompt) or min(map(len, best)) < self._top_k:
            raise UserError(
                f"{PLACE}: vLLM returned fewer than {self._top_k} log-probabilities at a position of a prompt of "
                f"{len(prompt)} tokens; lower distill.teacher.top_k, or set backend: transformers"
            )
        log_probs = [[entry.logprob for _, entry in pairs[: self._top_k]] for pairs in told]
        return np.array(best), np.array(log_probs)


def agreeing(teacher: Checkpoint, rows: PackedRows, *, top_k: int) -> VllmTeacher:
    """The teacher in vLLM, which says of the first of ``rows`` what transformers computes.

    Raises:
        UserError: as VllmTeacher does; it says something else.
    """
    length = rows.input_ids_NS.shape[1]
    ours = VllmTeacher(teacher, top_k=top_k, length=length)
    num_rows = -(-COMPARED_TOKENS // length)
    ids_NS, positions_NS = rows.input_ids_NS[:num_rows], rows.position_ids_NS[:num_rows]
    with doing("comparing vLLM with transformers"):
        # transformers first: what it takes is free again before vLLM takes what there is
        hidden_ND, to_logits = _computed(teacher, ids_NS, positions_NS)
        free_memory()
        kl = _bucket_kl(ours.says(ids_NS, positions_NS), hidden_ND, to_logits)
    if not abs(kl) < MAX_KL:  # what are no log-probabilities may be apart by less than nothing
        raise UserError(
            f"{PLACE}: vLLM and transformers disagree about the teacher {teacher.folder}: {kl:.2g} nats of bucket KL "
            f"per token over {ids_NS.numel():,} tokens, and {MAX_KL:g} are allowed; set backend: transformers"
        )
    log.info("%s: %.2g nats per token of bucket KL from the teacher, over %s tokens", PLACE, kl, f"{ids_NS.numel():,}")
    ours.about |= {"bucket_kl": kl, "compared_tokens": ids_NS.numel()}
    return ours


@torch.no_grad()
def _computed(teacher: Checkpoint, ids_NS: Tensor, positions_NS: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Final states (N S, D) of transformers, and the way from them to logits, all on the CPU."""
    model = teacher.model(device=device())
    rows = zip(ids_NS.long().to(device()).split(1), positions_NS.long().to(device()).split(1), strict=True)
    hidden_NSD = torch.cat([final_hidden(model, *row).cpu() for row in rows])
    to_logits, head = logits_from_hidden(model, prepared=True), model.get_output_embeddings()
    assert head is not None
    head = head.cpu()
    return hidden_NSD.flatten(0, 1), lambda hidden: to_logits(hidden, head).float()


@torch.no_grad()
def _bucket_kl(said: TopTokens, hidden_ND: Tensor, to_logits: Callable[[Tensor], Tensor]) -> float:
    """Mean KL(vLLM || teacher) in nats per token, of the K tokens that vLLM tells of and all others as one."""
    ids_NK, log_probs_NK, tail_N = (plane.flatten(0, 1) for plane in said)
    loss, _ = chunked_head_loss(
        hidden_ND,
        ids_NK[:, 0],
        TopK(ids_NK, log_probs_NK, 1.0, tail_N),
        student_head=to_logits,
        student_parameters=(),
        terms=(ForwardKL(),),
        chunk=CHUNK,
    )
    return float(loss) / len(ids_NK)
