"""What stays within the layers of a plan that narrows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

Mask = Annotated[str, Field(pattern="^[0-9a-f]+$")]


@dataclass(frozen=True)
class KeptWidth:
    """How wide every kept layer is, the same for all of them, and which of its parts stay."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    intermediate_size: int | None = None
    """Channels of each MLP; None = all stay."""
    kv_groups: int | None = None
    """Key-value heads of each attention, with the query heads that read them; None = all stay."""
    channels: tuple[Mask, ...] = ()
    """Of each kept layer, in order, the channels that stay, see `mask_of`; empty = all, or not chosen yet."""
    groups: tuple[Mask, ...] = ()
    """Of each kept layer, in order, the key-value heads that stay, see `mask_of`; empty = all, or not chosen yet."""

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        """How many stay of what, in words."""
        counts = ((self.intermediate_size, "MLP channel"), (self.kv_groups, "key-value group"))
        return tuple((count, f"{part}{'' if count == 1 else 's'}") for count, part in counts if count is not None)

    def in_words(self) -> str:
        """`1,152 MLP channels and 2 key-value groups of every layer`."""
        return f"{' and '.join(f'{count:,} {part}' for count, part in self.parts)} of every layer"

    def contradictions(self, num_layers: int) -> Iterator[str]:
        """`place: what is wrong`, for a plan that keeps ``num_layers`` layers."""
        for place, count, masks in (
            ("channels", self.intermediate_size, self.channels),
            ("groups", self.kv_groups, self.groups),
        ):
            if masks and len(masks) != num_layers:
                yield f"width.{place}: names those of {len(masks)} layers, and {num_layers} are kept"
            for layer, mask in enumerate(masks):
                if len(kept := indices_of(mask)) != count:
                    yield f"width.{place}.{layer}: keeps {len(kept)}, and {count} are to stay in every layer"


def mask_of(indices: Iterable[int]) -> str:
    """``indices`` as a hexadecimal number in which bit i says whether i is among them."""
    return f"{sum(1 << index for index in indices):x}"


def indices_of(mask: str) -> tuple[int, ...]:
    """What mask_of was given, increasing."""
    return tuple(index for index, bit in enumerate(reversed(f"{int(mask, 16):b}")) if bit == "1")
