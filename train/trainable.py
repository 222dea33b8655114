"""What of the student is trained, and what must not move."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.edits import ZEROED_WEIGHTS
from shoal.models import decoder_layers


def set_trainable(student: PreTrainedModel, trainable: str, *, first_change: int) -> None:
    """Freeze what ``distill.trainable`` does not name; ``first_change`` is the lowest layer unlike the teacher's."""
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    if trainable == "all":
        return
    embeddings = [student.get_input_embeddings(), student.get_output_embeddings()]
    frozen = [*embeddings, *(decoder_layers(student)[:first_change] if trainable == "from_first_cut" else [])]
    for module in frozen:
        assert isinstance(module, nn.Module)
        module.requires_grad_(False)


def keep_zeros(student: PreTrainedModel) -> None:
    """Let what an edit of the plan zeroed (a skipped sublayer, masked heads) stay exactly zero in training.

    Their gradients are zeroed; moments and weight decay of nothing but zeros move nothing.
    """
    from deepspeed import zero

    for name in getattr(student.config, ZEROED_WEIGHTS, None) or []:
        parameter = student.get_parameter(name)
        with zero.GatheredParameters(parameter):
            kept = parameter.detach() != 0
        if not kept.any():
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameter.register_hook(partial(_masked, kept))


def _masked(kept: Tensor, gradient: Tensor) -> Tensor:
    return gradient * kept.to(gradient.device)
