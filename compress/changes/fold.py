"""Fold a factor of the residual stream, or a correction of what an MLP writes, into one layer, proven by running it.

A factor a at a gap multiplies the state there. In a pre-norm model every reader is a norm, to which the size of the
state is nothing, so the state above may be left a times smaller, if all that is added to it is as well: the output maps
of every kept layer above a gap times the product of 1/a over the gaps below it. Embeddings, tied heads and everything
below the cut stay the teacher's. Where a norm follows the output map (Gemma 2, GLM-4) that norm's weights take the
factor. Exact up to one rounding of the weights and the norms' epsilon, which weighs a^2 times as much.

A correction m + f E of what the MLP m of the layer below a gap writes is folded into its output map: f is that map's
input where it is one linear map, and m itself where experts have one each. A norm behind the MLP cannot hold it.

Which weights these are is found by trying and proven on a batch, layer by layer: a family for which nothing proves
right is refused.

B batch, S sequence, D hidden, F features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.components import LayerEdit
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, text_config

from ..edits.layer_edits import in_force, with_halves
from ..edits.sublayers import output_parameters, sublayers, where
from ..edits.tensors import refuse_shared_parameters, tensors_in_place
from ..variants.layerwise import Call, Layerwise, Prepared

Tensors = dict[str, Tensor]
"""New tensors of one layer, by name within it."""

COMPENSATE = "prune.changes.compensate"
"""Place in the recipe."""
LEAVE_OUT = f"remove {COMPENSATE}"
REMEDY = f"set another {COMPENSATE}.method, or {LEAVE_OUT}"
PROBE_FACTOR = 2.0
"""Exact in every number format, and far enough from 1 that a wrong fold shows."""
SAME_TOKENS = 0.9
TOLERANCE = 0.02
"""Of the change that a layer makes; a wrong fold is off by all of it."""


def scaled_layer(layerwise: Layerwise, layer: int, factor: float, hidden_BSD: Tensor, call: Call) -> Tensors:
    """The tensors with which ``layer`` adds ``factor`` times as much to a state that is ``factor`` times as large.

    ``hidden_BSD`` and ``call`` are a state and a call of this layer, on which that is proven.

    Raises:
        UserError: a family in which no weights do this: one that reads the raw state, or writes by other ways.
    """
    model = layerwise.model
    refuse_shared_parameters(model, layer)
    after_BSD = layerwise.run(layer, hidden_BSD, call)
    for scaled in _scalings(model, layer):
        with tensors_in_place(model, {layer: scaled(1 / PROBE_FACTOR)}):
            got_BSD = PROBE_FACTOR * layerwise.run(layer, hidden_BSD / PROBE_FACTOR, call)
        if same_states(got_BSD, after_BSD, after_BSD - hidden_BSD):
            return scaled(factor)
    raise UserError(
        f"{COMPENSATE}: {where(model, layer)} does not read the residual stream only through norms, or adds to it in "
        f"a way that shoal does not know, so no factor can be folded into its weights; {REMEDY}"
    )


def num_features(model: PreTrainedModel, layer: int) -> int:
    """F of the layer's MLP, by the names of its modules: the inputs of its one output map, else the hidden size."""
    output_map = _output_map(model, layer)
    if output_map is None:
        return text_config(model.config).hidden_size
    return output_map.in_features if isinstance(output_map, nn.Linear) else output_map.nx


class Correction:
    """How the MLP of one layer can be corrected: what its features are, and which tensors take the correction."""

    def __init__(self, layerwise: Layerwise, layer: int) -> None:
        model = layerwise.model
        with_halves(model, layer)
        refuse_shared_parameters(model, layer)
        self._layerwise, self._layer = layerwise, layer
        self._own = dict(decoder_layers(model)[layer].named_parameters())
        self._outputs = output_parameters(decoder_layers(model)[layer], "mlp")
        self._map = _output_map(model, layer)

    def features(self, hidden_BSD: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """(B, S, D) The state after the layer, and (B, S, F) the features by which what its MLP writes is corrected."""
        if self._map is None:
            after_BSD = self._layerwise.run(self._layer, hidden_BSD, call)
            with in_force(self._layerwise.model, [(self._layer, LayerEdit("mlp"))]):
                return after_BSD, after_BSD - self._layerwise.run(self._layer, hidden_BSD, call)
        seen: list[Tensor] = []
        with self._map.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            after_BSD = self._layerwise.run(self._layer, hidden_BSD, call)
        return after_BSD, seen[0].reshape(*after_BSD.shape[:2], -1)

    def folded(self, added_FD: Tensor, hidden_BSD: Tensor, call: Call) -> Tensors:
        """The tensors with which the MLP writes f E more, E = ``added_FD``, proven on a state and a call of it."""
        output_dim, scale = self.form(hidden_BSD, call)
        tensors = self._added(added_FD / scale, output_dim)
        assert tensors is not None
        return tensors

    def form(self, hidden_BSD: Tensor, call: Call) -> tuple[int, float]:
        """The dimension of the output parameters along which they write, and times which what they write is multiplied.

        Found by trying a correction of random numbers on a state and a call of this layer.

        Raises:
            UserError: a family in which no weights do this.
        """
        after_BSD, features_BSF = self.features(hidden_BSD, call)
        generator = torch.Generator().manual_seed(self._layer)
        shape = features_BSF.shape[-1], after_BSD.shape[-1]
        probe_FD = torch.randn(shape, generator=generator, dtype=torch.float64).to(after_BSD.device)
        with torch.autocast(after_BSD.device.type, enabled=False):
            change_BSD = features_BSF.float() @ probe_FD.float()
        size = float(after_BSD.float().norm() / change_BSD.norm())  # as large as what the MLP writes
        probe_FD, change_BSD = probe_FD * size, change_BSD * size
        for output_dim in (-2, -1):  # (D, inputs) of linear maps, (inputs, D) of GPT-2's and of some experts
            scale = 1.0
            for _ in range(2):  # a family may multiply what is written (Granite): the first run tells by how much
                if (tensors := self._added(probe_FD / scale, output_dim)) is None:
                    break
                with tensors_in_place(self._layerwise.model, {self._layer: tensors}):
                    got_BSD = self._layerwise.run(self._layer, hidden_BSD, call)
                if same_states(got_BSD, after_BSD + change_BSD, change_BSD):
                    return output_dim, scale
                moved_BSD = got_BSD.float() - after_BSD.float()
                scale = float((moved_BSD * change_BSD).sum() / change_BSD.square().sum()) or 1.0
        raise UserError(
            f"{COMPENSATE}: the MLP of {where(self._layerwise.model, self._layer)} does not end in linear maps that "
            f"shoal knows, so no correction can be folded into them; {REMEDY}"
        )

    def _added(self, added_FD: Tensor, output_dim: int) -> Tensors | None:
        """The output parameters with the correction in them; None where one has not this form."""
        if self._map is not None:
            name = next(name for name in self._outputs if name.endswith("weight"))
            weight = self._own[name].detach()
            added = added_FD if output_dim == -1 else added_FD.mT
            if weight.shape != added.shape:
                return None
            return {name: (weight.double() + added.to(weight.device)).to(weight.dtype)}
        factor_DD = torch.eye(len(added_FD), dtype=torch.float64, device=added_FD.device) + added_FD
        tensors: Tensors = {}
        for name in self._outputs:
            weight = self._own[name].detach()
            dim = -1 if name.endswith("bias") or weight.dim() == 1 else output_dim
            if weight.shape[dim] != len(factor_DD):
                return None
            mapped = weight.double().movedim(dim, -1) @ factor_DD.to(weight.device)
            tensors[name] = mapped.movedim(-1, dim).to(weight.dtype).contiguous()
        return tensors or None


def _output_map(model: PreTrainedModel, layer: int) -> nn.Linear | Conv1D | None:
    """The one linear map by which the layer's MLP writes; None where there are several."""
    module = decoder_layers(model)[layer]
    owners = {name.rpartition(".")[0] for name in output_parameters(module, "mlp")}
    only = module.get_submodule(owners.pop()) if len(owners) == 1 else None
    return only if isinstance(only, nn.Linear | Conv1D) else None


def refuse_sized_end(layerwise: Layerwise, prepared: Prepared, hidden_BSD: Tensor) -> None:
    """Refuse a model in which what follows the last layer gives another result for a state that is half as large."""
    end_BSD = layerwise.finish(hidden_BSD, prepared)
    if not same_states(layerwise.finish(hidden_BSD / PROBE_FACTOR, prepared), end_BSD, end_BSD):
        raise UserError(
            f"{COMPENSATE}: {layerwise.model.config.model_type} does not read its last layer's state through a norm, "
            f"so no factor can be folded into its weights; {REMEDY}"
        )


def same_states(got_BSD: Tensor, expected_BSD: Tensor, change_BSD: Tensor) -> bool:
    """Whether two states are equal but for rounding: of the states, and of the change that was folded."""
    rounding_BS = 2 * torch.finfo(got_BSD.dtype).eps * expected_BSD.float().norm(dim=-1)
    # token by token, since one sink outweighs all others; a few may be sent to other experts by a rounding
    off_BS = (got_BSD - expected_BSD).float().norm(dim=-1)
    return float((off_BS <= TOLERANCE * change_BSD.float().norm(dim=-1) + rounding_BS).float().mean()) >= SAME_TOKENS


def _scalings(model: PreTrainedModel, layer: int) -> Iterator[Callable[[float], Tensors]]:
    """Ways to let a layer write less, the likeliest first."""
    module = decoder_layers(model)[layer]
    own = dict(module.named_parameters())
    if not sublayers(model)[layer].refusal:
        names = [name for half in ("attention", "mlp") for name in output_parameters(module, half)]
        yield lambda factor: {name: _times(own[name], factor) for name in names}
    norms = [name for name in own if name.count(".") == 1 and "norm" in name and name.endswith(".weight")]
    for pair in itertools.combinations(norms, 2):  # those behind attention and MLP have no common names
        yield lambda factor, pair=pair: {name: _times(own[name], factor) for name in pair}
        # Gemma's norms multiply by 1 + weight
        yield lambda factor, pair=pair: {name: _times(own[name], factor, offset=1) for name in pair}


def _times(weight: Tensor, factor: float, *, offset: int = 0) -> Tensor:
    """factor * (offset + weight) - offset, rounded once."""
    return ((weight.detach().double() + offset) * factor - offset).to(weight.dtype)
