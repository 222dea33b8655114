"""On-policy training: in some steps the student learns from what it writes itself, judged by the teacher.

GKD (Agarwal et al. 2024, arXiv 2306.13649). Trained on the data alone a student is never shown its own mistakes, and at
inference it goes on from them. So with probability lambda the rows of a step are replaced by continuations that the
student samples with its present weights; the objective is the same, over the sampled tokens only, and no gradient flows
through the sampling.

A sample that has fallen into a loop teaches nothing there: given two copies of a piece a teacher mostly expects the
third, and then agrees with all that follows. So what stands behind the second copy is not learnt; in the second copy
the teacher still tells the way out.

B rows, S sequence, P prompts, T new tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.data.packing import IGNORED
from shoal.data.repetition import Loop, loop_at_end
from shoal.inference.generation import end_tokens, sample
from shoal.models.anatomy import decoder_layers
from shoal.recipe.distill import Distill, OnPolicy
from shoal.runtime import queued, together

from .objective.host_batch import ON_HOST, OnHost, on_host

LONGEST_PERIOD = 64
"""Most tokens of a piece whose copies make a loop."""


@dataclass(frozen=True)
class Sampler:
    """Turns the micro-batches of a step into samples of the student.

    Everything random follows from the seed, the step and the number of the row that a sample stands in for: the same
    weights give the same samples after a resume, and however rows are dealt to micro-batches and
    ranks.
    """

    settings: OnPolicy
    seed: int
    sequence_length: int
    end_ids: tuple[int, ...]
    """Token ids that end a text."""
    pad_id: int
    bos_id: int | None = None
    """Token id that the model's documents start with; None = nothing."""

    @classmethod
    def of(
        cls, settings: Distill, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int
    ) -> Sampler | None:
        """That of a training; None = it has no on-policy step."""
        if settings.on_policy is None:
            return None
        ends = end_tokens(student.generation_config, tokenizer.eos_token_id)
        special: Any = tokenizer
        start = special.bos_token_id
        begins = start is not None and special("a")["input_ids"][:1] == [start]
        padding = special.pad_token_id if special.pad_token_id is not None else (*ends, 0)[0]
        return cls(settings.on_policy, seed, settings.sequence_length, ends, padding, start if begins else None)

    @cached_property
    def counts(self) -> LoopCounts:
        """What the curves tell of samples: all that here changes from step to step."""
        return LoopCounts()

    def replaces(self, step: int, num_steps: int) -> bool:
        """Whether step number ``step``, counted from 0, of ``num_steps`` trains on samples; the same on every rank."""
        if step < self.settings.start * num_steps:
            return False
        return random.Random(f"on_policy/{self.seed}/{step}").random() < self.settings.share

    def batches(
        self, student: PreTrainedModel, batches: Sequence[Mapping[str, Any]], *, step: int
    ) -> list[dict[str, Any]]:
        """The micro-batches with as many rows of samples in place of their rows: labels on sampled tokens only, up to
        the end of a loop's second copy; ``counts`` learns of them.

        ``student`` is an ordinary model here, with its own forward, whole on every rank and under the precision that
        training computes in; every rank calls this with as many micro-batches.
        """
        written = [self._sampled(student, batch, step=step) for batch in batches]
        samples = [samples_in(on_host(batch)) for batch in written]
        self.counts.observe([sample for of_batch in samples for sample in of_batch], end_ids=self.end_ids)
        return [without_repeats(batch, own) for batch, own in zip(written, samples, strict=True)]

    def _sampled(self, student: PreTrainedModel, batch: Mapping[str, Any], *, step: int) -> dict[str, Any]:
        host = on_host(batch)
        assert host.input_ids_BS is not None
        planes = [plane.numpy() for plane in (host.input_ids_BS, host.position_ids_BS, host.labels_BS)]
        prompts: list[list[list[int]]] = []
        uniforms: list[np.ndarray] = []
        for row, number in enumerate(host.rows):
            chance = np.random.default_rng([self.seed, step, number])
            prompts.append(self._prompts(*(plane[row] for plane in planes), chance=chance))
            uniforms.append(chance.random((len(prompts[-1]), self.settings.max_new_tokens)))
        written = iter(
            sample(
                student,
                [prompt for in_row in prompts for prompt in in_row],
                torch.from_numpy(np.concatenate(uniforms)),
                temperature=self.settings.temperature,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
            )
        )
        rows = [[(prompt, next(written)) for prompt in in_row] for in_row in prompts]
        laid_out = lay_out(rows, sequence_length=self.sequence_length, pad_id=self.pad_id)
        device = batch["input_ids"].device
        return {**{name: queued(plane, device) for name, plane in laid_out.items()}, ON_HOST: on_host(laid_out)}

    def _prompts(
        self, ids: np.ndarray, positions: np.ndarray, labels: np.ndarray, *, chance: np.random.Generator
    ) -> list[list[int]]:
        """What the student goes on from in place of one row: prompts for about as many tokens, at least one.

        Of running text that is the opening of every document and, where a document is longer than a sample, of its
        further parts; of a conversation all that stands before one of the assistant's turns, drawn by chance.
        """
        candidates: list[list[int]] = []
        for start, end in pairwise([*np.flatnonzero(positions == 0), len(ids)]):
            document, learnt = ids[start:end], labels[start:end] != IGNORED
            if learnt[1:].all():
                candidates += self._openings(document.tolist())
                continue
            turns = np.flatnonzero(learnt[1:] & ~learnt[:-1]) + 1
            turns = turns[turns > 1]  # a turn that begins before the row does has nothing to answer to
            if len(turns):
                candidates.append(document[: chance.choice(turns)].tolist())
        chosen: list[list[int]] = []
        room = self.sequence_length
        for place in chance.permutation(len(candidates)):
            needed = len(candidates[place]) + self.settings.max_new_tokens
            if needed <= room or not chosen:  # a sample that is longer than a row is cut at the row's end
                chosen.append(candidates[place])
                room -= needed
        return chosen or [ids[:1].tolist()]

    def _openings(self, document: list[int]) -> list[list[int]]:
        prompt_tokens = min(self.settings.prompt_tokens, max(1, self.sequence_length - self.settings.max_new_tokens))
        start_token = [] if document[0] != self.bos_id else document[:1]
        openings = [document[: min(prompt_tokens, len(document) - 1)]]  # without the end token
        apart = prompt_tokens + self.settings.max_new_tokens
        for start in range(apart, len(document) - prompt_tokens, apart):
            openings.append((start_token + document[start : start + prompt_tokens])[:prompt_tokens])
        return [opening for opening in openings if opening]


def lay_out(
    rows: Sequence[Sequence[tuple[list[int], list[int]]]], *, sequence_length: int, pad_id: int
) -> dict[str, Tensor]:
    """Rows of (prompt, continuation) pairs as planes (B, S): every pair a document from position 0, labels on
    continuations.

    Rows are as long as the longest of them; what fills the others is a document of its own that nobody learns.
    """
    laid_out: list[list[tuple[int, int, int]]] = []
    for row in rows:
        tokens: list[tuple[int, int, int]] = []
        for prompt, continuation in row:
            labels = [IGNORED] * len(prompt) + continuation
            tokens += [(token, at, labels[at]) for at, token in enumerate([*prompt, *continuation])]
        laid_out.append(tokens[:sequence_length])
    width = max(map(len, laid_out))
    padded = [row + [(pad_id, at, IGNORED) for at in range(width - len(row))] for row in laid_out]
    batch_BS3 = torch.tensor(padded)
    return {name: batch_BS3[..., i].contiguous() for i, name in enumerate(("input_ids", "position_ids", "labels"))}


@dataclass(frozen=True)
class Sample:
    """A text of the student as it stands in a row: what did not fit there does not count."""

    row: int
    start: int
    """Place of its first written token in the row."""
    tokens: list[int]
    loop: Loop | None
    """What it ends in."""

    @property
    def kept_tokens(self) -> int:
        """Tokens up to the end of the loop's second copy; all, where there is none."""
        return len(self.tokens) if self.loop is None else self.loop.start + 2 * self.loop.period

    @property
    def repeats(self) -> slice:
        """Places behind that in the row."""
        return slice(self.start + self.kept_tokens, self.start + len(self.tokens))


def samples_in(host: OnHost) -> list[Sample]:
    """The texts in a micro-batch of samples: between two of them stands a prompt, which is not learnt."""
    samples = []
    for row, labels_S in enumerate(host.labels_BS.numpy()):
        borders = np.flatnonzero(np.diff(labels_S != IGNORED, prepend=False, append=False))
        for start, stop in borders.reshape(-1, 2).tolist():
            tokens = labels_S[start:stop].tolist()
            samples.append(Sample(row, start, tokens, loop_at_end(tokens, longest_period=LONGEST_PERIOD)))
    return samples


def without_repeats(batch: dict[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """The micro-batch without labels behind the second copy of any loop."""
    host = on_host(batch)
    labels_BS = host.labels_BS.clone()
    for own in samples:
        labels_BS[own.row, own.repeats] = IGNORED
    device = batch["labels"].device
    return {**batch, "labels": queued(labels_BS, device), ON_HOST: replace(host, labels_BS=labels_BS)}


class LoopCounts:
    """What the curves tell of samples, counted since they were last read. The same on every rank."""

    def __init__(self) -> None:
        self._counts = Counter[str]()

    def observe(self, own: Sequence[Sample], *, end_ids: Sequence[int]) -> None:
        """Count a step, of which this rank has these samples; every rank calls this."""
        facts = [(sample.loop is not None, sample.tokens[-1] in end_ids, sample.kept_tokens) for sample in own]
        loops, ended, learnt = zip(*(fact for of_rank in together(lambda: facts) for fact in of_rank), strict=True)
        self._counts.update(steps=1, texts=len(loops), loops=sum(loops), ended=sum(ended), learnt=sum(learnt))

    def read_curves(self) -> dict[str, float]:
        """Of the steps since the last reading: shares of texts that end in a loop and with an end token, and learnt
        tokens per step. Nothing where there was none."""
        counts, self._counts = self._counts, Counter[str]()
        if not counts["steps"]:
            return {}
        return {
            "on_policy/loop_rate": counts["loops"] / counts["texts"],
            "on_policy/end_rate": counts["ended"] / counts["texts"],
            "on_policy/kept_tokens": counts["learnt"] / counts["steps"],
        }

    def state(self) -> dict[str, Any]:
        """What steps have changed, for a checkpoint."""
        return {"counts": dict(self._counts)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        self._counts = Counter(state["counts"])


@contextmanager
def own_forwards(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model, its head and its layers run as their classes say, whatever forward was put on these instances:
    layers compiled for rows of one length would be compiled again for every token that is written."""
    head = model.get_output_embeddings()
    modules = (model, *([] if head is None else [head]), *decoder_layers(model))
    installed = [(module, module.__dict__.pop("forward")) for module in modules if "forward" in vars(module)]
    try:
        yield
    finally:
        for module, forward in installed:
            module.__dict__["forward"] = forward


@contextmanager
def checkpointing_kept(student: PreTrainedModel) -> Iterator[None]:
    """Who turns checkpointing off inside and on again, as TRL does where text is written, leaves it as it was.

    TRL turns it on for every layer, and does not know `every_n_layers` and `offload`, which transformers takes out of
    `gradient_checkpointing_kwargs`.
    """
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (module, name, getattr(module, name)) for module in student.modules() for name in names if hasattr(module, name)
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
