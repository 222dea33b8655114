"""What a model does at which depth: the artifacts of depth diagnostics and of concept-depth probes.

S sequence, L layers. Indices of layers are 0-based.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoal.artifacts.artifact import Artifact
from shoal.artifacts.importance import Estimate


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients of one prompt at one site of every layer."""

    site: str
    """Part whose output it is: layer, attention or mlp."""
    input_ids: tuple[int, ...]
    num_answer: int
    gradients: tuple[tuple[float, ...], ...]
    """Gradients by layer and token; a row adds up to ``change`` as steps grow (completeness)."""
    change: tuple[float, ...]
    """F(x) - F(x0) by layer: F is the sum of the answer tokens' probabilities, x the intact output, x0 its mean over
    the sequence at every token."""


@dataclass(frozen=True)
class EffectiveDepth:
    """One rule's last layer of the first phase, 0-based."""

    layer: int | None
    ratio: float | None
    """Depth as a share: (layer + 1) / L."""
    reason: str = ""
    """Reason why there is none; empty = there is one."""


@dataclass(frozen=True)
class Diagnostics(Artifact):
    """diagnostics.json: how a model uses its depth. L layers; curves have one number per layer."""

    FILE: ClassVar[str] = "diagnostics.json"

    num_layers: int
    num_tokens: int
    """Real tokens in the means of ``cosines`` and ``sizes``."""
    cosines: dict[str, tuple[float, ...]]
    """Mean cosine of what layer, attention or mlp writes and what it has read. Negative = erases, near 0 =
    new features, positive = amplifies."""
    sizes: dict[str, tuple[float, ...]]
    """Mean size of what is written over the size of what was read, by the same names."""
    parallel: tuple[bool, ...]
    """Whether a layer's attention and MLP both read its input; empty = unknown, see ``halves_refusal``."""
    halves_refusal: str
    """Reason why there are no curves of attention and MLP; empty = there are."""
    lens_tokens: int
    lens_kl: tuple[float, ...]
    """Mean KL(p_l || p_final) in nats of what the head makes of layer l's input."""
    lens_overlap: tuple[float, ...]
    """Mean share of the top-5 tokens in common with the output's."""
    lens_refusal: str
    """Reason why states cannot be read through the head (no lens, no effect on the output, no integrated gradients)."""
    num_cuts: int
    """Number of prompts times cut positions, over which the effects are the largest."""
    skip_effect: tuple[tuple[float, ...], ...]
    """Effect [s][l]: relative change of later layer l's update from the cut on, when layer s is skipped at the
    tokens before it; 0 where l <= s."""
    skip_output: tuple[float, ...]
    """Euclidean distance of the next-token probabilities, by skipped layer."""
    erasure_output: tuple[float, ...]
    """Change of the next-token probabilities behind a token whose state before layer l became the mean state."""
    effects_refusal: str
    """Reason why there are no effects or integrated gradients."""
    gradient_steps: int
    attributions: tuple[Attribution, ...]
    effective_depth: dict[str, EffectiveDepth]
    """Effective depth by rule: cosine, kl, overlap."""

    def in_words(self) -> str:
        """A few lines for the log."""
        lines = [f"depth of {self.num_layers} layers over {self.num_tokens:,} tokens"]
        for rule, depth in self.effective_depth.items():
            place = f"layer {depth.layer} ({depth.ratio:.0%})" if depth.ratio is not None else f"none: {depth.reason}"
            lines.append(f"  effective depth by {rule}: {place}")
        for subject, values in (("erased the most", self.cosines["layer"]), ("wrote the least", self.sizes["layer"])):
            least = min(range(self.num_layers), key=values.__getitem__)
            lines.append(f"  layer {least} {subject} ({values[least]:.3g})")
        if self.skip_output:
            most = max(range(self.num_layers), key=self.skip_output.__getitem__)
            lines.append(
                f"  skipping layer {most} at earlier tokens changed the output most ({self.skip_output[most]:.3g})"
            )
        for subject, reason in (
            ("attention and MLP", self.halves_refusal),
            ("the lens", self.lens_refusal),
            ("effects on later layers", self.effects_refusal),
        ):
            if reason:
                lines.append(f"  nothing about {subject}: {reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DepthPoint:
    """A depth, 0 to 1, or None with the reason."""

    depth: float | None
    reason: str = ""


@dataclass(frozen=True)
class ConceptDepth:
    """One set's probes; curves have L + 1 entries, by depth."""

    path: str
    classes: tuple[str, ...]
    """Names of the classes, sorted; F1 is that of the second of two, or the mean over more."""
    num_train: int
    num_test: int
    num_repeated: int
    """Number of items left out because their text was there before."""
    num_shortened: int
    """Number of texts with more than ``max_tokens`` tokens."""
    accuracy: tuple[float, ...]
    """Accuracy on the test part, as F1 and AUC are."""
    accuracy_low: tuple[float, ...]
    accuracy_high: tuple[float, ...]
    """Upper end of the 95 % Wilson interval."""
    f1: tuple[float, ...]
    auc: tuple[float, ...]
    """Area under the ROC curve; with more than two classes the mean of one against the rest."""
    majority: float
    """Accuracy on the test part of always saying the training part's most frequent class."""
    variation: tuple[float | None, ...]
    """Variation b_l = accuracy_l / accuracy_{l-1} for l = 1 to L; None where the one before is 0."""
    jump: DepthPoint
    """First l / L with b_l >= 1.1."""
    converging: DepthPoint
    """Last l / L with |b_l - 1| < 0.03."""
    enough: DepthPoint
    """First l / L with 95 % of the best accuracy."""

    def in_words(self) -> str:
        """One line for the log."""
        best = max(self.accuracy)
        return (
            f"{self.path}: best accuracy {best:.1%} (majority {self.majority:.1%}, n {self.num_test}), 95 % of it at "
            f"depth {self.enough.depth:.2f} of the layers"
        )


@dataclass(frozen=True)
class Probes(Artifact):
    """probes.json: at which depth concepts can be read off."""

    FILE: ClassVar[str] = "probes.json"

    num_layers: int
    sets: tuple[ConceptDepth, ...]


@dataclass(frozen=True)
class RoleUse:
    """How one model uses its layers for one task; one number per layer that it has."""

    intact: Estimate
    left: tuple[Estimate, ...]
    """Share of the score above chance that is left without each layer, or nats per token that this adds; empty where
    there is no share."""
    centroid: Estimate | None
    """Mean relative depth of what is lost without each layer, in the teacher's numbers: 0 = its first layer, 1 = its
    last. None where no layer costs anything or there is no share."""
    num_critical: int
    """Layers without which the task is significantly worse."""
    reason: str = ""
    """Reason why there is no share; empty = there is."""


@dataclass(frozen=True)
class Moved:
    """What moved from one model to another, over the same items: after - before."""

    before: str
    after: str
    """Role of the later model."""
    layers: tuple[int, ...]
    """Layers that both have, by the teacher's numbers."""
    left: tuple[Estimate, ...]
    """Change of what is left without each of ``layers``; above 0 (of nats: below) = less depends on it than before."""
    centroid: Estimate | None
    """Change of the centroid; above 0 = deeper. Includes that layers are gone."""
    rank_correlation: float | None
    """Spearman correlation of the two models' values of ``layers``; None where one of them tells no layers apart."""


@dataclass(frozen=True)
class TaskUse:
    """One task under one protocol, over all models."""

    task: str
    ability: str
    protocol: str
    metric: str
    higher_is_better: bool
    n: int
    roles: dict[str, RoleUse]
    moved: tuple[Moved, ...]


@dataclass(frozen=True)
class DepthUse(Artifact):
    """depth_use.json: how models that descend from each other use their layers, aligned by the teacher's numbers."""

    FILE: ClassVar[str] = "depth_use.json"

    num_layers: int
    """Layers of the teacher."""
    kept: dict[str, tuple[int, ...]]
    """Role -> the teacher's numbers of its layers."""
    tasks: tuple[TaskUse, ...]
    effective_depth: dict[str, dict[str, EffectiveDepth]]
    """Role -> rule -> effective depth, in the model's own numbers; roles that were not diagnosed are absent."""

    def depth_in_words(self, role: str, rule: str) -> str:
        """`layer 14 (50 %)` by the teacher's numbers, or why there is none."""
        depth = self.effective_depth[role][rule]
        if depth.layer is None or depth.ratio is None:
            return depth.reason
        return f"layer {self.kept[role][depth.layer]} ({100 * depth.ratio:.0f} %)"

    def in_words(self) -> str:
        """A few lines for the log: centroids and critical layers by model, and what moved."""
        lines = [f"{len(self.tasks)} tasks over {', '.join(self.kept)}, by the teacher's {self.num_layers} layers"]
        for task in self.tasks:
            for role, own in task.roles.items():
                centroid = "no centroid" if own.centroid is None else f"centroid {_told(own.centroid)}"
                lines.append(f"  {task.task}: {role}: {own.reason or centroid}, {own.num_critical} critical layers")
            for moved in task.moved:
                clear = [layer for layer, change in zip(moved.layers, moved.left, strict=True) if change.is_clear]
                centroid = "" if moved.centroid is None else f"centroid {_told(moved.centroid, '+')}, "
                told = f"{centroid}{len(clear)} of {len(moved.layers)} layers with an interval off 0"
                lines.append(f"  {task.task}: {moved.before} to {moved.after}: {told}")
        for role, rules in self.effective_depth.items():
            told = ", ".join(f"{rule}: {self.depth_in_words(role, rule)}" for rule in rules)
            lines.append(f"  effective depth of {role}: {told}")
        return "\n".join(lines)


def _told(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (format(end, f"{sign}.2f") for end in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
