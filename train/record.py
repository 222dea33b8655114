"""The record stage: what the teacher says of the training rows, written down once.

Shards are written one by one, each under a temporary name, so that a recording that was killed goes on at the next one.

B batch, S sequence, D hidden, V vocabulary, K recorded tokens, C chunk, N tokens of a batch.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance, differences
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.models.document_masks import documents_known
from shoal.models.load import logits_from_hidden, not_finite_in
from shoal.progress import progress
from shoal.ranks import is_main, rank, world_size
from shoal.runtime import agreed, barrier, device, queued, together, warn_of_versions

from .objective.chunked_loss import CHUNK
from .objective.layer_losses import raw_states
from .objective.objective import final_hidden
from .teacher import recording
from .teacher.vllm_teacher import VllmTeacher, agreeing

log = logging.getLogger(__name__)

ROWS_PER_SHARD = 64
"""Training rows in one file. A recording that was interrupted goes on at the next file."""
ROWS_AT_ONCE = 8
"""Rows that the teacher reads at one time on every rank; without effect on vLLM."""


def record_signals(
    wanted: recording.Wanted,
    rows: PackedRows,
    folder: Path,
    *,
    rows_from: dict[str, Any],
    rows_per_shard: int = ROWS_PER_SHARD,
    verify: bool = True,
) -> None:
    """Record what the teacher says of ``rows``, or what is missing of it. Every rank calls this.

    ``rows_from`` is what shaped the rows, for messages. Without ``verify`` files of a finished recording are taken for
    what they say of themselves, and else compared with their checksums.

    Raises:
        UserError: more tokens than the vocabulary has; the folder, which is not the run's own, holds a recording of
            something else, or its disk has no room for the rest, before any weight is loaded; the disk is full after
            all, or the teacher's distributions are not finite; an engine that is not there, says something else than
            the teacher, or goes away. What is written stays.
    """
    asked = recording.RecordingManifest(Provenance(wanted.inputs), rows_per_shard, wanted.layout, rows_from)
    pending = _pending(rows, folder, asked, wanted, verify=verify)
    manifest = recording.RecordingManifest.load(folder / recording.RecordingManifest.FILE)
    if not pending and manifest.num_rows >= len(rows):
        return
    recorded: Callable[..., dict[str, Tensor]]
    if wanted.settings.backend == "transformers":
        teacher = wanted.teacher.model(device=device())
        recorded = partial(_record_shard, teacher, temperature=wanted.temperature)
    else:
        engine = agreeing(wanted.teacher, rows, top_k=wanted.settings.top_k)
        manifest = replace(manifest, engine=engine.about)
        if is_main():  # one that is interrupted names it too
            manifest.save(folder / recording.RecordingManifest.FILE)
        recorded = partial(_ask_of_shard, engine)
    own_shards = pending[rank() :: world_size()]
    setting = "run_dir" if wanted.settings.path is None else "distill.teacher.path"
    with progress("record", total=sum(map(len, own_shards)), unit="rows") as step:
        for shard in own_shards:
            planes = recorded(rows, shard, layout=manifest.layout, tell=step)
            path = folder / recording.shard_name(shard.start // manifest.rows_per_shard)
            recording.write_shard(path, planes, recording=manifest.provenance.fingerprint, setting=setting)
    barrier()
    if is_main():
        num_shards = max(len(recording.shards_of(len(rows), manifest.rows_per_shard)), len(manifest.shards))
        finished = replace(manifest, shards=_listed(folder, manifest, num_shards))
        finished.save(folder / recording.RecordingManifest.FILE)
        log.info("record: %s rows in %s", f"{finished.num_rows:,}", folder)
    barrier()


def _pending(
    rows: PackedRows, folder: Path, asked: recording.RecordingManifest, wanted: recording.Wanted, *, verify: bool
) -> list[range]:
    """The rows of every shard that is still to be written into ``folder``.

    Finished shards are read and compared with their checksums by all ranks together; damaged ones are named in the log
    and written again.
    """
    agreed(lambda: _claim(rows, folder, asked, wanted))
    on_disk = recording.RecordingManifest.load(folder / recording.RecordingManifest.FILE)
    shards = recording.shards_of(len(rows), on_disk.rows_per_shard)
    own_shards = shards[rank() :: world_size()]
    missing = together(lambda: [shard for shard in own_shards if not _is_there(folder, shard, on_disk, verify=verify)])
    pending = sorted((shard for part in missing for shard in part), key=lambda shard: shard.start)
    agreed(lambda: _announce(folder, on_disk.layout, len(shards), pending))
    return pending


def _claim(rows: PackedRows, folder: Path, asked: recording.RecordingManifest, wanted: recording.Wanted) -> None:
    """Make ``folder`` this recording's. Of another recording the run's own is cleared, and any other refused."""
    path = folder / recording.RecordingManifest.FILE
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds other files; set distill.teacher.path to an empty or new folder")
        asked.save(path)
        return
    on_disk = recording.RecordingManifest.load(path)
    if other := "; ".join(wanted.missed_in(on_disk)) or _other_rows(rows, folder, on_disk, asked):
        if wanted.settings.path is not None:
            raise UserError(recording.of_another_run(path, other))
        log.warning("record: %s is recorded again: %s", folder, other)
        for file in folder.glob("shard-*.safetensors"):  # the manifest last: until then the folder is known as ours
            file.unlink()
        asked.save(path)
        return
    warn_of_versions(path, on_disk.provenance.environment)
    for leftover in folder.glob(".shard-*.tmp"):  # of killed processes: nobody else is at it
        leftover.unlink(missing_ok=True)


def _other_rows(
    rows: PackedRows, folder: Path, on_disk: recording.RecordingManifest, asked: recording.RecordingManifest
) -> str | None:
    """In words, what of the recorded rows are others than these; None = nothing."""
    shaped_otherwise = differences(asked.rows_from, on_disk.rows_from)
    for shard in recording.shards_of(len(rows), on_disk.rows_per_shard):
        file = _opened(folder, shard, on_disk)
        if file is not None and (words := recording.other_rows(file.hashes, rows, shard.start, shaped_otherwise)):
            return words
    return None


def _opened(folder: Path, shard: range, on_disk: recording.RecordingManifest) -> recording.ShardFile | None:
    """The file of the shard; None where it is missing or torn."""
    path = folder / recording.shard_name(shard.start // on_disk.rows_per_shard)
    if not path.is_file():
        return None
    try:
        return recording.ShardFile(path, on_disk.layout)
    except UserError as error:
        log.warning("%s", error)
        return None


def _is_there(folder: Path, shard: range, on_disk: recording.RecordingManifest, *, verify: bool) -> bool:
    """Whether the shard stands in ``folder`` whole."""
    if (file := _opened(folder, shard, on_disk)) is None:
        return False
    index = shard.start // on_disk.rows_per_shard
    is_listed = index < len(on_disk.shards) and on_disk.shards[index]["sha256"] == file.sha256
    is_whole = (is_listed and not verify) or file.is_intact()
    if not is_whole or file.recording != on_disk.provenance.fingerprint:
        path = folder / recording.shard_name(index)
        log.warning("%s: does not match its checksum, or belongs to another recording; recording it again", path)
        return False
    return file.num_rows >= len(shard)  # fewer: it was the last one of a smaller budget


def _announce(folder: Path, layout: recording.Layout, num_shards: int, pending: Sequence[range]) -> None:
    """Say what will be written, and refuse where it does not fit.

    Raises:
        UserError: the disk has less room.
    """
    if not pending:
        log.info("record: all %d shards are complete (%s)", num_shards, folder)
        return
    need = sum(layout.num_bytes(len(shard)) + recording.HEADER_BYTES for shard in pending)
    free = shutil.disk_usage(folder).free
    tokens = sum(map(len, pending)) * layout.sequence_length
    log.info(
        "record: %s tokens into %d of %d shards, %.0f bytes each token, %s on disk (%s free) in %s",
        f"{tokens:,}",
        len(pending),
        num_shards,
        layout.num_bytes(1) / layout.sequence_length,
        bytes_text(need),
        bytes_text(free),
        folder,
    )
    if free < need:
        raise UserError(
            f"{folder}: recording needs {bytes_text(need)}, and the disk has {bytes_text(free)} free; set "
            "distill.teacher.path to a folder on a larger disk, lower distill.num_tokens or distill.teacher.top_k, "
            "or remove distill.teacher.prefix and hidden_states in distill.losses"
        )


def top_k_signals(
    hidden_ND: Tensor, to_logits: Callable[[Tensor], Tensor], *, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (N, K), log-probabilities (N, K) and tail (N,) of the full softmax; logits exist for one chunk at a time.

    The tail is summed from what is left, not taken as one minus the top k: a difference of nearly equal numbers has no
    digits where the teacher is sure.
    """
    parts = []
    for hidden_CD in hidden_ND.split(CHUNK):
        logits_CV = to_logits(hidden_CD).float() / temperature
        values_CK, ids_CK = logits_CV.topk(top_k, dim=-1)
        rest_C = logits_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(-1)
        total_C = torch.logaddexp(values_CK.logsumexp(-1), rest_C)
        parts.append((ids_CK, values_CK - total_C[:, None], (rest_C - total_C).exp()))
    ids_NK, log_probs_NK, tail_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids_NK, log_probs_NK, tail_N


@torch.inference_mode()
def _record_shard(
    teacher: PreTrainedModel,
    rows: PackedRows,
    shard: range,
    *,
    temperature: float,
    layout: recording.Layout,
    tell: Callable[[int], Any],
) -> dict[str, Tensor]:
    scaled, head = logits_from_hidden(teacher, prepared=True), teacher.get_output_embeddings()
    assert head is not None
    batches: list[tuple[Tensor, Tensor, Tensor]] = []
    planes = layout.state_planes
    kept: dict[str, list[Tensor]] = {plane: [] for plane in planes}

    def keep(layer: int, state: Tensor) -> None:
        for plane, (of_layer, dtype) in planes.items():
            if of_layer == layer:  # as it goes to disk
                kept[plane].append(state.to("cpu", dtype, copy=True))

    for start in range(shard.start, shard.stop, ROWS_AT_ONCE):
        part = slice(start, min(start + ROWS_AT_ONCE, shard.stop))
        on_host = [plane_NS[part].long() for plane_NS in (rows.input_ids_NS, rows.position_ids_NS)]
        ids_BS, positions_BS = (queued(plane_BS, teacher.device) for plane_BS in on_host)
        known = documents_known(on_host[1], teacher.device)
        with known, raw_states(teacher, {layer for layer, _ in planes.values()}, keep):
            hidden_BSD = final_hidden(teacher, ids_BS, positions_BS)
        signals = top_k_signals(
            hidden_BSD.flatten(0, 1), lambda hidden: scaled(hidden, head), top_k=layout.top_k, temperature=temperature
        )
        batches.append(tuple(x.unflatten(0, ids_BS.shape).cpu() for x in signals))  # pyright: ignore[reportArgumentType]
        tell(len(ids_BS))
    ids, log_probs, tail = (torch.cat(part) for part in zip(*batches, strict=True))
    bad = log_probs.isnan().any(-1) | tail.isnan()
    if bad.any():
        row, position = (int(index) for index in bad.nonzero()[0])
        raise UserError(
            f"record: the teacher's logits at position {position} of row {shard.start + row} are not finite "
            f"{not_finite_in(teacher.dtype)}"
        )
    states = {plane: torch.cat(parts) for plane, parts in kept.items()}
    return recording.shard_planes(
        layout, (ids, log_probs, tail), recording.row_hashes(rows, shard.start, shard.stop), states
    )


def _ask_of_shard(
    engine: VllmTeacher, rows: PackedRows, shard: range, *, layout: recording.Layout, tell: Callable[[int], Any]
) -> dict[str, Tensor]:
    ids_NS, positions_NS = (x[shard.start : shard.stop] for x in (rows.input_ids_NS, rows.position_ids_NS))
    said = engine.says(ids_NS, positions_NS, tell=tell)
    return recording.shard_planes(layout, said, recording.row_hashes(rows, shard.start, shard.stop), {})


def _listed(folder: Path, manifest: recording.RecordingManifest, num_shards: int) -> tuple[dict[str, Any], ...]:
    """The manifest's entries, up to the first shard that is not full: rows are found by counting."""
    listed = []
    for index in range(num_shards):
        path = folder / recording.shard_name(index)
        file = recording.ShardFile(path, manifest.layout)
        listed.append({"rows": file.num_rows, "bytes": path.stat().st_size, "sha256": file.sha256})
        if file.num_rows < manifest.rows_per_shard:
            break
    return tuple(listed)
