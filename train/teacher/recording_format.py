"""How recorded signals lie on disk. N rows, S sequence, K recorded tokens, D hidden, V vocabulary.

A shard is one safetensors file of planes, each indexed by row, so that any row is read from a memory map:

    ids     uint16 (N, S, K)    low 16 bits of the token ids, most probable first
    high    uint8  (N, S, H)    their further bits, packed; only where V > 65,536
    codes   uint16 (N, S, K)    log-probabilities, see encode_log_probs
    tail    float32 (N, S)      probability of all other tokens together
    row     uint8  (N, 8)       hash of the row's tokens
    state_L bfloat16 (N, S, D)  output of teacher layer L, where it was asked for
    prefix  teacher's (N, S, D) the state that the student goes on from, in the teacher's precision, where asked for

The header carries a checksum of the planes. At K = 32 this is 132 bytes per token, 140 where V is up to 2^18.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from shoal.atomic_files import written_file
from shoal.errors import UserError
from shoal.models.checkpoint_files import DOWNLOAD_AGAIN, read_header

LOWEST = -32.0
"""Log-probabilities below are stored as this one: e^-32 is 1.3e-14, nothing that any loss would feel."""
CODES = 65_535
MAX_ERROR = 8e-4
"""Nats by which a log-probability that is read back, above LOWEST, can differ from the one recorded. It follows from
encode_log_probs (half a code at most) and from bringing the sum back to one; likelier tokens fare far better."""
ROW_HASH_BYTES = 8
RECORD_AGAIN = "run `shoal record` again, which writes it anew"
HEADER_BYTES = 4096
"""Room for a shard's header in estimates."""

_NUMPY = {torch.uint16: np.dtype("<u2"), torch.uint8: np.dtype("u1"), torch.float32: np.dtype("<f4")}
_NUMPY[torch.float16] = np.dtype("<u2")
_NUMPY[torch.bfloat16] = np.dtype("<u2")  # numpy has no bfloat16; the bits are taken along


class TokenRows(Protocol):
    """Training rows, as far as a teacher reads them: what is supervised in them is no business of its own."""

    @property
    def input_ids_NS(self) -> Tensor: ...
    @property
    def position_ids_NS(self) -> Tensor: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Layout:
    """What decides which planes a shard has, and their shapes."""

    sequence_length: int
    top_k: int
    vocab_size: int
    hidden_size: int
    states: tuple[int, ...] = ()
    prefix: int | None = None
    """The teacher's layer whose output is the state that the student goes on from."""
    prefix_dtype: str = "float32"

    @property
    def high_bits(self) -> int:
        """Bits of a token id beyond the low 16."""
        return max(0, (self.vocab_size - 1).bit_length() - 16)

    def planes(self, num_rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of every plane of a shard of ``num_rows`` rows."""
        tokens, k = (num_rows, self.sequence_length), self.top_k
        planes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "ids": (torch.uint16, (*tokens, k)),
            "codes": (torch.uint16, (*tokens, k)),
            "tail": (torch.float32, tokens),
            "row": (torch.uint8, (num_rows, ROW_HASH_BYTES)),
        }
        if self.high_bits:
            planes["high"] = (torch.uint8, (*tokens, -(-k * self.high_bits // 8)))
        for layer in self.states:
            planes[f"state_{layer}"] = (torch.bfloat16, (*tokens, self.hidden_size))
        if self.prefix is not None:
            planes["prefix"] = (getattr(torch, self.prefix_dtype), (*tokens, self.hidden_size))
        return planes

    def num_bytes(self, num_rows: int) -> int:
        """Of a shard of ``num_rows`` rows, without its header."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.planes(num_rows).values())


def encode_log_probs(log_probs: Tensor) -> Tensor:
    """uint16 codes (..., K) of log-probabilities in nats, by the square root of their size.

    Half floats spend their precision on the wrong end: they are exact for p near 1 and coarse (0.004 nats) where
    p < 3e-4. Even steps in sqrt(-log p) err by at most sqrt(32 * -log p) / 65535 nats: 0.00007 at p = 0.5, 0.0005 at
    the far end.
    """
    depth = (log_probs.clamp(min=LOWEST, max=0.0) / LOWEST).sqrt()
    return (depth * CODES).round().to(torch.int32).to(torch.uint16)


def decode_log_probs(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The log-probabilities that ``codes`` stand for."""
    return _DECODED[codes]


_DECODED: NDArray[np.float32] = (LOWEST * np.square(np.arange(CODES + 1) / CODES)).astype(np.float32)


def pack_high_bits(ids: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """(..., K) ids to (..., ceil(K * bits / 8)) bytes that hold what does not fit into 16 bits."""
    single = (ids[..., None] >> np.arange(16, 16 + bits)) & 1
    return np.packbits(single.reshape(*ids.shape[:-1], -1).astype(np.uint8), axis=-1)


def unpack_high_bits(packed: NDArray[np.uint8], bits: int, *, top_k: int) -> NDArray[np.int64]:
    """The (..., K) ids' bits above the low 16, at their place."""
    single: NDArray[Any] = np.unpackbits(packed, axis=-1, count=top_k * bits)
    weights = np.left_shift(1, np.arange(16, 16 + bits), dtype=np.int64)
    return single.reshape(*packed.shape[:-1], top_k, bits) @ weights


def row_hashes(rows: TokenRows, start: int, stop: int) -> NDArray[np.uint8]:
    """(stop - start, 8): a hash of every row's tokens and document borders."""
    ids, positions = rows.input_ids_NS[start:stop].numpy(), rows.position_ids_NS[start:stop].numpy()
    digests = [
        hashlib.blake2b(a.astype("<i4").tobytes() + b.astype("<i4").tobytes(), digest_size=ROW_HASH_BYTES).digest()
        for a, b in zip(ids, positions, strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, ROW_HASH_BYTES)


def shard_planes(
    layout: Layout,
    ids: Tensor,
    log_probs: Tensor,
    tail: Tensor,
    hashes: NDArray[np.uint8],
    states: Mapping[int, Tensor],
    prefix: Tensor | None = None,
) -> dict[str, Tensor]:
    """The planes of one shard from its rows' signals on the CPU: ``ids`` and ``log_probs`` (N, S, K), ``tail`` (N, S),
    ``states`` by layer and ``prefix`` (N, S, D)."""
    planes = {
        "ids": (ids & 0xFFFF).to(torch.int32).to(torch.uint16),
        "codes": encode_log_probs(log_probs),
        "tail": tail.float(),
        "row": torch.tensor(hashes),
        **{f"state_{layer}": state.to(torch.bfloat16) for layer, state in states.items()},
    }
    if prefix is not None:
        planes["prefix"] = prefix.to(getattr(torch, layout.prefix_dtype))
    if layout.high_bits:
        planes["high"] = torch.from_numpy(pack_high_bits(ids.numpy(), layout.high_bits))
    return {name: plane.contiguous() for name, plane in planes.items()}


def write_shard(path: Path, planes: dict[str, Tensor], *, recording: str, setting: str) -> None:
    """Write a shard whole or not at all; ``recording`` identifies what it is a part of.

    Raises:
        UserError: the disk is full or cannot be written; what stood there before is untouched.
    """
    stamp = json.dumps({"recording": recording, "sha256": _checksum(planes)})  # one key: their order is not fixed
    with written_file(path, setting=setting) as temporary:
        save_file(planes, temporary, metadata={"shoal": stamp})


class ShardFile:
    """One shard on disk, mapped. Rows are counted from its own first.

    Raises:
        UserError: missing, cut short, or with other planes than ``layout`` says.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        if not path.is_file():
            raise UserError(f"{path}: is missing; {RECORD_AGAIN}")
        try:
            header = read_header(path)
        except UserError as error:
            raise UserError(f"{str(error).removesuffix(DOWNLOAD_AGAIN)}{RECORD_AGAIN}") from error
        self._layout = layout
        try:
            self._stamp: dict[str, str] = json.loads(header.metadata["shoal"])
            self.num_rows = header.tensors["tail"].shape[0]
            planes = layout.planes(self.num_rows)
            mapped = np.memmap(path, np.uint8, mode="r")  # once: every map holds a file descriptor
            self._planes: dict[str, NDArray[Any]] = {
                name: mapped[stored.start : stored.end].view(_NUMPY[planes[name][0]]).reshape(stored.shape)
                for name, stored in header.tensors.items()
            }
            if {name: plane.shape for name, plane in self._planes.items()} != {n: s for n, (_, s) in planes.items()}:
                raise ValueError("other planes than this recording has")
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"{path}: is no shard of this recording ({error!r}); {RECORD_AGAIN}") from error

    @property
    def recording(self) -> str:
        return self._stamp["recording"]

    @property
    def sha256(self) -> str:
        """What the header says of the planes; see is_intact."""
        return self._stamp["sha256"]

    @property
    def hashes(self) -> NDArray[np.uint8]:
        return self._planes["row"]

    def is_intact(self) -> bool:
        """Whether the planes match their checksum. Reads the whole file."""
        return _checksum(self._planes) == self.sha256

    def read(self, rows: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """ids (R, S, K), log-probabilities (R, S, K) and tail (R, S) of some rows; K + 1 probabilities sum to one.

        Rounding to codes has moved each a little, and so their sum: it is brought back over all K + 1 together. The
        top k alone are never renormalised.
        """
        wanted = np.asarray(rows)
        ids = self._planes["ids"][wanted].astype(np.int64)
        if self._layout.high_bits:
            packed = self._planes["high"][wanted]
            ids |= unpack_high_bits(packed, self._layout.high_bits, top_k=self._layout.top_k)
        log_probs = decode_log_probs(self._planes["codes"][wanted])
        tail = np.array(self._planes["tail"][wanted])
        total = np.exp(log_probs).sum(-1, dtype=np.float64) + tail
        log_probs -= np.log(total)[..., None].astype(np.float32)
        return ids, log_probs, (tail / total).astype(np.float32)

    def read_states(self, plane: str, rows: Sequence[int]) -> Tensor:
        """(R, S, D) of some rows of ``plane``, state_L or prefix, in the precision that was recorded."""
        dtype, _ = self._layout.planes(self.num_rows)[plane]
        return torch.from_numpy(np.array(self._planes[plane][np.asarray(rows)])).view(dtype)


def _checksum(planes: Mapping[str, Tensor] | Mapping[str, NDArray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(planes):
        plane = planes[name]
        array = plane if isinstance(plane, np.ndarray) else plane.view(torch.uint8).numpy()
        digest.update(name.encode() + b"\0")
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
