"""A recording of the teacher's signals: what identifies it, and how it lies on disk.

N rows, S sequence, K recorded tokens, D hidden, V vocabulary.

It is a folder of shards and a manifest, which lists them once all are there. What a shard holds depends on its rows
alone, not on who wrote it: any number of ranks makes the same files. A shard is one safetensors file of planes, each
indexed by row, so that any row is read from a memory map:

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
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.artifacts.artifact import Artifact, differences
from shoal.atomic_files import written_file
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import tokenizer_fingerprint
from shoal.models.load import Checkpoint
from shoal.recipe.distill import Distill, Recorded
from shoal.recipe.losses import HiddenStates
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import Shapes, shaping, shaping_keys

from ..objective.layer_losses import layer_pairs
from ..student.spec import TrainSpec

log = logging.getLogger(__name__)

PREFIX, STATES, TEMPERATURE = "distill.teacher.prefix", "distill.losses (states)", "distill.losses (temperature)"
"""Names, in what identifies a recording, of the layers that need not run in training, those whose states it holds, and
the temperature of the teacher's softmax."""
LOWEST = -32.0
"""Log-probabilities below are stored as this one: e^-32 is 1.3e-14, nothing that any loss would feel."""
CODES = 65_535
ROW_HASH_BYTES = 8
RECORD_AGAIN = "run `shoal record` again, which replaces it"
HEADER_BYTES = 4096
"""Room for a shard's header in estimates."""


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

    @property
    def state_planes(self) -> dict[str, tuple[int, torch.dtype]]:
        """Name -> layer whose output it holds, and dtype, of every plane of states."""
        planes = {f"state_{layer}": (layer, torch.bfloat16) for layer in self.states}
        if self.prefix is not None:
            planes["prefix"] = (self.prefix, getattr(torch, self.prefix_dtype))
        return planes

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
        return planes | {name: (dtype, (*tokens, self.hidden_size)) for name, (_, dtype) in self.state_planes.items()}

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


def row_hashes(rows: PackedRows, start: int, stop: int) -> NDArray[np.uint8]:
    """(stop - start, 8): a hash of every row's tokens and document borders."""
    ids, positions = rows.input_ids_NS[start:stop].numpy(), rows.position_ids_NS[start:stop].numpy()
    digests = [
        hashlib.blake2b(a.astype("<i4").tobytes() + b.astype("<i4").tobytes(), digest_size=ROW_HASH_BYTES).digest()
        for a, b in zip(ids, positions, strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, ROW_HASH_BYTES)


def shard_planes(
    layout: Layout, signals: tuple[Tensor, Tensor, Tensor], hashes: NDArray[np.uint8], states: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The planes of one shard from what was said of its rows, on the CPU: ids (N, S, K), log-probabilities (N, S, K)
    and tail (N, S), and by plane the ``states`` (N, S, D) as they go to disk."""
    ids, log_probs, tail = signals
    planes = {
        "ids": (ids & 0xFFFF).to(torch.int32).to(torch.uint16),
        "codes": encode_log_probs(log_probs),
        "tail": tail.float(),
        "row": torch.tensor(hashes),
        **states,
    }
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
        self._layout = layout
        try:
            with safe_open(path, "pt") as file:
                stamp: dict[str, str] = json.loads(file.metadata()["shoal"])
                self._planes: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.recording, self.sha256 = stamp["recording"], stamp["sha256"]
            """What it is a part of, and what the header says of the planes; see is_intact."""
            self.num_rows = len(self._planes["tail"])
            if {name: (p.dtype, tuple(p.shape)) for name, p in self._planes.items()} != layout.planes(self.num_rows):
                raise ValueError("other planes than this recording has")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is not a shard of this recording ({error}); {RECORD_AGAIN}") from error

    @property
    def hashes(self) -> NDArray[np.uint8]:
        return self._planes["row"].numpy()

    def is_intact(self) -> bool:
        """Whether the planes match their checksum. Reads the whole file."""
        return _checksum(self._planes) == self.sha256

    def read(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """ids (S, K), log-probabilities (S, K) and tail (S,) of a row; K + 1 probabilities sum to one.

        Rounding to codes has moved each a little, and so their sum: it is brought back over all K + 1 together. The
        top k alone are never renormalised.
        """
        ids = self._planes["ids"][row].numpy().astype(np.int64)
        if self._layout.high_bits:
            packed = self._planes["high"][row].numpy()
            ids |= unpack_high_bits(packed, self._layout.high_bits, top_k=self._layout.top_k)
        log_probs, tail = decode_log_probs(self._planes["codes"][row].numpy()), self._planes["tail"][row].numpy()
        total = np.exp(log_probs).sum(-1, dtype=np.float64) + tail
        log_probs -= np.log(total)[..., None].astype(np.float32)
        return ids, log_probs, (tail / total).astype(np.float32)

    def state(self, plane: str, row: int) -> Tensor:
        """(S, D) of ``plane``, state_L or prefix, in the precision that was recorded."""
        return self._planes[plane][row]


def _checksum(planes: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(planes):
        digest.update(name.encode() + b"\0")
        digest.update(planes[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class RecordingManifest(Artifact):
    """recording.json: what a folder of signals was recorded from. Without shards it is not finished."""

    FILE: ClassVar[str] = "recording.json"

    rows_per_shard: int
    layout: Layout
    rows_from: dict[str, Any]
    """Settings that shaped the rows, for a reader and for messages."""
    shards: tuple[dict[str, Any], ...] = field(default=())
    """Rows, bytes and sha256 of the planes of each shard."""
    engine: dict[str, Any] | None = None
    """What told the log-probabilities, where that was not transformers: its model and version, and how far it was from
    the teacher."""

    @property
    def num_rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards)


@dataclass(frozen=True)
class Wanted:
    """What a training wants to be recorded of its teacher besides the rows, which are compared one by one."""

    teacher: Checkpoint
    model: str
    """Fingerprint of the teacher."""
    sequence_length: int
    settings: Recorded
    temperature: float = 1.0
    states: tuple[int, ...] = ()
    """Layers whose outputs loss terms read, rising."""
    prefix: int | None = None
    """Number of layers that distill.teacher.prefix spares."""

    @classmethod
    def of(cls, spec: TrainSpec, model: str) -> Wanted:
        """What the training ``spec`` wants of a recorded teacher.

        Raises:
            UserError: a loss on states names a layer that the student does not have.
        """
        settings = spec.settings
        assert isinstance(settings.teacher, Recorded)
        terms = [term for term in settings.terms if isinstance(term, HiddenStates)]
        pairs = [pair for term in terms for pair in layer_pairs(term, spec.plan, num_shared=spec.frozen_layers)]
        return cls(
            spec.teacher,
            model,
            settings.sequence_length,
            settings.teacher,
            settings.recorded_temperature,
            states=tuple(sorted({target for _, target in pairs})),
            prefix=spec.shared_layers or None,
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """What identifies such a recording."""
        load = self.teacher.load
        kernels = {"attention": load.attention} | ({"hub_kernels": True} if load.hub_kernels else {})
        return {
            "model": self.model,
            "tokenizer": tokenizer_fingerprint(self.teacher.folder),
            "dtype": load.dtype,
            **(kernels if self.settings.backend == "transformers" else {}),  # vLLM has its own
            "sequence_length": self.sequence_length,
            **shaping(self.settings, Shapes.SIGNALS, "distill.teacher."),
            TEMPERATURE: self.temperature,
            STATES: list(self.states),
            **({} if self.prefix is None else {PREFIX: f"{self.prefix} layers"}),
        }

    @property
    def layout(self) -> Layout:
        """Its planes, told from the teacher's configuration."""
        config, top_k = text_config(self.teacher.config), self.settings.top_k
        self.settings.refuse_all(config.vocab_size)
        layout = Layout(self.sequence_length, top_k, config.vocab_size, config.hidden_size, self.states)
        if self.prefix is None:
            return layout
        dtype = str(self.teacher.loaded_dtype()).removeprefix("torch.")
        return replace(layout, prefix=self.prefix - 1, prefix_dtype=dtype)

    def missed_in(self, manifest: RecordingManifest) -> list[str]:
        """What a recording is not that is wanted, in words. It may hold a prefix and states that are not."""
        beyond = {PREFIX} - self.inputs.keys()
        beyond |= {STATES} if {*self.states} <= {*manifest.layout.states} else set()
        ours, theirs = (
            {key: value for key, value in inputs.items() if key not in beyond}
            for inputs in (self.inputs, manifest.provenance.inputs)
        )
        return differences(ours, theirs)

    def require(self, folder: Path) -> RecordingManifest:
        """The manifest of the recording in ``folder``.

        Raises:
            UserError: there is none, or it is of something else.
        """
        path = folder / RecordingManifest.FILE
        manifest = RecordingManifest.load(path)
        if missed := self.missed_in(manifest):
            raise UserError(of_another_run(path, "; ".join(missed)))
        return manifest


def of_another_run(path: Path, what: str) -> str:
    """The sentence that refuses a recording that holds ``what``."""
    return (
        f"{path}: belongs to another run: {what}. Set the recipe back, set distill.teacher.path to another folder, or "
        f"delete {path.parent} to record again"
    )


def rows_from(inputs: dict[str, Any]) -> dict[str, Any]:
    """What shapes training rows that are recorded; which loss terms learn from a source does not."""
    images = "distill.data (images)"
    keys = (*shaping_keys(Distill, Shapes.ROWS, "distill."), "data", images, *shaping_keys(Recipe, Shapes.ROWS))
    shaped = {key: inputs[key] for key in keys if key in inputs}
    sources = [{key: source[key] for key in source if key != "losses"} for source in shaped["distill.data"]]
    return shaped | {"distill.data": sources}


def shards_of(num_rows: int, rows_per_shard: int) -> list[range]:
    """The rows of every shard."""
    return [range(start, min(start + rows_per_shard, num_rows)) for start in range(0, num_rows, rows_per_shard)]


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.safetensors"


def other_rows(hashes: np.ndarray, rows: PackedRows, start: int, shaped_otherwise: Sequence[str]) -> str | None:
    """In words, what of a shard's rows, as far as both go, are not those of this run from ``start`` on; None = nothing.
    ``hashes`` (N, 8) are those of the shard, ``shaped_otherwise`` says which settings shaped its rows in another way.
    """
    both = min(len(hashes), len(rows) - start)
    unequal = (row_hashes(rows, start, start + both) != hashes[:both]).any(-1)
    if not unequal.any():
        return None
    reason = "; ".join(shaped_otherwise) or "the text or the order of its documents has changed"
    return f"row {start + int(unequal.argmax())} has other tokens ({reason})"
