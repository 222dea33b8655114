"""How far a donor's weights are from its base's, layer by layer and matrix by matrix, read from the files alone.

To set beside what swapping those layers does. One pass over both checkpoints in pieces of CHUNK numbers: no model is
loaded, and a model larger than memory is no matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.atomic_files import write_json
from shoal.compress.surgery.quantised import without_quantization
from shoal.compress.surgery.stored_names import NotByCopy, find_layers, split_layer
from shoal.errors import UserError
from shoal.launch.verbs.run import Run, resolved
from shoal.models.anatomy import anatomy, text_config
from shoal.models.checkpoint_files import DOWNLOAD_AGAIN, Shard, StoredTensor, read_shards
from shoal.models.load import FLOATS, load_config, without_data
from shoal.progress import BYTES, Work, progress
from shoal.recipe.section import Section, Text

CHUNK = 2**22
"""Numbers of each checkpoint in memory at one time: 32 MiB in float64."""
COUNTING = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")
"""Dtypes of masks and positions that old checkpoints hold: no weights, but they must be equal."""
BAR_WIDTH = 30


@dataclass(frozen=True)
class Settings(Section):
    """What the run's model is compared with."""

    donor: Text
    """Hub id, local path or demo:<name> of a model of the same shape."""
    donor_revision: str | None = None
    """Hub revision of the donor."""


def work(run: Run, settings: Settings) -> str:
    """A table of all layers; lab/delta.json has every tensor's norms."""
    norms = delta_norms(run.teacher, resolved(settings.donor, settings.donor_revision))
    path = run.dir / "lab" / "delta.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, norms.document())
    return f"{norms.table()}\n{path}"


@dataclass(frozen=True)
class TensorDelta:
    """One stored tensor's Frobenius norms."""

    name: str
    layer: int | None
    """Index of the decoder layer; None = outside of them."""
    difference: float
    """Norm |donor - base|."""
    base: float
    """Norm |base|."""

    @property
    def relative(self) -> float | None:
        """|donor - base| / |base|; None where the base is zero."""
        return self.difference / self.base if self.base else None


@dataclass(frozen=True)
class DeltaNorms:
    """Every tensor of a base and its donor compared, in the order of layers; what is outside of them comes last."""

    num_layers: int
    tensors: tuple[TensorDelta, ...]

    @property
    def layers(self) -> tuple[float | None, ...]:
        """|donor - base| / |base| of each decoder layer, all its tensors taken as one vector."""
        return tuple(_relative(self._of(layer)) for layer in range(self.num_layers))

    @property
    def outside(self) -> float | None:
        """The same for everything that is in no layer: embeddings, final norm, head."""
        return _relative(self._of(None))

    def _of(self, layer: int | None) -> list[TensorDelta]:
        return [delta for delta in self.tensors if delta.layer == layer]

    def document(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        tensors = [
            {"name": delta.name, "layer": delta.layer, "relative": delta.relative, "difference": delta.difference}
            for delta in self.tensors
        ]
        return {"layers": list(self.layers), "outside": self.outside, "tensors": tensors}

    def table(self) -> str:
        """For a reader: one line per layer, with the tensor that differs most."""
        groups = [*range(self.num_layers), None]
        values = [*self.layers, self.outside]
        largest = max((value for value in values if value is not None), default=0.0)
        lines = [f"{'':>10}  relative  {'':{BAR_WIDTH}}  largest"]
        for layer, value in zip(groups, values, strict=True):
            label = "outside" if layer is None else f"layer {layer}"
            bar = "#" * round(BAR_WIDTH * (value or 0) / largest) if largest else ""
            most = max(self._of(layer), key=lambda delta: delta.relative or 0.0)
            number, of_most = ("-" if ratio is None else f"{ratio:.4f}" for ratio in (value, most.relative))
            lines.append(f"{label:>10}  {number:>8}  {bar:{BAR_WIDTH}}  {most.name} {of_most}")
        return "\n".join(lines)


def delta_norms(base_folder: Path, donor_folder: Path) -> DeltaNorms:
    """|W_donor - W_base| / |W_base| (Frobenius) of every tensor of two checkpoints, matched by its stored name.

    Sums are float64, whatever the stored dtypes, which may differ. Tied embeddings count once, and stand for the head
    where only the other model has one of its own.

    Raises:
        UserError: models of different families, numbers of layers, names or shapes; quantised ones; numbers that are
            not finite; damaged files.
    """
    folders = base_folder, donor_folder
    configs = [load_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if without_quantization(config)[1]:
            raise UserError(f"{folder}: is quantised; give the full-precision model")
    _refuse_different(folders, configs)
    stored = [_stored(read_shards(folder)) for folder in folders]
    skeleton = without_data(configs[0], dtype=torch.bfloat16)
    _settle_ties(skeleton, stored, [bool(config.tie_word_embeddings) for config in configs])
    _refuse_other_names(folders, stored)
    try:
        shapes = {name: tensor.shape for name, (_, tensor) in stored[0].items()}
        prefix = find_layers(shapes, skeleton, configs[0])
    except NotByCopy as error:
        raise UserError(f"{base_folder}: {error}; give a plain checkpoint of transformers") from error
    (base, donor), num_layers = stored, len(anatomy(skeleton).layers)
    total = sum(tensor.end - tensor.start for _, tensor in (*base.values(), *donor.values()))
    deltas = []
    with progress("delta", total=total, unit=BYTES) as step:
        for name, pair in sorted(base.items(), key=lambda item: (item[1][0].name, item[1][1].start)):
            sizes = _squares(name, pair, donor[name], step)
            if sizes is not None:
                layer = split_layer(name, prefix)[0]
                is_inside = layer is not None and layer < num_layers  # more layers predict further tokens
                deltas.append(TensorDelta(name, layer if is_inside else None, *map(math.sqrt, sizes)))
    deltas.sort(key=lambda delta: (delta.layer is None, delta.layer or 0))
    return DeltaNorms(num_layers, tuple(deltas))


Stored = dict[str, tuple[Path, StoredTensor]]
"""Name -> file and place in it."""


def _stored(shards: Iterable[Shard]) -> Stored:
    return {name: (shard.file, tensor) for shard in shards for name, tensor in shard.tensors.items()}


def _refuse_different(folders: tuple[Path, Path], configs: list[Any]) -> None:
    for field in ("model_type", "num_hidden_layers"):
        base, donor = (getattr(text_config(config), field, None) for config in configs)
        if base != donor:
            raise UserError(f"{folders[1]}: has {field} {donor}, but {folders[0]} has {base}; give models of one shape")


def _settle_ties(skeleton: Any, stored: list[Stored], tied: list[bool]) -> None:
    """Let a head that is tied be what it is tied to, or nothing where both are."""
    parts = anatomy(skeleton)
    for tensors, is_tied in zip(stored, tied, strict=True):
        head = _spelled(f"{parts.head_name}.weight", tensors)
        if is_tied and head:
            del tensors[head]
    if tied[0] != tied[1]:
        tied_tensors, others = stored if tied[0] else reversed(stored)
        head = _spelled(f"{parts.head_name}.weight", others)
        embeddings = _spelled(f"{parts.embeddings_name}.weight", tied_tensors)
        if head and embeddings:
            tied_tensors[head] = tied_tensors[embeddings]


def _spelled(name: str, stored: Stored) -> str | None:
    """How the files call the model's tensor ``name``: some leave its first words out."""
    return next((known for known in stored if known == name or name.endswith(f".{known}")), None)


def _refuse_other_names(folders: tuple[Path, Path], stored: list[Stored]) -> None:
    base, donor = stored
    if alone := sorted(base.keys() ^ donor.keys()):
        holder, other = folders if alone[0] in base else reversed(folders)
        raise UserError(
            f"{other}: has no {alone[0]}, which {holder} has ({len(alone)} such names); give models of one shape"
        )
    for name, (_, tensor) in base.items():
        if tensor.shape != (other_shape := donor[name][1].shape):
            raise UserError(
                f"{folders[1]}: {name} has shape {list(other_shape)}, but in {folders[0]} {list(tensor.shape)}; "
                "give models of one shape"
            )


def _squares(
    name: str, base: tuple[Path, StoredTensor], donor: tuple[Path, StoredTensor], step: Work
) -> tuple[float, float] | None:
    """Sums of squares of the difference and of the base; None for what is equal and no weight."""
    dtypes = base[1].dtype, donor[1].dtype
    if len(set(dtypes)) > 1 and not set(dtypes) <= FLOATS.keys():
        raise UserError(f"{donor[0]}: {name} is {dtypes[1]}, but {dtypes[0]} in {base[0]}; give models of one kind")
    difference = size = 0.0
    for base_piece, donor_piece in zip(_pieces(name, *base), _pieces(name, *donor), strict=True):
        step(base_piece.nbytes + donor_piece.nbytes)
        if base_piece.is_floating_point():
            exact = base_piece.double()
            size += float(exact.square().sum())
            difference += float((donor_piece.double() - exact).square().sum())
        elif not torch.equal(base_piece, donor_piece):
            raise UserError(
                f"{donor[0]}: {name} is {dtypes[1]}, no weight, and differs from {base[0]}'s; give models of one kind"
            )
    if not math.isfinite(difference):
        raise UserError(
            f"{name}: holds numbers that are not finite, in {base[0]} or {donor[0]}; {DOWNLOAD_AGAIN} that holds them"
        )
    return (difference, size) if dtypes[0] in FLOATS else None


def _pieces(name: str, file: Path, tensor: StoredTensor) -> Iterator[torch.Tensor]:
    dtype = FLOATS.get(tensor.dtype) or (torch.uint8 if tensor.dtype in COUNTING else None)
    if dtype is None:
        raise UserError(f"{file}: {name} is {tensor.dtype}, which is quantised; give the full-precision model")
    size = CHUNK * dtype.itemsize
    for start in range(tensor.start, tensor.end, size):
        data = np.fromfile(file, np.uint8, min(size, tensor.end - start), offset=start)
        yield torch.from_numpy(data).view(dtype)


def _relative(deltas: Sequence[TensorDelta]) -> float | None:
    base = math.hypot(*(delta.base for delta in deltas))
    return math.hypot(*(delta.difference for delta in deltas)) / base if base else None
