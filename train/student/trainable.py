"""What of the student is trained, and what must not move.

Layers are numbered as in the student where nothing else is said.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_body, text_config
from shoal.models.load import reads_images
from shoal.recipe.distill import Distill


@dataclass(frozen=True)
class Trained:
    """The parts of a student that are trained; all others are frozen."""

    layers: tuple[int, ...]
    """Student layers, increasing."""
    norm: bool
    """Norm before the head."""
    embeddings: bool = False
    """Table that tokens are looked up in, and with it a head that is tied to it."""
    head: bool = False
    """Map from hidden states to logits."""
    rest: bool = False
    """Whatever else a model has: position embeddings, norms of embeddings, projections around the layers."""
    keys_from: int | None = None
    """Lowest layer whose keys and values layers above it read, see `keys_from`; None = there is none."""


def keys_from(config: Any) -> int | None:
    """The lowest layer whose keys and values are read by layers above that have none of their own (Gemma 3n and 4);
    None where every layer has its own."""
    kinds, shared = getattr(config, "layer_types", None), getattr(config, "num_kv_shared_layers", None)
    if not kinds or not shared:
        return None
    own, users = kinds[:-shared], set(kinds[-shared:])
    return min((max(layer for layer, kind in enumerate(own) if kind == read) for read in users & {*own}), default=None)


def trained_parts(trainable: str, plan: Plan, *, tied: bool = False, keys_from: int | None = None) -> Trained:
    """The parts that ``distill.trainable`` means for the student of ``plan``.

    A layer is next to a gap if a teacher's layer right below or above it is gone. A changed layer counts as one, since
    what reads or writes it has changed, as every narrowed one has; the final norm counts if the last layer is gone.
    ``tied``: input embeddings and head are one table, so that training one is training both.

    Raises:
        UserError: there is nothing of the kind to train.
    """
    keep, parts = plan.keep, partial(Trained, keys_from=keys_from)
    everything = tuple(range(len(keep)))
    if trainable in ("from_first_cut", "near_gaps") and not plan.changes_layers:
        raise UserError(
            f"distill.trainable: {trainable} selects layers next to dropped ones, but this plan drops and changes "
            "nothing, so there is nothing to train; to train anyway, set trainable: layers"
        )
    match trainable:
        case "all":
            return parts(everything, norm=True, embeddings=True, head=True, rest=True)
        case "layers":
            return parts(everything, norm=True, rest=True)
        case "from_first_cut":
            if plan.first_change >= len(keep):
                raise UserError(
                    "distill.trainable: from_first_cut trains the layers above the first dropped one, and this plan "
                    "drops the last layers; choose near_gaps, norm_and_head or layers"
                )
            return parts(everything[plan.first_change :], norm=True)
        case "near_gaps":
            return parts(_near_gaps(plan), norm=keep[-1] != plan.num_layers - 1)
        case "norm_and_head":
            return parts((), norm=True, embeddings=tied, head=True)
    raise AssertionError(trainable)


def _near_gaps(plan: Plan) -> tuple[int, ...]:
    kept = list(enumerate(plan.keep))
    near = {layer for layer, index in kept if index in plan.changed}
    for (below, lower), (above, upper) in itertools.pairwise(kept):
        if upper > lower + 1:
            near |= {below, above}
    if plan.keep[0] != 0:
        near.add(0)
    if plan.keep[-1] != plan.num_layers - 1:
        near.add(len(kept) - 1)
    return tuple(sorted(near))


def shares_prefix(trained: Trained, plan: Plan) -> int:
    """How many of the lowest layers can be run once for teacher and student: those that are equal and stay so.

    That is more than none where ``plan`` leaves the first layer as it is, and ``trained`` comes from from_first_cut,
    near_gaps, or norm_and_head without tied embeddings. Layers whose keys and values others read have to
    run beside those.
    """
    if trained.embeddings or trained.rest:
        return 0
    read = [] if trained.keys_from is None else [trained.keys_from]
    return min([plan.first_change, *trained.layers[:1], *read])


def recorded_layers(trained: Trained, plan: Plan, settings: Distill) -> int:
    """How many of the lowest layers ``distill.teacher.prefix`` spares both models.

    Raises:
        UserError: none.
    """
    if spared := shares_prefix(trained, plan):
        return spared
    raise UserError(
        f"distill.teacher.prefix: with trainable {settings.trainable} the student has no lowest layers that equal "
        f"the teacher's (the first change is at layer {plan.first_change}); choose from_first_cut and a plan that "
        "keeps the first layers, or remove prefix"
    )


def parts_of(student: PreTrainedModel, trainable: str, plan: Plan) -> Trained:
    """The parts of this student, which may be built without its weights, that ``distill.trainable`` means."""
    parts = anatomy(student)
    embeddings, head = parts.embeddings, parts.head
    tied = embeddings is not None and head is not None and getattr(head, "weight", head) is embeddings.weight
    return trained_parts(trainable, plan, tied=tied, keys_from=keys_from(text_config(student.config)))


def train_only(student: PreTrainedModel, trained: Trained) -> None:
    """Freeze what ``trained`` does not name, and what turns an image into tokens, which text gives no gradient."""
    parts = anatomy(student)
    student.requires_grad_(False)
    inside = decoder_body(student) if reads_images(student.config) else student
    inside.requires_grad_(trained.rest)
    for layer, module in enumerate(parts.layers):
        module.requires_grad_(layer in trained.layers)
    # where head and embeddings are one table, their flags are equal
    wanted = ((parts.final_norm, trained.norm), (parts.head, trained.head), (parts.embeddings, trained.embeddings))
    for module, is_trained in wanted:
        if module is not None:
            module.requires_grad_(is_trained)
    # with gradient checkpointing transformers makes what the embeddings return require a gradient, which only the
    # reentrant kind needs (refused here): all frozen layers would be run again, and differentiated, for nobody
    student.enable_input_require_grads = lambda: None
