"""heads.json: which heads copy what is asked for, and through which states the answer reaches the last token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from shoal.artifacts.artifact import Artifact
from shoal.errors import UserError

RETRIEVAL = 0.1
"""Score from which on a head is called a retrieval head (as in the code of arXiv:2404.15574)."""

Corruption = Literal["value", "key", "question"]
"""How the twin of a look-up differs: another value at the key that is asked for, two keys exchanged in the data, or
another key asked for."""
GROUPS = ("needle", "question", "last", "all")
"""Groups of places: what is corrupted in the data, with its value; what stands behind the data, without the last token;
the last token; everything from the first token on that differs."""
ByHead = tuple[tuple[float, ...], ...]
"""One number for every layer and query head; a layer whose heads are not known has none."""


@dataclass(frozen=True)
class TaskHeads:
    """The scores of one task."""

    task: str
    num_prompts: int
    num_right: int
    """Prompts that the model answers right; these alone count."""
    scores: ByHead
    """Share of the tokens to copy at whose place in the text a head looks most where they are written."""


@dataclass(frozen=True)
class Patched:
    """What a part of a layer brings back of the clean run, at one group of places."""

    twin: Corruption
    site: str
    """residual (what enters the layer), attention, mlp (what they write) or head (its context)."""
    group: str
    """One of GROUPS."""
    effects: ByHead
    """1 = all of the difference between the twins, 0 = none; one number a layer but for heads."""


@dataclass(frozen=True)
class Heads(Artifact):
    """heads.json: the retrieval score of every query head, and what patching brings back."""

    FILE: ClassVar[str] = "heads.json"

    num_layers: int
    tasks: tuple[TaskHeads, ...]
    num_twins: dict[Corruption, int] = field(default_factory=dict)
    """Pairs of prompts that ``patched`` is measured on: those that the model answers right both ways."""
    patched: tuple[Patched, ...] = ()

    @property
    def scores(self) -> ByHead:
        """Mean over the tasks."""
        by_layer = zip(*(task.scores for task in self.tasks), strict=True)
        return tuple(tuple(math.fsum(scores) / len(scores) for scores in zip(*rows, strict=True)) for rows in by_layer)

    @property
    def ranked(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of all heads, the highest score first."""
        scores = self.scores
        heads = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
        return tuple(sorted(heads, key=lambda place: (-scores[place[0]][place[1]], place)))

    @property
    def retrieval_heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of the heads that copy, the highest score first."""
        scores = self.scores
        return tuple((layer, head) for layer, head in self.ranked if scores[layer][head] >= RETRIEVAL)

    @property
    def layer_scores(self) -> tuple[float, ...]:
        """By layer the sum over its retrieval heads."""
        return tuple(math.fsum(score for score in row if score >= RETRIEVAL) for row in self.scores)

    def layers_holding(self, share: float) -> tuple[int, ...]:
        """The fewest layers that hold ``share`` of the retrieval score of all.

        Raises:
            UserError: no head copies.
        """
        scores = self.layer_scores
        wanted = share * math.fsum(scores) - 1e-9
        if wanted <= 0:
            raise UserError(
                f"prune.protect_heads: no head of {self.FILE} has a retrieval score of {RETRIEVAL} or more, so there "
                "is nothing to protect; leave it out"
            )
        ordered, held = sorted(range(self.num_layers), key=lambda layer: (-scores[layer], layer)), list[int]()
        while math.fsum(scores[layer] for layer in held) < wanted:
            held.append(ordered[len(held)])
        return tuple(sorted(held))

    def contradictions(self) -> Iterator[str]:
        if not self.tasks:
            yield "tasks: is empty"
        shapes = [[len(row) for row in task.scores] for task in self.tasks]
        for index, shape in enumerate(shapes):
            if len(shape) != self.num_layers or shape != shapes[0]:
                yield f"tasks.{index}.scores: has other layers or heads than the model"
        for index, patched in enumerate(self.patched):
            if len(patched.effects) != self.num_layers:
                yield f"patched.{index}.effects: has {len(patched.effects)} rows for {self.num_layers} layers"

    def in_words(self) -> str:
        """A few lines for the log."""
        retrieval, scores = self.retrieval_heads, self.scores
        best = ", ".join(f"{layer}.{head} ({scores[layer][head]:.2f})" for layer, head in retrieval[:5])
        right = ", ".join(f"{task.num_right} of {task.num_prompts} {task.task}" for task in self.tasks)
        asked = f"what is asked for ({right} right)"
        lines = [f"{len(retrieval)} of {len(self.ranked)} heads copy {RETRIEVAL:.0%} or more of {asked}"]
        lines += [f"  the most: {best} (layer.head)"] if retrieval else []
        for patched in self.patched:
            if patched.group == "all" and patched.site in ("head", "attention"):
                rows = enumerate(patched.effects)
                effect, layer, head = max((one, layer, head) for layer, row in rows for head, one in enumerate(row))
                place = f"head {layer}.{head}" if patched.site == "head" else f"the attention of layer {layer}"
                lines.append(f"  of another {patched.twin} {place} brings back the most ({effect:.2f})")
        return "\n".join(lines)
