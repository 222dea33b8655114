"""Put new layers between those of a model, which makes it deeper; also as LESA (Yang et al. 2025, arXiv:2502.13794)
predicts them from the layers below and above.

A new layer is of the kind of the one below it: the configuration says of it what it says of that one.

L layers, E matrices of a type in one layer (experts; else 1), m x n their shape.

The matrices W_1 ... W_L of one type (one name and shape) stand side by side, C = [W_1 | ... | W_L] = U S V^T, so that
W_i = U S V_i with coefficients V_i (m x n). A network of two hidden layers learns V_i from V_{i-1} and V_{i+1}, row by
row, on every three neighbours that the model has; the new matrix between two neighbours a and b is U S G(V_a, V_b).
Norms, biases and all else that has less than two dimensions are the mean of the two.

Other than the authors' code:

- The network gives the difference to the mean of both sides, and starts at none. One sample in sixteen is held out, and
  a network that does not lower the loss there is left out, which leaves the mean. So the prediction is exact where
  coefficients are affine in depth.
- U and S come from C C^T = U S^2 U^T, which needs no (m x L n) decomposition. U is orthogonal whatever S was rounded
  to, so that U S V_i is W_i; S only scales what is learnt from, and is held above 1e-4 of its largest value.
- Norms are means; there they are those of the first layer.
- Experts of one layer are samples of one network, each beside the experts of the same number in the layers around it.
- It is applied to the layers right beside a new one, as there, though it has learnt from layers two apart.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.artifacts.plan import PlannedChange
from shoal.compress.edits.layer_edits import Half, with_halves
from shoal.compress.edits.sublayers import output_parameters, where
from shoal.compress.edits.tensors import check_run, combined, layer_tensors, put_tensors, shapes_of
from shoal.compress.surgery.cut_model import cut_model, kept_layers
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.launch.verbs.run import Run
from shoal.models.anatomy import anatomy, called_on, decoder_layers, state_of
from shoal.progress import each
from shoal.recipe.section import Section
from shoal.runtime import device

from .student import Edited, loaded_teacher, write_student

log = logging.getLogger(__name__)

WIDTH = 256
"""Of both hidden layers."""
EPOCHS = 5
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
"""Of AdamW."""
NORM_WEIGHT = 5e-5
"""lambda in (1 - lambda) MSE + lambda (|prediction| - |target|)^2, against predictions that shrink; norms are over a
batch."""
HELD_OUT_SHARE = 16
SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class Settings(Section):
    """Where new layers come, and what they begin as."""

    after: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Layers, counted from 0, after each of which a new one of its kind comes."""
    init: Literal["zero", "copy", "mean", "lesa"] = "zero"
    """Weights of a new layer. zero: those of the layer below it, with attention and MLP writing nothing, so that the
    student is the teacher bit for bit until it is trained; copy: those of the layer below; mean: of the layers on both
    sides; lesa: what LESA predicts from the layers on both sides."""


def work(run: Run, settings: Settings) -> str:
    """student/ and plan.json: the run's model with more layers."""
    teacher, after = loaded_teacher(run), tuple(sorted({*settings.after}))
    new = new_layers(teacher, after, settings.init, seed=run.recipe.seed)
    student, keep = cut_model(teacher, (), insert=after, share=True), kept_layers(run.num_layers, (), after)
    for layer, tensors in new.items():
        put_tensors(decoder_layers(student)[keep.index(layer) + 1], tensors)
    writes = settings.init != "zero"
    if not writes:
        places = [keep.index(layer) + 1 for layer in after]
        for half in ("attention", "mlp"):
            zero_half(half, student, places)
    words = f"{len(after)} new layer{'s' if len(after) > 1 else ''} after {layers_text(after)} ({settings.init})"
    edited = Edited(
        student,
        PlannedChange("grow", words),
        partial(inserted_in_place, teacher, new if writes else {}),
        keep=keep,
        use_cache=not writes,
    )
    return write_student(run, "grow", settings, edited, teacher, {})


def new_layers(
    model: PreTrainedModel, after: Sequence[int], init: str, *, seed: int
) -> dict[int, Mapping[str, Tensor]]:
    """Every parameter and stored buffer of each new layer, by the layer of ``model`` that it comes after. Of `zero` it
    is a copy, which the student then silences. ``seed`` is for `lesa`.

    Raises:
        UserError: a layer that shares parameters with others; for `mean` and `lesa` no layer above, one that holds
            other tensors, or none that a prediction could be learnt from.
    """
    for layer in after:
        check_run(model, layer, 1)
    pairs = [(layer, layer + 1) for layer in after]
    if init == "lesa":
        return dict(zip(after, predicted_layers(model, pairs, seed=seed), strict=True))
    if init == "mean":
        return {pair[0]: mean_of_layers(model, pair) for pair in pairs}
    return {layer: {name: tensor.clone() for name, tensor in layer_tensors(model, layer).items()} for layer in after}


@contextmanager
def inserted_in_place(model: PreTrainedModel, layers: Mapping[int, Mapping[str, Tensor]]) -> Iterator[PreTrainedModel]:
    """``model`` running a new layer with the given tensors after each named one, until the block ends.

    A new layer is called as the one before it was, with that one's output. It has no slot in a cache, so that ``model``
    runs without one.
    """
    with ExitStack() as stack:
        for layer, tensors in layers.items():
            before = decoder_layers(model)[layer]
            new = copy.deepcopy(before)
            put_tensors(new, tensors)
            stack.callback(before.register_forward_hook(partial(_run_after, new), with_kwargs=True).remove)
        yield model


def _run_after(new: nn.Module, _: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
    return called_on(new, args, kwargs, state_of(output))


@torch.no_grad()
def zero_half(half: Half, model: PreTrainedModel, layers: Collection[int]) -> None:
    """Let the attention or MLP of ``layers`` add nothing .

    They are new tensors: what ``model`` shares with its teacher stays as it is there. A context or expert that is not
    finite gives NaN (0 * inf), where half_silenced gives zero; what a half writes for all that, or another layer lacks
    that uses the same weights, shows in the proof.

    Raises:
        UserError: as half_silenced does; a half whose output weights shoal does not know. The model is then as it was.
    """
    names: list[str] = []
    for layer in layers:
        with_halves(model, layer)  # refuses
        outputs = output_parameters(decoder_layers(model)[layer], half)
        if not outputs:
            raise UserError(
                f"{where(model, layer)}: shoal does not know which weights write its {half}'s output; drop whole layers"
            )
        names += [f"{anatomy(model).layers_name}.{layer}.{name}" for name in outputs]
    put_tensors(model, {name: torch.zeros_like(model.get_parameter(name)) for name in names})


def predicted_layers(model: PreTrainedModel, pairs: Sequence[tuple[int, int]], *, seed: int) -> list[dict[str, Tensor]]:
    """For each pair of layers every parameter and stored buffer of a layer between them, in the dtypes of the first.

    Calculated in float32, on the accelerator where there is one. On a CPU equal seeds give equal bits.

    Raises:
        UserError: a pair whose tensors differ in name or shape, are shared with other layers, or differ and are not of
            floating point; one without three neighbours to learn from.
    """
    stored = [dict(layer.state_dict()) for layer in decoder_layers(model)]
    predicted: list[dict[str, Tensor]] = [{} for _ in pairs]
    wanted: dict[tuple[str, torch.Size], list[int]] = defaultdict(list)
    for number, (below, above) in enumerate(pairs):
        _refuse_different_shapes(model, (below, above))
        for name, tensor in layer_tensors(model, below).items():
            if tensor.is_floating_point() and tensor.ndim > 1:
                wanted[name, tensor.shape].append(number)
            else:
                where = f"lesa: {name} of layers {below} and {above}"
                predicted[number][name] = combined([tensor, stored[above][name]], (0.5, 0.5), where=where)
    examples = {
        (name, shape): {
            place: own[name] for place, own in enumerate(stored) if name in own and own[name].shape == shape
        }
        for name, shape in wanted
    }
    for (name, shape), alike in examples.items():
        if not _middles([*alike]):
            below, _ = pairs[wanted[name, shape][0]]
            raise UserError(
                f"lesa: no three neighbouring layers have {name} of layer {below} in its shape {tuple(shape)}, so that "
                "there is nothing to learn from; choose another init"
            )
    generator = torch.Generator().manual_seed(seed)
    for (name, shape), numbers in each(list(wanted.items()), "lesa: learning from the layers", unit="matrix types"):
        matrices = _predicted(name, examples[name, shape], [pairs[number] for number in numbers], generator)
        for number, matrix in zip(numbers, matrices, strict=True):
            predicted[number][name] = matrix
    return predicted


def mean_of_layers(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, Tensor]:
    """Every parameter and every stored buffer of a layer that is the mean of ``layers``, whatever attention they have.

    Raises:
        UserError: layers that hold other tensors, or tensors that are shared with other layers, or that differ and are
            not of floating point.
    """
    _refuse_different_shapes(model, layers)
    tensors = [layer_tensors(model, layer) for layer in layers]
    where = " and ".join(map(str, layers))
    factors = (1 / len(layers),) * len(layers)
    return {
        name: combined([own[name] for own in tensors], factors, where=f"mean: {name} of layers {where}")
        for name in tensors[0]
    }


def _refuse_different_shapes(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Refuse layers of which no tensors can be calculated together: one that is not there, or that holds others."""
    if beyond := [layer for layer in layers if not 0 <= layer < len(decoder_layers(model))]:
        raise UserError(f"there is no layer {beyond[0]} to calculate a layer beside it from; choose another init")
    first, *others = layers
    expected = shapes_of(model, first)
    for layer in others:
        own = shapes_of(model, layer)
        if differing := sorted(name for name in expected.keys() | own.keys() if expected.get(name) != own.get(name)):
            name = differing[0]
            shapes = f"{expected.get(name)} in one and {own.get(name)} in the other"
            raise UserError(
                f"layers {first} and {layer} hold different tensors: the shape of {name} is {shapes}, so that no "
                "weights can be calculated from both; choose another init"
            )


def _middles(layers: Sequence[int]) -> list[int]:
    """Places in ``layers``, which increase, of those between two neighbours that are there too."""
    return [place for place in range(1, len(layers) - 1) if layers[place + 1] == layers[place - 1] + 2]


def _predicted(
    name: str, alike: Mapping[int, Tensor], pairs: Sequence[tuple[int, int]], generator: torch.Generator
) -> list[Tensor]:
    """The matrices of one type between the layers of ``pairs``; ``alike`` are those that layers have."""
    layers, first = list(alike), next(iter(alike.values()))
    weights_LEmn = torch.stack(
        [weight.detach().reshape(-1, *weight.shape[-2:]).to(device(), torch.float32) for weight in alike.values()]
    )
    directions_mm, scale_m = _basis(weights_LEmn)
    (_, num_matrices, num_rows, num_columns), to_coefficients = weights_LEmn.shape, directions_mm / scale_m
    coefficients_LRn = (to_coefficients.T @ weights_LEmn).flatten(1, 2)
    del weights_LEmn
    network = _learnt(name, coefficients_LRn, _middles(layers), generator)
    matrices = []
    for below, above in pairs:
        sides = coefficients_LRn[layers.index(below)], coefficients_LRn[layers.index(above)]
        coefficients_Emn = _between(network, *sides).view(num_matrices, num_rows, num_columns)
        matrices_Emn = (directions_mm * scale_m) @ coefficients_Emn
        matrices.append(matrices_Emn.view(first.shape).to(first.device, first.dtype))
    return matrices


def _basis(weights_LEmn: Tensor) -> tuple[Tensor, Tensor]:
    """U (m x m) and the diagonal of S (m)."""
    gram_mm = sum((own_Emn @ own_Emn.mT).sum(0) for own_Emn in weights_LEmn)
    assert isinstance(gram_mm, Tensor)
    squares_m, directions_mm = torch.linalg.eigh(gram_mm)
    scale_m = squares_m.clamp_min(0).sqrt()
    largest = scale_m.max()
    return directions_mm, scale_m.clamp_min(SMALLEST_SCALE * largest) if largest > 0 else torch.ones_like(scale_m)


def _between(network: nn.Module | None, below_Rn: Tensor, above_Rn: Tensor) -> Tensor:
    mean_Rn = (below_Rn + above_Rn) / 2
    return mean_Rn if network is None else mean_Rn + network(torch.cat([below_Rn, above_Rn], -1))


def _learnt(
    name: str, coefficients_LRn: Tensor, middles: Sequence[int], generator: torch.Generator
) -> nn.Module | None:
    """The network of one type; None where the mean of both sides is no worse on what was held out."""
    _, num_rows, num_columns = coefficients_LRn.shape
    where = coefficients_LRn.device
    samples = torch.randperm(len(middles) * num_rows, generator=generator)
    held_out, samples = samples.tensor_split([max(1, len(samples) // HELD_OUT_SHARE)])
    if not len(samples):
        return None
    network = _network(num_columns, generator).to(where)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    places = torch.tensor(middles)

    def loss(batch: Tensor, network: nn.Module | None) -> Tensor:
        middle_B, row_B = places[batch // num_rows].to(where), (batch % num_rows).to(where)
        below_Bn, target_Bn, above_Bn = (coefficients_LRn[middle_B + step, row_B] for step in (-1, 0, 1))
        predicted_Bn = _between(network, below_Bn, above_Bn)
        shrunk = (predicted_Bn.norm() - target_Bn.norm()).square()
        return (1 - NORM_WEIGHT) * (predicted_Bn - target_Bn).square().mean() + NORM_WEIGHT * shrunk

    for _ in range(EPOCHS):
        for batch in samples[torch.randperm(len(samples), generator=generator)].split(BATCH_SIZE):
            optimizer.zero_grad()
            loss(batch, network).backward()
            optimizer.step()
    with torch.no_grad():
        of_mean, of_network = (
            sum(loss(batch, own).item() for batch in held_out.split(BATCH_SIZE)) for own in (None, network)
        )
    is_better = of_network < of_mean
    log.info(
        "lesa: %s: held-out loss %.3g, of the mean %.3g%s",
        *(name, of_network, of_mean, "" if is_better else "; the mean is taken"),
    )
    return network.requires_grad_(False) if is_better else None


def _network(num_columns: int, generator: torch.Generator) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        last = nn.Linear(WIDTH, num_columns)
        network = nn.Sequential(nn.Linear(2 * num_columns, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network
