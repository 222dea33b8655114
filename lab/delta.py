"""How far a donor's weights are from its base's, layer by layer and matrix by matrix, read from the files alone.

To set beside what swapping those layers does. One pass over both checkpoints, tensor by tensor: no model is loaded, and
a model larger than memory is no matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.compress.surgery.quantised import without_quantization
from shoal.compress.surgery.stored_names import NotByCopy, find_layers, split_layer
from shoal.errors import UserError
from shoal.launch.verbs.run import Run, resolved
from shoal.models.anatomy import anatomy
from shoal.models.checkpoint_files import DOWNLOAD_AGAIN, model_fingerprint, read_shards
from shoal.models.load import load_config, without_data
from shoal.progress import each
from shoal.recipe.section import Section, Text

from .part import identity, made, told

CHUNK = 2**22
"""Numbers of each tensor that are float64 at one time."""


@dataclass(frozen=True)
class Settings(Section):
    """What the run's model is compared with."""

    donor: Text
    """Hub id, local path or demo:<name> of a model of the same shape."""
    donor_revision: str | None = None
    """Hub revision of the donor."""


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
class DeltaNorms(Artifact):
    """delta.json: every tensor of a base and its donor, in the order of layers; what is outside of them comes last."""

    FILE: ClassVar[str] = "delta.json"

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

    def in_words(self) -> str:
        """One line per layer, with the tensor that differs most."""
        lines = [f"{'':>10}  relative  largest"]
        for layer, value in zip([*range(self.num_layers), None], [*self.layers, self.outside], strict=True):
            label = "outside" if layer is None else f"layer {layer}"
            most = max(self._of(layer), key=lambda delta: delta.relative or 0.0)
            number, of_most = ("-" if ratio is None else f"{ratio:.4f}" for ratio in (value, most.relative))
            lines.append(f"{label:>10}  {number:>8}  {most.name} {of_most}")
        return "\n".join(lines)


def work(run: Run, settings: Settings) -> str:
    """A table of all layers; delta.json has every tensor's norms."""
    donor = resolved(settings.donor, settings.donor_revision)
    inputs = identity(run, settings, donor_content=model_fingerprint(donor))
    return told(run, made(run, DeltaNorms, inputs, lambda provenance: delta_norms(run.teacher, donor, provenance)))


def delta_norms(base_folder: Path, donor_folder: Path, provenance: Provenance) -> DeltaNorms:
    """|W_donor - W_base| / |W_base| (Frobenius) of every weight of two checkpoints, matched by its stored name.

    Sums are float64, whatever the stored dtypes, which may differ. Tied embeddings count once, and so does a head that
    only one of both has beside them.

    Raises:
        UserError: other names or shapes; quantised models; numbers that are not finite; damaged files.
    """
    folders = base_folder, donor_folder
    configs = [load_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if without_quantization(config)[1]:
            raise UserError(f"{folder}: is quantised; give the full-precision model")
    skeleton = without_data(configs[0], dtype=torch.bfloat16)
    base, donor = ({name: shard.file for shard in read_shards(folder) for name in shard.tensors} for folder in folders)
    if any(config.tie_word_embeddings for config in configs):
        head = f"{anatomy(skeleton).head_name}.weight"
        for files in (base, donor):
            for name in [name for name in files if f".{head}".endswith(f".{name}")]:  # files may leave out first words
                del files[name]
    opened: dict[Path, Any] = {file: safe_open(file, "pt") for file in {*base.values(), *donor.values()}}
    shapes, others = (
        {name: tuple(opened[file].get_slice(name).get_shape()) for name, file in files.items()}
        for files in (base, donor)
    )
    if differing := sorted(name for name in base.keys() | donor.keys() if shapes.get(name) != others.get(name)):
        name = differing[0]
        raise UserError(
            f"{donor_folder}: the shape of {name} is {others.get(name)}, but {shapes.get(name)} in {base_folder} "
            f"({len(differing)} such names); give models of one shape"
        )
    try:
        prefix = find_layers(shapes, skeleton, configs[0])
    except NotByCopy as error:
        raise UserError(f"{base_folder}: {error}; give a plain checkpoint of transformers") from error
    deltas, num_layers = [], len(anatomy(skeleton).layers)
    for name in each(list(base), "delta", unit="tensors"):
        ours, theirs = opened[base[name]].get_tensor(name), opened[donor[name]].get_tensor(name)
        if ours.is_floating_point():  # old checkpoints hold masks and positions too
            layer = split_layer(name, prefix)[0]
            is_inside = layer is not None and layer < num_layers  # more layers predict further tokens
            deltas.append(TensorDelta(name, layer if is_inside else None, *_norms(name, ours, theirs)))
    deltas.sort(key=lambda delta: (delta.layer is None, delta.layer or 0))
    return DeltaNorms(provenance, num_layers, tuple(deltas))


def _norms(name: str, base: Tensor, donor: Tensor) -> tuple[float, float]:
    """Of the difference and of the base, in pieces, so that few numbers are float64 at one time."""
    difference = size = 0.0
    for ours, theirs in zip(base.flatten().split(CHUNK), donor.flatten().split(CHUNK), strict=True):
        exact = ours.double()
        size += float(exact.square().sum())
        difference += float((theirs.double() - exact).square().sum())
    if not math.isfinite(difference):
        raise UserError(f"{name}: holds numbers that are not finite; {DOWNLOAD_AGAIN} that holds them")
    return math.sqrt(difference), math.sqrt(size)


def _relative(deltas: Sequence[TensorDelta]) -> float | None:
    base = math.hypot(*(delta.base for delta in deltas))
    return math.hypot(*(delta.difference for delta in deltas)) / base if base else None
