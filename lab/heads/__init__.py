"""Which heads copy what is asked for (arXiv:2404.15574): heads.json, and the layers that prune.protect should name.

attention_calls  what attention is computed from, seen while the model runs
prompts          look-ups and needles whose answer stands in the text
scores           how often a head looks at the token that is copied next
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.figures.style import INK, KEPT, WIDTH_INCHES, figure_style, panels
from shoal.launch.verbs.run import Run, check_length
from shoal.recipe.section import Positive, Section

from ..results import identity, made, model_of, told
from .prompts import HeadTask, copy_prompts
from .scores import score_heads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RETRIEVAL = 0.1
"""Score from which on a head is called a retrieval head (as in the code of arXiv:2404.15574)."""
HELD = 0.9
"""Share of the retrieval score that the layers to protect hold."""
ByHead = tuple[tuple[float, ...], ...]
"""One number for every layer and query head; a layer whose heads are not known has none."""


@dataclass(frozen=True)
class Settings(Section):
    """The prompts that heads are scored on."""

    tasks: Annotated[tuple[HeadTask, ...], Field(min_length=1)] = ("retrieval", "needle")
    """Bundled look-ups of 8, 16 and 32 pairs; needles in 20, 40 and 80 sentences."""
    num_each: Positive = 3
    """Prompts of every task, each of these lengths and five places of the needle: 15 times as many of a task."""


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
class Heads(Artifact):
    """heads.json: the retrieval score of every query head."""

    FILE: ClassVar[str] = "heads.json"

    num_layers: int
    tasks: tuple[TaskHeads, ...]

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
        """The fewest layers that hold ``share`` of the retrieval score of all; none where no head copies."""
        scores = self.layer_scores
        wanted = share * math.fsum(scores) - 1e-9
        ordered, held = sorted(range(self.num_layers), key=lambda layer: (-scores[layer], layer)), list[int]()
        while math.fsum(scores[layer] for layer in held) < wanted:
            held.append(ordered[len(held)])
        return tuple(sorted(held))

    def contradictions(self) -> Iterator[str]:
        shapes = [[len(row) for row in task.scores] for task in self.tasks]
        if not shapes or any(shape != shapes[0] or len(shape) != self.num_layers for shape in shapes):
            yield f"tasks: do not have one score for every head of {self.num_layers} layers"

    def in_words(self) -> str:
        """The heads that copy most, and the layers whose loss would take them."""
        retrieval, scores = self.retrieval_heads, self.scores
        best = ", ".join(f"{layer}.{head} ({scores[layer][head]:.2f})" for layer, head in retrieval[:5])
        right = ", ".join(f"{task.num_right} of {task.num_prompts} {task.task}" for task in self.tasks)
        asked = f"what is asked for ({right} right)"
        lines = [f"{len(retrieval)} of {len(self.ranked)} heads copy {RETRIEVAL:.0%} or more of {asked}"]
        if retrieval:
            lines.append(f"  the most: {best} (layer.head)")
            lines.append(f"  layers that hold {HELD:.0%} of it: prune.protect: {list(self.layers_holding(HELD))}")
        return "\n".join(lines)


def work(run: Run, settings: Settings) -> str:
    """The heads that copy, in words."""

    def scored(provenance: Provenance) -> Heads:
        tasks, prompts = [], copy_prompts(settings.tasks, settings.num_each, run.tokenizer(), seed=run.recipe.seed)
        for task, own in prompts.items():
            check_length(run, max(len(prompt.input_ids) for prompt in own), f"shoal lab heads: {task}")
        model = model_of(run)
        for task, own in prompts.items():
            found = score_heads(model, own, batch_size=run.recipe.measure.batch_size)
            tasks.append(TaskHeads(task, len(own), found.num_right, found.scores))
        return Heads(provenance, run.num_layers, tuple(tasks))

    return told(run, made(run, Heads, identity(run, settings), scored, heads_figure))


def heads_figure(heads: Heads) -> Figure:
    """Retrieval scores by layer and by head."""
    from matplotlib.patches import Rectangle

    most = max(len(row) for row in heads.scores)
    figure, (bars, cells) = panels([2.1, 1.0 + 0.13 * heads.num_layers], width=max(WIDTH_INCHES, 1.6 + 0.2 * most))
    with figure_style():
        bars.bar(range(heads.num_layers), heads.layer_scores, color=KEPT, width=0.72)
        bars.set_title(f"Retrieval score: sum over heads with {RETRIEVAL} or more")
        bars.set_xlabel("layer")
        bars.grid(axis="y")
        bars.set_axisbelow(True)
        draw_by_head(figure, cells, heads.scores, "Retrieval score of every head; framed: retrieval heads")
        for layer, head in heads.retrieval_heads:
            cells.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec=INK, lw=1.2))
    return figure


def draw_by_head(figure: Figure, ax: Axes, values: Sequence[Sequence[float]], title: str) -> None:
    """A map of one number for every layer and head."""
    width = max(len(row) for row in values)
    grid = [[*row, *[math.nan] * (width - len(row))] for row in values]
    image = ax.imshow(grid, cmap="cividis_r", aspect="auto", interpolation="none")
    figure.colorbar(image, ax=ax, pad=0.02).outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    ax.set_title(title)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
