"""Which heads copy what is asked for: heads.json, and the layers that prune.protect should name.

Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv:2404.15574, section 2): a head
copies a token if, where that token is written, the head's most attended token is the same one within the needle; its
score is the share of the needle's tokens that it copies. Here the needle is the value that is asked for, the attended
token has to stand at the copied one's own place in it, and the text is the right answer: only prompts count for which
it is what the model writes greedily, which the same forward tells.

B batch, S sequence, T tokens to copy, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.compress.edits.sublayers import probing
from shoal.errors import UserError
from shoal.figures.style import INK, KEPT, WIDTH_INCHES, figure_style, panels
from shoal.inference.decoder import Decoder
from shoal.launch.verbs.run import Run, check_length
from shoal.models.anatomy import decoder_layers, text_config
from shoal.progress import each

from .attention.calls import AttentionInputs, attention_calls, attention_weights
from .attention.prompts import CopyPrompt, copy_prompts
from .part import identity, made, model_of, told
from .settings import Heads as Settings

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
    def retrieval_heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of the heads that copy, the highest score first."""
        rows = enumerate(self.scores)
        found = [(-score, layer, head) for layer, row in rows for head, score in enumerate(row) if score >= RETRIEVAL]
        return tuple((layer, head) for _, layer, head in sorted(found))

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

    def in_words(self) -> str:
        """The heads that copy most, and the layers whose loss would take them."""
        retrieval, scores = self.retrieval_heads, self.scores
        best = ", ".join(f"{layer}.{head} ({scores[layer][head]:.2f})" for layer, head in retrieval[:5])
        right = ", ".join(f"{task.num_right} of {task.num_prompts} {task.task}" for task in self.tasks)
        asked = f"what is asked for ({right} right)"
        lines = [f"{len(retrieval)} of {sum(map(len, scores))} heads copy {RETRIEVAL:.0%} or more of {asked}"]
        if retrieval:
            lines.append(f"  the most: {best} (layer.head)")
            lines.append(f"  layers that hold {HELD:.0%} of it: prune.protect: {list(self.layers_holding(HELD))}")
        return "\n".join(lines)


def work(run: Run, settings: Settings) -> str:
    """The heads that copy, in words."""

    def scored(provenance: Provenance) -> Heads:
        tasks, prompts = [], copy_prompts(settings.tasks, settings.num_each, run.tokenizer(), seed=run.recipe.seed)
        for task, own in prompts.items():
            longest = max(len(prompt.input_ids) for prompt in own)
            check_length(run, longest, f"tasks: the longest prompt of {task}", remedy="name another task")
        model = model_of(run)
        for task, own in prompts.items():
            found = score_heads(model, own, batch_size=run.recipe.measure.batch_size)
            tasks.append(TaskHeads(task, len(own), *found))
        return Heads(provenance, run.num_layers, tuple(tasks))

    return told(run, made(run, Heads, identity(run, settings), scored, heads_figure))


def heads_figure(heads: Heads) -> Figure:
    """Retrieval scores by layer and by head."""
    most = max(len(row) for row in heads.scores)
    figure, (bars, cells) = panels([2.1, 1.0 + 0.13 * heads.num_layers], width=max(WIDTH_INCHES, 1.6 + 0.2 * most))
    with figure_style():
        bars.bar(range(heads.num_layers), heads.layer_scores, color=KEPT, width=0.72)
        bars.set_title(f"Retrieval score: sum over heads with {RETRIEVAL} or more")
        bars.set_xlabel("layer")
        bars.grid(axis="y")
        bars.set_axisbelow(True)
        title = "Retrieval score of every head; framed: retrieval heads"
        draw_by_head(figure, cells, heads.scores, title, heads.retrieval_heads)
    return figure


def draw_by_head(
    figure: Figure,
    ax: Axes,
    values: Sequence[Sequence[float]],
    title: str,
    framed: Iterable[tuple[int, int]] = (),
    **colours: Any,
) -> None:
    """A map of one number for every layer and head, with frames around some (layer, head)."""
    from matplotlib.patches import Rectangle

    width = max(len(row) for row in values)
    grid = [[*row, *[math.nan] * (width - len(row))] for row in values]
    image = ax.imshow(grid, **{"cmap": "cividis_r", **colours}, aspect="auto", interpolation="none")
    for layer, head in framed:
        ax.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec=INK, lw=1.4))
    figure.colorbar(image, ax=ax, pad=0.02).outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    ax.set_title(title)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")


REMEDY = "this part has nothing to say of it"


def score_heads(model: PreTrainedModel, prompts: Sequence[CopyPrompt], *, batch_size: int) -> tuple[int, ByHead]:
    """How many prompts the model answers right, and the score of every head, the mean over these, from one forward; a
    layer without softmax attention has none.

    Raises:
        UserError: a family without softmax attention or with one that shoal cannot look into, or a model that answers
            no prompt right.
    """
    decoder, num_layers = Decoder(model), len(decoder_layers(model))
    sums: dict[int, Tensor] = {}
    num_right = 0
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))
    with probing(model):
        for start in each(range(0, len(ordered), batch_size), "heads", unit="batches"):
            right_B, copied = _copied(model, decoder, ordered[start : start + batch_size])
            num_right += int(right_B.sum())
            for layer, share_BH in copied.items():
                total_H = share_BH[right_B].double().sum(0).cpu()
                sums[layer] = sums[layer] + total_H if layer in sums else total_H
    if not num_right:
        raise UserError(
            f"shoal lab heads: the model answers none of {len(prompts)} prompts right, so no head can be seen copying"
        )
    return num_right, tuple(
        tuple((sums[layer] / num_right).tolist()) if layer in sums else () for layer in range(num_layers)
    )


def _copied(
    model: PreTrainedModel, decoder: Decoder, prompts: Sequence[CopyPrompt]
) -> tuple[Tensor, dict[int, Tensor]]:
    """(B,) Which prompts are answered right, and by layer (B, H) the share of their needles' tokens that heads copy."""
    family, device = text_config(model.config).model_type, decoder.device
    ids_BS = decoder.right_padded([prompt.input_ids[:-1] for prompt in prompts])
    width = max(len(prompt.needle) for prompt in prompts)
    needle_BT, answer_BT, places_BT = (
        torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device=device)
        for rows in (
            [prompt.needle for prompt in prompts],
            [prompt.answer for prompt in prompts],
            # a token is predicted one place before its own
            [range(len(p.input_ids) - len(p.needle) - 1, len(p.input_ids) - 1) for p in prompts],
        )
    )
    is_token_BT = places_BT >= 0
    places_BT = places_BT.clamp(min=0)
    copied: dict[int, Tensor] = {}

    def look(layer: int, inputs: AttentionInputs) -> None:
        if inputs.key_BGSd.shape[2] != ids_BS.shape[1]:
            raise UserError(f"{family}: layer {layer} attends to keys that are no single tokens; {REMEDY}")
        most_BHT = attention_weights(inputs, places_BT).argmax(-1)
        # padded places hold -1 as their needle, where no key is
        copied[layer] = (most_BHT == needle_BT[:, None]).sum(-1) / is_token_BT.sum(-1)[:, None]

    with attention_calls(model, range(len(decoder_layers(model))), look, remedy=REMEDY):
        hidden_BSD = decoder.hidden(ids_BS)
    if not copied:
        raise UserError(
            "shoal lab heads: asked of a family without softmax attention, or with one of its own: "
            f"{family} hands no queries and keys to transformers' attention interface; {REMEDY}"
        )
    hidden_BTD = hidden_BSD[torch.arange(len(prompts), device=device)[:, None], places_BT]
    written_BT = decoder.logits(hidden_BTD.flatten(0, 1)).argmax(-1).view_as(answer_BT)
    return ((written_BT == answer_BT) | ~is_token_BT).all(-1), copied
