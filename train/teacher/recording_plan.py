"""A recording of the teacher's signals: what identifies one, and what of it is still to be written.

The recipe's section is shoal.recipe.distill.Record; record.py writes shards, recording_reader.py reads them in
training, and signals.RecordedTeacher hands them on.

A recording is a folder of shards (see recording_format) and a manifest. Shards are written one by one, each under a
temporary name, so that a recording that was killed goes on at the next one; the manifest lists them once all are there.
What a shard holds depends on its rows alone, not on who wrote it: any number of ranks makes the same files.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shoal.artifacts.artifact import Artifact, Provenance, differences
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import tokenizer_fingerprint
from shoal.models.load import Checkpoint
from shoal.ranks import is_main, rank, world_size
from shoal.recipe.distill import Distill, Record
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import Shapes, shaping, shaping_keys
from shoal.runtime import environment, together

from .recording_format import HEADER_BYTES, Layout, ShardFile, TokenRows, row_hashes

log = logging.getLogger(__name__)

PREFIX = "distill.teacher.prefix"
"""Names, in what identifies a recording, the layers that need not run in training."""


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


def recording_inputs(
    settings: Record, teacher: Checkpoint, *, model: str, sequence_length: int, prefix: int | None = None
) -> dict[str, Any]:
    """What identifies recorded signals besides their rows, which are compared one by one.

    ``model`` is the teacher's fingerprint, ``prefix`` the number of layers that distill.teacher.prefix spares. Rows per
    shard and the like decide how files are cut, not what they say.
    """
    return {
        "model": model,
        "tokenizer": tokenizer_fingerprint(teacher.folder),
        **settings.engine_inputs,
        "dtype": teacher.load.dtype,
        **({} if settings.engine_inputs else {"attention": teacher.load.attention}),  # vLLM has its own
        "sequence_length": sequence_length,
        **shaping(settings, Shapes.SIGNALS, "record."),
        **({} if prefix is None else {PREFIX: f"{prefix} layers"}),
    }


def rows_from(inputs: dict[str, Any]) -> dict[str, Any]:
    """What shapes training rows that are recorded; which loss terms learn from a source does not."""
    images = "distill.data (images)"
    keys = (*shaping_keys(Distill, Shapes.ROWS, "distill."), "data", images, *shaping_keys(Recipe, Shapes.ROWS))
    shaped = {key: inputs[key] for key in keys if key in inputs}
    sources = [{key: source[key] for key in source if key != "losses"} for source in shaped["distill.data"]]
    return shaped | {"distill.data": sources}


def recording_layout(
    settings: Record, teacher: Checkpoint, *, sequence_length: int, prefix: int | None = None
) -> Layout:
    """The planes that ``settings`` ask for of this teacher, told from its configuration. ``prefix`` is the number of
    layers that distill.teacher.prefix spares.

    Raises:
        UserError: more tokens than its vocabulary has, or layers that it has not.
    """
    config = text_config(teacher.config)
    if settings.top_k > config.vocab_size:
        raise UserError(
            f"record.top_k: {settings.top_k} is more than the {config.vocab_size:,} tokens of the vocabulary of "
            f"{teacher.folder}; set at most that"
        )
    if wrong := [layer for layer in settings.states if layer >= config.num_hidden_layers]:
        raise UserError(
            f"record.states: {wrong[0]} is no layer of {teacher.folder}, which has {config.num_hidden_layers}; "
            f"the last is {config.num_hidden_layers - 1}"
        )
    if len(set(settings.states)) < len(settings.states):
        raise UserError(f"record.states: {list(settings.states)} names a layer twice; name each once")
    layout = Layout(sequence_length, settings.top_k, config.vocab_size, config.hidden_size, tuple(settings.states))
    if prefix is None:
        return layout
    return replace(layout, prefix=prefix - 1, prefix_dtype=str(teacher.loaded_dtype()).removeprefix("torch."))


def plan_recording(
    rows: TokenRows,
    folder: Path,
    settings: Record,
    *,
    layout: Layout,
    inputs: dict[str, Any],
    rows_from: dict[str, Any],
) -> list[range]:
    """The rows of every shard that is still to be written into ``folder``. Every rank calls this, before any weight is
    loaded.

    Finished shards are read and compared with their checksums by all ranks together; damaged ones are named in the log
    and written again.

    Raises:
        UserError: the folder holds a recording of something else, or the disk has no room for the rest.
    """
    manifest = RecordingManifest(Provenance(inputs), settings.rows_per_shard, layout, rows_from)
    together(lambda: _claim(folder, manifest) if is_main() else None)
    on_disk = RecordingManifest.read(folder / RecordingManifest.FILE)
    shards = shards_of(len(rows), settings.rows_per_shard)
    own_shards = shards[rank() :: world_size()]
    missing = together(
        lambda: [shard for shard in own_shards if not _is_there(folder, shard, rows, on_disk, rows_from)]
    )
    pending = sorted((shard for part in missing for shard in part), key=lambda shard: shard.start)
    together(lambda: _announce(folder, layout, len(shards), pending) if is_main() else None)
    return pending


def _claim(folder: Path, manifest: RecordingManifest) -> None:
    """Make ``folder`` this recording's, or refuse it where it is another's."""
    path = folder / RecordingManifest.FILE
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds other files; set record.folder to an empty or new folder")
        manifest.write(path)
        return
    on_disk = RecordingManifest.read(path)
    differing = differences(manifest.provenance.inputs, on_disk.provenance.inputs)
    if on_disk.rows_per_shard != manifest.rows_per_shard:
        differing.append(
            f"record.rows_per_shard is {manifest.rows_per_shard} in this recipe but {on_disk.rows_per_shard} there"
        )
    if differing:
        raise UserError(
            f"{path}: belongs to another run: {'; '.join(differing)}. Set the recipe back, set record.folder to "
            f"another folder, or delete {folder} to record again"
        )
    warn_of_versions(path, on_disk.provenance)
    for leftover in folder.glob(".shard-*.tmp"):  # of killed processes: nobody else is at it
        leftover.unlink(missing_ok=True)


def _is_there(
    folder: Path, shard: range, rows: TokenRows, on_disk: RecordingManifest, rows_from: dict[str, Any]
) -> bool:
    """Whether the shard stands in ``folder`` whole."""
    path = folder / shard_name(shard.start // on_disk.rows_per_shard)
    if not path.is_file():
        return False
    try:
        file = ShardFile(path, on_disk.layout)
        if not file.is_intact():
            raise UserError(f"{path}: does not match its checksum")
        if file.recording != on_disk.provenance.fingerprint:
            raise UserError(f"{path}: is a part of another recording")
    except UserError as error:
        log.warning("%s; recording it again", error)
        return False
    refuse_other_rows(path, file.hashes, rows, shard.start, differences(rows_from, on_disk.rows_from))
    return file.num_rows >= len(shard)  # fewer: it was the last one of a smaller budget


def _announce(folder: Path, layout: Layout, num_shards: int, pending: Sequence[range]) -> None:
    """Say what will be written, and refuse where it does not fit.

    Raises:
        UserError: the disk has less room.
    """
    if not pending:
        log.info("record: all %d shards are there and whole (%s)", num_shards, folder)
        return
    need = sum(layout.num_bytes(len(shard)) + HEADER_BYTES for shard in pending)
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
            f"{folder}: recording needs {bytes_text(need)} there and the disk has {bytes_text(free)} free; set "
            "record.folder to a folder on a larger disk, lower record.num_tokens, record.top_k or the number of "
            "record.states, or do without distill.teacher.prefix"
        )


def shards_of(num_rows: int, rows_per_shard: int) -> list[range]:
    """The rows of every shard."""
    return [range(start, min(start + rows_per_shard, num_rows)) for start in range(0, num_rows, rows_per_shard)]


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:06d}.safetensors"


def refuse_other_rows(
    path: Path, hashes: np.ndarray, rows: TokenRows, start: int, shaped_otherwise: Sequence[str]
) -> None:
    """Refuse a shard whose rows, as far as both go, are not those of this run from ``start`` on. ``hashes`` (N, 8) are
    those of the shard, ``shaped_otherwise`` says which settings shaped its rows in another way.

    Raises:
        UserError: they are not.
    """
    both = min(len(hashes), len(rows) - start)
    unequal = (row_hashes(rows, start, start + both) != hashes[:both]).any(-1)
    if unequal.any():
        reason = "; ".join(shaped_otherwise) or "the text or the order of its documents is another"
        raise UserError(
            f"{path}: belongs to another run: row {start + int(unequal.argmax())} has other tokens there ({reason}). "
            "Set the recipe back, or record into another folder"
        )


def warn_of_engine(path: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Log where the recording at ``path`` was begun with another version of vLLM than goes on with it."""
    if before is not None and before["version"] != now["version"]:
        log.warning(
            "%s: was begun with version %s of vLLM, this is %s; the teacher's last digits may differ",
            path,
            before["version"],
            now["version"],
        )


def warn_of_versions(path: Path, before: Provenance) -> None:
    """Log what of the libraries has changed since the recording at ``path`` was begun."""
    now = environment()
    changed = [name for name in ("torch", "transformers") if now[name] != before.environment.get(name)]
    for name in changed:
        log.warning(
            "%s: was recorded with %s %s, this is %s; the teacher's last digits may differ",
            path,
            name,
            before.environment.get(name),
            now[name],
        )
