"""Metrics of weights and of their gradients.

N rows, B batch, S sequence, T = B*S tokens, P predicted ones of them, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.models.anatomy import anatomy, decoder_body, decoder_layers, require_gradients
from shoal.models.document_masks import documents_apart, documents_known
from shoal.models.load import logits_from_hidden
from shoal.progress import each
from shoal.runtime import queued

from ..surgery.quantised import without_quantization
from .metric import Calibration, Metric, Need, Result, Yields, add_up_ranks, refuse_fault

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Matrices = list[dict[str, nn.Parameter]]
"""Per layer: name in the layer -> parameter of two or more dimensions."""


class Magnitude(Metric):
    """Sum over a layer's weight matrices of |W| (Mag of Shortened LLaMA, Kim et al. 2024, arXiv:2402.02834).

    Norms and biases are left out: they are no matrices, and a norm's gains near 1 say nothing of the layer.
    """

    needs: ClassVar[Need] = "weights"
    yields: ClassVar[Yields] = "layers"

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        plain_matrices(model, name)


class Taylor(Magnitude):
    """Sum over a layer's weight matrices of |W * dL/dW| (Shortened LLaMA, Kim et al. 2024, arXiv:2402.02834).

    L is the mean loss of the next token over the calibration data; its gradient is complete before the absolute value
    is taken. Norms and biases are left out. A matrix that several layers share counts in each of them, as in Magnitude,
    with its whole gradient: the score is of weights, and of one of their uses alone dL/dW says nothing. Memory: a
    float32 gradient of every decoder matrix, and one batch's activations, since nothing is computed twice.
    """

    needs: ClassVar[Need] = "gradients"


def weight_scores(model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> dict[str, Result]:
    """Magnitude, which needs no data."""
    matrices = plain_matrices(model, names[0])
    scores = _of_layers(matrices, partial(torch.linalg.vector_norm, ord=1, dtype=torch.float64))
    return dict.fromkeys(names, scores)


@torch.no_grad()
def _of_layers(matrices: Matrices, number: Callable[[nn.Parameter], Tensor]) -> tuple[float, ...]:
    """The sum of ``number`` over every layer's matrices, all fetched from the device in one go."""
    found = iter(torch.stack([number(matrix) for own in matrices for matrix in own.values()]).tolist())
    return tuple(sum(itertools.islice(found, len(own))) for own in matrices)


def gradient_scores(model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> dict[str, Result]:
    """Taylor, from one pass forwards and backwards."""
    matrices = plain_matrices(model, names[0])
    gradients = loss_gradients(model, calibration, matrices)
    scores = _of_layers(matrices, lambda own: (own.float() * gradients[own]).abs_().sum(dtype=torch.float64))
    return dict.fromkeys(names, scores)


def plain_matrices(model: PreTrainedModel, name: str) -> Matrices:
    """Every decoder layer's matrices.

    Raises:
        UserError: quantised weights, of which the metric ``name`` says nothing.
    """
    layers, prefix = decoder_layers(model), anatomy(model).layers_name
    signs = ["according to config.json"] if without_quantization(model.config)[1] else []
    for index, layer in enumerate(layers):
        for own, parameter in layer.named_parameters():
            if parameter.dtype not in PLAIN_DTYPES:
                signs.append(f"{prefix}.{index}.{own} is {parameter.dtype}")
    if signs:
        raise UserError(
            f"measure.metrics: {name} needs plain weights, but this model is quantised ({signs[0]}); give the "
            "full-precision model, or measure with metrics of hidden states or of the loss"
        )
    return [{name: own for name, own in layer.named_parameters() if own.ndim > 1} for layer in layers]


def loss_gradients(model: PreTrainedModel, calibration: Calibration, matrices: Matrices) -> dict[nn.Parameter, Tensor]:
    """d(mean next-token loss over all rows of all ranks)/dW in float32, for every one of ``matrices``.

    A batch's gradient is that of its mean loss, weighted by its tokens afterwards, so that it neither depends on how
    the rows are split nor underflows in half precision.

    Raises:
        UserError: an architecture whose head is not known, a loss or gradient that is not finite.
    """
    require_gradients(model)
    total = int(calibration.follows_NS.sum())
    decoder = Decoder(model)
    sums = {own: torch.zeros_like(own, dtype=torch.float32) for layer in matrices for own in layer.values()}
    checks = torch.zeros(len(matrices), device=model.device)
    fault: tuple[int, str] | None = None
    with _gradients_into(model, matrices, sums, checks) as weight, torch.enable_grad():
        for rows_B in each(calibration.batches(), "measure: gradients", unit="batches"):
            num_predicted = int(calibration.follows_NS[rows_B].sum())
            if num_predicted == 0:
                continue
            weight[0] = num_predicted / total  # the hooks read it while this batch runs backwards
            loss = _backward(decoder, calibration, rows_B)
            loss_is_finite, *are_finite = torch.cat([loss[None], checks]).isfinite().tolist()
            if not (loss_is_finite and all(are_finite)):
                bad = [layer for layer, is_finite in enumerate(are_finite) if not is_finite]
                # gradients go from the last layer down, so the highest bad one was the first
                faulty = f"the gradient of layer {bad[-1]}" if loss_is_finite else "the loss"
                fault = int(rows_B[0]), faulty
                break
    refuse_fault(calibration, fault, model)
    return dict(zip(sums, add_up_ranks(list(sums.values()), model.device), strict=True))


@contextmanager
def _gradients_into(
    model: PreTrainedModel, matrices: Matrices, sums: dict[nn.Parameter, Tensor], checks: Tensor
) -> Iterator[list[float]]:
    """Only ``matrices`` get gradients, and each goes into its sum, times the given weight, as soon as it is there."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    weight = [0.0]
    model.requires_grad_(False)
    handles = []
    # one hook for each: of a matrix that layers share, all that they add to the gradient is there by then
    for matrix, layer in {own: layer for layer, named in enumerate(matrices) for own in named.values()}.items():

        def take(parameter: Tensor, layer: int = layer, into: Tensor = sums[matrix]) -> None:
            assert parameter.grad is not None
            into.add_(parameter.grad, alpha=weight[0])
            checks[layer].add_(parameter.grad.sum(dtype=torch.float32))  # stays on the device: no wait per matrix
            parameter.grad = None  # so that one matrix's gradient in the model's dtype is held at a time

        matrix.requires_grad_(True)
        matrix.grad = None
        handles.append(matrix.register_post_accumulate_grad_hook(take))
    try:
        yield weight
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _backward(decoder: Decoder, calibration: Calibration, rows_B: Tensor) -> Tensor:
    """The batch's mean loss, after its gradients are computed. Logits are there for some positions at a time only."""
    device, on_host_BS = decoder.device, calibration.rows.position_ids_NS[rows_B].long()
    ids_BS = queued(calibration.rows.input_ids_NS[rows_B].long(), device)
    positions_BS = queued(on_host_BS, device)
    arguments = decoder.arguments(ids_BS, position_ids_BS=positions_BS)
    body: Any = decoder_body(decoder.model)
    with documents_known(on_host_BS, device), documents_apart(body, positions_BS):
        hidden_TD = body(**arguments).last_hidden_state.flatten(0, 1)
    # two steps: the head runs backwards piece by piece into the leaf's gradient, then the body once
    leaf_TD = hidden_TD.detach().requires_grad_()
    places_P = calibration.follows_NS[rows_B].flatten().nonzero().flatten()  # never a row's first token
    predicted_P = queued(places_P, device)
    head: Any = decoder.model.get_output_embeddings()
    to_logits = logits_from_hidden(decoder.model)
    loss = torch.zeros((), device=device)
    for piece_P in predicted_P.split(decoder.positions_at_once()):
        logits_PV = to_logits(leaf_TD[piece_P - 1], head).float()  # from the state of the token before
        part = functional.cross_entropy(logits_PV, ids_BS.flatten()[piece_P], reduction="sum") / len(predicted_P)
        part.backward()
        loss += part.detach()
    assert leaf_TD.grad is not None
    hidden_TD.backward(leaf_TD.grad)
    return loss
