"""What can be taken out of a model's layers, in words that measuring and choosing share.

A Component is what a sweep takes out and what an order of removals lists. A LayerEdit is what it comes to in one layer;
compress/edits/layer_edits.py has the table of what is done then. Indices are 0-based and the model's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from shoal.errors import UserError
from shoal.formatting import layers_text

ComponentPart = Literal["layer", "skip_prompt", "skip_written", "attention", "mlp", "head", "kv_group", "donor"]
"""How much of a layer a component is: what it writes at prompt positions, or from the prompt's last token on where the
answer is predicted; donor = the layer as another model has it."""


@dataclass(frozen=True)
class Component:
    """What is removed from the teacher, or put in from a donor, at one time."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    layers: tuple[int, ...]
    """0-based. Several where layers go together; then in the order in which they were added to the set."""
    part: ComponentPart = "layer"
    index: int | None = None
    """Index of the head or key-value group in the layer."""

    @property
    def name(self) -> str:
        """`layer 3`, `layers 3, 7`, `attention 3`, `head 3.5`."""
        plural = "s" if self.part == "layer" and len(self.layers) > 1 else ""
        which = ", ".join(map(str, self.layers))
        return f"{self.part.replace('_', ' ')}{plural} {which}" + ("" if self.index is None else f".{self.index}")


@dataclass(frozen=True)
class LayerEdit:
    """What is done to one layer: the part is taken out, or put in from a donor."""

    part: ComponentPart
    indices: tuple[int, ...] = ()
    """Query heads, increasing; none where the part is not one of several."""

    @property
    def removes_layer(self) -> bool:
        """Whether the layer runs no more."""
        return self.part == "layer"

    @property
    def at_positions(self) -> bool:
        """Whether the layer runs as it is, and passes its input on at some positions."""
        return self.part in ("skip_prompt", "skip_written")


REMOVED = LayerEdit("layer")
"""The layer passes its input on."""
LayerEdits = tuple[tuple[int, LayerEdit], ...]
"""(layer, what is done to it), in the order of the layers."""


def require_layers(drop: Collection[int], num_layers: int, setting: str = "drop") -> None:
    """Refuse to drop what is no layer of a model of so many, or all of them."""
    if outside := sorted(layer for layer in drop if not 0 <= layer < num_layers):
        last = num_layers - 1
        raise UserError(f"{setting}: layer {layers_text(outside)} does not exist; the model has the layers 0 to {last}")
    if len(drop) == num_layers:
        raise UserError(f"{setting}: all {num_layers} layers are named; keep at least one")
