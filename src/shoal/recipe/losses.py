"""What a student can be trained to match: the settings of every term of the distillation loss.

p = teacher's, q = student's distribution over the vocabulary at the term's temperature. A term's value is a sum over
supervised tokens, in nats (relative squared error for states); the sum of all terms, each times its weight, is divided
by the token count of the whole optimizer step. divergences.py and layer_losses.py in train/objective compute them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.recipe.section import Index, Once, Section, listed_as

FACTOR = "Factor of the term in the loss. With 0 the term only has a curve."
SOFTENS = "Temperature of teacher and student. The term is scaled by its square."
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False, description=FACTOR)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False, description=SOFTENS)]
Inside = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NO_GRADIENT = (
    "hidden_states: no gradient reaches the student, since everything that the term looks at is frozen; train these "
    "layers, or set weight: 0"
)
Layers = Annotated[tuple[Annotated[Index, Field(ge=0)], ...], Field(min_length=1), Once]


@dataclass(frozen=True, kw_only=True)
class Divergence(Section):
    """A loss on the distributions of the output head."""

    kind: str
    weight: Weight = 1.0
    temperature: Temperature = 1.0


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(p || q): the student must cover every token that the teacher considers."""

    kind: Literal["forward_kl"] = "forward_kl"


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(q || p): the student must avoid tokens that the teacher does not predict."""

    kind: Literal["reverse_kl"] = "reverse_kl"


@dataclass(frozen=True, kw_only=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2023, arXiv:2306.13649). The value is beta KL(p || m)
    + (1 - beta) KL(q || m), where m = beta p + (1 - beta) q."""

    kind: Literal["jsd"] = "jsd"
    beta: Inside = 0.5
    """Teacher's share of the mixture m."""


@dataclass(frozen=True, kw_only=True)
class SkewedForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q). Never above -log alpha (DistiLLM, Ko et al. 2024, arXiv:2402.03898)."""

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    alpha: Inside = 0.1
    """Share of the first distribution that is mixed into the second."""


@dataclass(frozen=True, kw_only=True)
class SkewedReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q). Never above -log alpha (DistiLLM)."""

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    alpha: Inside = 0.1
    """Share of the first distribution that is mixed into the second."""


@dataclass(frozen=True, kw_only=True)
class TAID(Divergence):
    """KL(p_t || q) with a moving target (Shing et al. 2025, arXiv:2501.16937). During training p_t moves from the
    student's own distribution to the teacher's."""

    kind: Literal["taid"] = "taid"
    start: Share = 0.4
    """The teacher's share t in the mixed logits at the first step."""
    end: Share = 1.0
    """The teacher's share t after the last step."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Section):
    """-log q(label): learn from the text itself, without the teacher."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    weight: Weight = 1.0


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Section):
    """Distance of the hidden states after student layers from the teacher's."""

    kind: Literal["hidden_states"] = "hidden_states"
    weight: Weight = 1.0
    layers: Layers | None = None
    """Student layers to compare. Default: those where student and teacher differ from the start."""
    map: Literal["gap_closing", "own"] = "gap_closing"
    """Teacher state for a student layer. `gap_closing`: the input of the next kept layer, so that the layer before a
    dropped block learns to replace it; `own`: the output of the same layer in the teacher."""
    distance: Literal["mse", "cosine"] = "mse"
    """Distance of two states. `mse`: squared error relative to the squared norm of the teacher's state; `cosine`: 1 -
    cosine."""

    def refuse_frozen(self, chosen: Sequence[int], num_shared: int, num_layers: int) -> None:
        """Refuse ``chosen`` student layers of ``num_layers`` that are all below ``num_shared``, where the student is
        the teacher and frozen: nothing there could be learnt."""
        if not any(layer >= num_shared for layer in chosen):
            free = "layer" if num_layers - num_shared == 1 else "layers"
            raise UserError(
                f"{self.kind}: layers: all are below the first dropped layer, so the student equals the frozen teacher "
                f"there (got {[*chosen]}); name {free} {layers_text(range(num_shared, num_layers))}, or train them too"
            )


LogitTerm = ForwardKL | ReverseKL | JSD | SkewedForwardKL | SkewedReverseKL | TAID | CrossEntropy
LossTerm = Annotated[LogitTerm | HiddenStates, Field(discriminator="kind")]

Losses = Annotated[tuple[LossTerm, ...], listed_as("kind"), Field(min_length=1)]
"""One term or a list of them."""

LOGIT_TERMS: tuple[type[LogitTerm], ...] = get_args(LogitTerm)
"""Terms of what the head gives."""
KINDS: tuple[str, ...] = tuple(term().kind for term in (*LOGIT_TERMS, HiddenStates))


def needs_teacher(terms: Iterable[LossTerm]) -> bool:
    """Whether any term looks at the teacher; one of weight 0 does too, its curve is logged."""
    return any(not isinstance(term, CrossEntropy) for term in terms)


def reads_distributions(term: LossTerm) -> bool:
    """Whether the term looks at the teacher's distributions over the vocabulary."""
    return isinstance(term, LOGIT_TERMS) and not isinstance(term, CrossEntropy)


def from_top_k(term: LossTerm) -> bool:
    """Whether the teacher's most probable tokens are enough, which is what is recorded of it."""
    return not isinstance(term, TAID)


def temperatures(terms: Iterable[LossTerm]) -> set[float]:
    """Those at which terms look at the teacher's distributions."""
    return {term.temperature for term in terms if isinstance(term, Divergence)}


def asked_sources(
    terms: Sequence[LossTerm], sources: Sequence[frozenset[int] | None], asks: Callable[[LossTerm], bool]
) -> frozenset[int] | None:
    """Numbers of the data's sources of whose tokens some term that ``asks`` the teacher learns; None = all. ``sources``
    are those of every term, None = all."""
    asked = [own for term, own in zip(terms, sources, strict=True) if asks(term)]
    return None if None in asked else frozenset[int]().union(*(own for own in asked if own is not None))


def term_names(terms: Sequence[LossTerm]) -> list[str]:
    """One curve name per term; a kind that appears twice is numbered."""
    kinds = [term.kind for term in terms]
    return [
        kind if kinds.count(kind) == 1 else f"{kind}_{kinds[: index + 1].count(kind)}"
        for index, kind in enumerate(kinds)
    ]


def contradictions(terms: Sequence[LossTerm], place: str = "distill.losses") -> list[str]:
    """`place: what is wrong`, for everything that a single field cannot express."""
    problems = [f"{place}.{index}.{problem}" for index, term in enumerate(terms) for problem in _own_problems(term)]
    seen: dict[LossTerm, int] = {}
    for index, term in enumerate(terms):
        first = seen.setdefault(dataclasses.replace(term, weight=0.0), index)
        if first != index:
            problems.append(
                f"{place}.{index}: {term.kind} is listed twice (first at {first}); list it once with both weights added"
            )
    if not any(term.weight > 0 for term in terms):
        problems.append(f"{place}: every weight is 0, so nothing would be trained; set one weight above 0")
    return problems


def _own_problems(term: LossTerm) -> Iterator[str]:
    match term:
        case TAID() if term.start > term.end:
            yield f"start: must not be above end, {term.end:g} (got {term.start:g})"
        case TAID() if term.end == 0:
            yield "end: with 0 the target stays the student itself, which trains nothing; set it above 0"
