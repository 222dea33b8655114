"""A model whose decoder layers have weights only while it is their turn, so that it may be larger than memory.

Embeddings, final norm and head stay loaded. A layer's tensors are read from the files, each once, and go through
transformers' own loading, so that names, dtypes and merged experts become what they become there.

B batch, S sequence, D hidden.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers, given_state
from shoal.models.attention import implementation
from shoal.models.checkpoint_files import DOWNLOAD_AGAIN, Shard, StoredTensor, is_mtp, read_shards
from shoal.models.load import FLOATS, load_config, loaded_dtype, refuse_incomplete

from ..surgery.changed_tensors import as_bytes
from ..surgery.quantised import without_quantization
from ..surgery.stored_names import NotByCopy, find_layers, load_without_data, quiet_transformers
from .layerwise import Call, Layerwise
from .state_store import read_into

DTYPES = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of stored tensors that can be computed with as they are."""


def as_a_whole(section: str) -> str:
    """The remedy of what cannot be done layer by layer, for the section of the recipe whose limit asked for that."""
    return f"take it as a whole: unset {section}.memory_gb, on a machine with more memory"


def read_tensor(file: Path, stored: StoredTensor) -> Tensor:
    """One tensor, in memory of its own.

    Not by mapping the file: a private mapping counts against a limit of memory with all of its size.

    Raises:
        UserError: the file has become shorter.
    """
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    with file.open("rb", buffering=0) as handle:
        if not read_into(handle.fileno(), as_bytes(tensor), stored.start):
            raise UserError(f"{file}: has become shorter while it was read; {DOWNLOAD_AGAIN}")
    return tensor


@dataclass(frozen=True)
class _Waiting:
    """A stored tensor that is read when transformers asks for it, as it does of safetensors' slices."""

    file: Path
    stored: StoredTensor

    def __getitem__(self, _: Any) -> Tensor:
        return read_tensor(self.file, self.stored)


class StreamedModel:
    """The causal language model at ``folder`` in eval mode, its layers without weights.

    ``whole``: the remedy of what cannot be done layer by layer, as as_a_whole says it.

    Raises:
        UserError: what load_model refuses, quantised weights, layers that share weights with each other or whose
            tensors cannot be told from others by their names.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "stored",
        device: torch.device | str = "cpu",
        attention: str | None = "sdpa",
        trust_remote_code: bool = False,
        whole: str = as_a_whole("measure"),
    ) -> None:
        self.folder, self.device, self.whole = folder, torch.device(device), whole
        shards = read_shards(folder)
        config = load_config(folder, trust_remote_code=trust_remote_code)
        _refuse_what_is_not_plain(folder, config, shards, whole)
        shapes = {name: tensor.shape for shard in shards for name, tensor in shard.tensors.items()}
        try:
            skeleton, loading = load_without_data(config, shapes)
            refuse_incomplete(folder, config.model_type, loading.missing, loading.mismatched)
            prefix = find_layers(shapes, skeleton, config)
        except NotByCopy as error:
            raise UserError(f"{folder}: cannot be loaded layer by layer: {error}; {self.whole}") from error
        self._files = {name: _Waiting(shard.file, tensor) for shard in shards for name, tensor in shard.tensors.items()}
        self._dtype = loaded_dtype(config, dtype, shards)
        self.model = _with_buffers(type(skeleton), config, self._dtype, attention)
        self.num_layers = len(decoder_layers(self.model))
        """L"""
        self._names = _by_layer(shapes, prefix)
        self._without_weights = [
            [(module, dict(module._parameters), dict(module._buffers)) for module in layer.modules()]
            for layer in decoder_layers(self.model)
        ]
        self._refuse_shared_weights()
        self.rest_bytes = sum(tensor.nbytes for tensor in _distinct(self._outside()))
        """Bytes of all that stays loaded."""
        self.layer_bytes = max(map(self._loading_bytes, range(self.num_layers)))
        """Bytes that loading one layer and holding it takes at most."""
        self.widest = max(max(p.shape) for layer in decoder_layers(self.model) for p in layer.parameters())
        """Largest extent of a tensor in a layer."""

    def load_rest(self) -> None:
        """Load all that is no layer. Before this, nothing of the weights is in memory."""
        missing = self._load(self._names[None])
        self.model.tie_weights(missing_keys=missing)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        for entries in self._without_weights:
            for module, _, buffers in entries:
                buffers.update(module._buffers)
        self._refuse_lacking(self._outside())

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """The weights of one layer are there until the block ends."""
        self._load(self._names[index])
        self._refuse_lacking(dict(decoder_layers(self.model)[index].named_parameters()))
        try:
            yield
        finally:
            for module, parameters, buffers in self._without_weights[index]:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def _load(self, names: Sequence[str]) -> set[str]:
        """Load the stored tensors ``names``; the model's tensors that are not among them."""
        how = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=cast(Any, get_model_conversion_mapping(self.model)),
        )
        with quiet_transformers():
            loading, _ = convert_and_load_state_dict_in_model(
                self.model, {name: self._files[name] for name in names}, how
            )
        if loading.conversion_errors or loading.mismatched_keys:
            wrong = min([*loading.conversion_errors, *(name for name, *_ in loading.mismatched_keys)])
            raise UserError(f"{self.folder}: {wrong} cannot be loaded without the other layers; {self.whole}")
        return loading.missing_keys

    def _loading_bytes(self, index: int) -> int:
        tensors = _distinct(dict(decoder_layers(self.model)[index].named_parameters()))
        held = sum(tensor.nbytes for tensor in tensors)
        stored = [self._files[name].stored for name in self._names[index]]
        dtypes = {DTYPES[tensor.dtype] for tensor in stored}
        if len(stored) == len(tensors) and dtypes == {tensor.dtype for tensor in tensors}:
            return held
        return held + sum(tensor.end - tensor.start for tensor in stored)  # converted: both are there for a while

    def _outside(self) -> dict[str, Tensor]:
        prefix = f"{anatomy(self.model).layers_name}."
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: tensor for name, tensor in named if not name.startswith(prefix)}

    def _refuse_lacking(self, tensors: dict[str, Tensor]) -> None:
        if lacking := sorted(name for name, tensor in tensors.items() if tensor.is_meta):
            raise UserError(f"{self.folder}: {lacking[0]} is not among the tensors of its layer; {self.whole}")

    def _refuse_shared_weights(self) -> None:
        """Layers that use weights of other layers, or of what lies outside, would lose them with their owner."""
        prefix, owners = f"{anatomy(self.model).layers_name}.", dict[int, str]()
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            owner = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
            if owners.setdefault(id(tensor), owner) != owner:
                raise UserError(f"{self.folder}: {name} is shared between layers; {self.whole}")
        tied: dict[str, str] = self.model.all_tied_weights_keys  # pyright: ignore[reportAssignmentType]
        if shared := sorted(name for pair in tied.items() for name in pair if name.startswith(prefix)):
            raise UserError(f"{self.folder}: {shared[0]} is shared between layers; {self.whole}")


class StreamedLayerwise(Layerwise):
    """Layerwise of a model whose layers have no weights yet.

    Running the whole model proves nothing here, because it cannot run. Stand-ins take the layers' places instead, and
    show that the body hands every layer what the one before returned, and arguments that depend on no layer and that no
    layer can change. Then a layer has nothing but its state to be influenced by.

    Raises:
        UserError: an architecture of which this is not so.
    """

    def __init__(self, model: PreTrainedModel, *, whole: str = as_a_whole("measure")) -> None:
        self._whole = whole
        super().__init__(model)

    def _study(self) -> None:
        self._adds_in_place = True  # not known before a layer runs; a copy of the state is cheap
        family = self.model.config.model_type
        problem = self._problem()
        if problem:
            raise UserError(f"{family}: its layers cannot be run one by one ({problem}); {self._whole}")
        for layer in self.layers:
            layer.register_forward_hook(lambda _, __, output: self._refuse_more(output))

    @contextmanager
    def stand_ins(self, *, but: int | None = None) -> Iterator[None]:
        """All layers ``but`` one pass their input on."""

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            layer = self.layers[index]
            if index == but:
                return type(layer).forward(layer, *args, **kwargs)
            return self._as_output(index, given_state(args, kwargs))

        with self._replaced(forward):
            yield

    @torch.no_grad()
    def _problem(self) -> str:
        """Why layers cannot be run alone; empty if they can."""
        reasons = []
        for length in (None, 1, 2, 3):
            self._lengths = [length] * self.num_layers
            try:
                reason = self._compared()
            except Exception as error:  # a body that gets what it does not expect fails in any way
                reason = f"{type(error).__name__}: {error}"
            if not reason:
                return ""
            reasons.append(reason)
        return reasons[0]

    def _compared(self) -> str:
        """What two runs of stand-ins show; empty if layers can be run alone."""
        # two runs whose layers do different things and end with the same state: whatever else differs between them
        # depends on other layers
        plain = self._stand_in_run(lambda _, hidden: hidden.clone())
        last = self.num_layers - 1
        other = self._stand_in_run(lambda layer, hidden: plain.last_BSD.clone() if layer == last else 0.5 * hidden + 1)
        if not (plain.handed_on and other.handed_on):
            return "a layer does not get what the one before returned"
        if strange := sorted({kind for call in plain.calls for kind in _changeable(call)}):
            return f"layers are given a {strange[0]}, which they may share"
        if not all(_is_same(first, second) for first, second in zip(plain.calls, other.calls, strict=True)):
            return "what a layer is given depends on other layers"
        if not torch.equal(plain.result_BSD, other.result_BSD):
            return "the final state depends on more than the last layer"
        norm = anatomy(self.model).final_norm
        if norm is not None and torch.equal(norm(plain.last_BSD), plain.result_BSD):
            self._final_norm = norm
        return ""

    def _stand_in_run(self, change: Callable[[int, Tensor], Tensor]) -> _StandInRun:
        calls: list[Call] = []
        returned: list[Tensor] = []
        handed_on = True

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal handed_on
            by_name = not args
            hidden = kwargs.pop("hidden_states") if by_name else args[0]
            handed_on &= isinstance(hidden, Tensor) and (not returned or hidden is returned[-1])
            calls.append(Call(args[1:], kwargs, by_name))
            returned.append(change(index, hidden))
            return self._as_output(index, returned[-1])

        with self._replaced(forward):
            result = self._body(**self._probe()).last_hidden_state
        return _StandInRun(tuple(calls), handed_on and len(calls) == self.num_layers, returned[-1], result)

    def _refuse_more(self, output: Any) -> None:
        """A layer that returns more than its state may hand it to others."""
        if not isinstance(output, tuple | list) or all(value is None for value in output[1:]):
            return
        raise UserError(f"{self.model.config.model_type}: its layers return more than the hidden state; {self._whole}")


@dataclass(frozen=True)
class _StandInRun:
    calls: tuple[Call, ...]
    handed_on: bool
    """Whether every layer was called once, with exactly what the one before returned."""
    last_BSD: Tensor
    """What the last stand-in returned."""
    result_BSD: Tensor


def _changeable(call: Call) -> set[str]:
    """Types among the arguments of a call through which one layer could reach another."""
    fixed = (Tensor, BlockMask, type(None), bool, int, float, str, torch.dtype, torch.device)
    arguments = (*call.args, *call.kwargs.values())
    leaves = pytree.tree_leaves(arguments, is_leaf=lambda value: isinstance(value, dict | list))
    return {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, fixed)}


def _is_same(first: Call, second: Call) -> bool:
    """Whether two calls hand over the same arguments but for the state."""
    leaves, spec = pytree.tree_flatten((first.args, first.kwargs))
    other_leaves, other_spec = pytree.tree_flatten((second.args, second.kwargs))
    return spec == other_spec and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(map(_in_numbers, leaves), map(_in_numbers, other_leaves), strict=True)
    )


def _in_numbers(leaf: Any) -> Any:
    """What can be compared: flex attention's mask is a function, made anew for every run."""
    if not isinstance(leaf, BlockMask):
        return leaf
    device = leaf.kv_num_blocks.device
    return create_mask(leaf.mask_mod, *leaf.shape, device=str(device))


def _refuse_what_is_not_plain(folder: Path, config: Any, shards: Sequence[Shard], whole: str) -> None:
    if without_quantization(config)[1]:
        raise UserError(f"{folder}: is quantised; only plain weights are taken layer by layer: {whole}")
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{shard.file}: {name} is stored as {tensor.dtype}, which cannot be computed with layer by layer; "
                    f"{whole}"
                )


def _with_buffers(
    kind: type[PreTrainedModel], config: Any, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """The model without weights, but with what is computed from the configuration, as its layers will be run."""
    chosen: dict[str, Any] = {} if attention is None else {"attn_implementation": implementation(attention, config)}
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = kind._from_config(copy.deepcopy(config), dtype=dtype, **chosen).eval()
    except ValueError as error:
        if "ttention" not in str(error):
            raise
        raise UserError(f"attention: {attention} is not possible here ({error}); set another") from error
    model.tie_weights()
    return model


def _by_layer(names: Collection[str], prefix: str) -> dict[int | None, list[str]]:
    """Stored names by layer; None = of none. What predicts further tokens is left out, or is layers behind the last."""
    by_layer: dict[int | None, list[str]] = defaultdict(list)
    for name in names:
        number = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
        if not is_mtp(name):
            by_layer[int(number) if number.isdigit() else None].append(name)
    return by_layer


def _distinct(tensors: dict[str, Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors.values()}.values())
