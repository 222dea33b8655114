"""Checkpoints that are complete or absent.

DeepSpeed writes its pointer before all shards exist, accepts flipped bytes and, with the pointer missing, quietly
starts from the beginning. So a checkpoint here counts only once its manifest, written last and renamed, names every
file with its size and checksum; one that does not match its manifest is skipped with a message. Checksums are made
while files are written (background.py), and a file is read again only if it has changed since then by the time that the
system keeps, which nobody can set.

DeepSpeed unpickles what it loads, which runs code. So the manifest is signed with a key of the user's, and one that is
not is refused. Rank 0 signs and decides; the other ranks follow it, whatever keys their nodes hold.

Under ZeRO 1 to 3 every rank's files hold its share of the optimizer. Before another number of ranks can go on, rank 0
writes the shares once more as one file per parameter (DeepSpeed's universal format), beside the ranks' own files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shoal.artifacts.artifact import differences
from shoal.artifacts.identity import refuse_other_training, step_of
from shoal.atomic_files import cache_dir, file_hash, flush, write_text, written_folder
from shoal.errors import UserError, explained_disk_errors
from shoal.machine import num_cores
from shoal.progress import doing
from shoal.ranks import is_main, rank, world_size
from shoal.runtime import barrier, environment, together, warn_of_versions
from shoal.trust import CONSENT, is_signed, is_trusted, signed

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNIVERSAL = "universal"
UNIVERSAL_POINTER = "latest_universal"


def commit(
    folder: Path,
    inputs: dict[str, Any],
    *,
    zero_stage: int = 0,
    written: tuple[dict[Path, str], Exception | None] = ({}, None),
) -> None:
    """Make the files in ``folder`` a complete checkpoint of the run that ``inputs`` describes; every rank calls this.

    ``written`` is what this rank's BackgroundWriter has waited for. Ranks share the reading of all other files, which
    are small. On a shared disk a rank may not see yet what another node has just written: one that does reads it.
    """
    own, failure = {str(file.relative_to(folder)): known for file, known in written[0].items()}, written[1]
    barrier()

    def seen() -> tuple[set[str], set[str]]:
        with explained_disk_errors(folder):
            if failure is not None:
                raise failure
            files = (file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
            return {str(file.relative_to(folder)) for file in files}, set(own)

    of_ranks = together(seen)
    mine = []
    for number, name in enumerate(sorted(set().union(*(names for names, _ in of_ranks)))):
        wrote = [of_rank for of_rank, (_, names) in enumerate(of_ranks) if name in names]
        see = [of_rank for of_rank, (names, _) in enumerate(of_ranks) if name in names]
        if (wrote or see)[number % len(wrote or see)] == rank():
            mine.append(name)
    gathered = together(lambda: {name: _stamp(folder / name, own.get(name)) for name in mine})
    if is_main():
        stamps = {name: stamp for part in gathered for name, stamp in part.items()}
        manifest = {
            "inputs": inputs,
            "environment": environment(),
            "layout": {"ranks": world_size(), "zero_stage": zero_stage},
            "files": stamps,
        }
        write_text(folder / MANIFEST, json.dumps(signed(manifest), indent=1))
    barrier()


@contextlib.contextmanager
def removed_unless_complete(folder: Path) -> Iterator[None]:
    """Remove the checkpoint in ``folder`` where saving it fails, unless its manifest stands there already: a rank that
    dies while the others wait for it at the end takes nothing from what is complete."""
    try:
        yield
    except BaseException:
        if is_main() and not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def last_complete(folder: Path, inputs: dict[str, Any], *, by_manifest: bool = False) -> Path | None:
    """The newest complete checkpoint under ``folder``; damaged ones are named in the log and skipped.

    ``by_manifest`` = nobody goes on from it yet: files are not looked at, which takes minutes where they are large and
    were copied.

    Raises:
        UserError: the newest finished one belongs to another run, or another user has made it.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            manifest = _manifest(checkpoint)
            _refuse_foreign(checkpoint, manifest, inputs)
            if not by_manifest:
                _check_files(checkpoint, manifest)
                warn_of_versions(checkpoint, manifest.get("environment", {}))
        except _Damaged as damage:
            log.warning("%s: %s; resuming from the checkpoint before it", checkpoint, damage)
            continue
        return checkpoint
    return None


def _refuse_foreign(checkpoint: Path, manifest: dict[str, Any], inputs: dict[str, Any]) -> None:
    refuse_other_training(checkpoint, differences(inputs, manifest.get("inputs", {})))
    if not is_signed(manifest) and not is_trusted(checkpoint):
        raise UserError(
            f"{checkpoint}: is not signed with your key in {cache_dir()} (another user, an older shoal or another "
            f"cache wrote it), and resuming runs any code in a checkpoint. Delete {checkpoint.parent} to train from "
            "the beginning; if you know its origin, set SHOAL_CACHE to the folder with the key, or the environment "
            f"variable {CONSENT}={checkpoint.parent.parent.resolve()}"
        )


def layout(checkpoint: Path) -> dict[str, int]:
    """How many ranks wrote this complete checkpoint (`ranks`), and under which ZeRO stage (`zero_stage`)."""
    return _manifest(checkpoint)["layout"]


def needs_universal(checkpoint: Path, *, zero_stage: int) -> bool:
    """Whether DeepSpeed has to load the universal form of ``checkpoint``, which is made here then.

    Raises:
        UserError: the checkpoint's ZeRO stage lays the optimizer out in a way that this stage cannot read.
    """
    saved = layout(checkpoint)
    if saved["zero_stage"] != zero_stage and not {saved["zero_stage"], zero_stage} <= {1, 2}:
        raise UserError(
            f"{checkpoint}: was trained under ZeRO stage {saved['zero_stage']}, and DeepSpeed cannot resume it under "
            f"stage {zero_stage}, which stores the optimizer differently (only 1 and 2 can be exchanged). Set stage "
            f"{saved['zero_stage']} in distill.deepspeed again; the number of ranks may change"
        )
    if zero_stage == 0 or saved == {"ranks": world_size(), "zero_stage": zero_stage}:
        return False  # stage 0 keeps the optimizer whole on every rank
    log.info("%s: written by %d rank(s), converted for %d", checkpoint, saved["ranks"], world_size())
    _convert(checkpoint, checkpoint / UNIVERSAL)
    write_text(checkpoint / UNIVERSAL_POINTER, UNIVERSAL)  # where DeepSpeed looks for the folder's name
    return True


def _convert(checkpoint: Path, universal: Path) -> None:
    """Write the ranks' shares as one file per parameter; whole or not at all."""
    from deepspeed.checkpoint import ds_to_universal

    tag = (checkpoint / "latest").read_text().strip()
    with written_folder(universal) as folder:
        request = argparse.Namespace(
            input_folder=str(checkpoint / tag),
            output_folder=str(folder),
            # further processes would be forks of one that has joined a process group
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(request)


def separate_groups(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Undo what DeepSpeed mixes up when it loads the universal form of a ZeRO-3 checkpoint.

    All groups are given one and the same `step` tensor, which each of them then advances, so Adam's bias correction
    runs ahead; and all are given the first group's settings, so norms and biases would decay.
    """
    saved = torch.load(checkpoint / UNIVERSAL / "zero" / "optimizer_state.pt", weights_only=False)["param_groups"]
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})


def own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter's state a `step` of its own after DeepSpeed has loaded the universal form, where a kernel
    that updates on the device looks for it: as torch's load_state_dict does, and DeepSpeed does not."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():  # ZeRO 3 lists in its groups only what it steps at the moment
        step = state.get("step")
        if torch.is_tensor(step):
            state["step"] = step.detach().clone().to(parameter.device if on_device else step.device)


def remove_older(folder: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, and what is left of older ones that were never finished.
    Called after a commit, so that one always remains. What cannot be deleted now is, after the next one."""
    every = sorted((c for c in folder.glob("checkpoint-*") if c.is_dir() and step_of(c) >= 0), key=step_of)
    kept = [checkpoint for checkpoint in every if (checkpoint / MANIFEST).is_file()][-keep:]
    for old in every[: every.index(kept[0])]:
        (old / MANIFEST).unlink(missing_ok=True)  # first: a half-deleted checkpoint must not look whole
        shutil.rmtree(old, ignore_errors=True)  # NFS keeps a file that is open somewhere


class _Damaged(Exception):
    """Why a checkpoint does not count."""


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises: _Damaged."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise _Damaged("was not finished") from None
    except ValueError:
        raise _Damaged("has a damaged manifest") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise _Damaged("has a damaged manifest")
    return manifest


def _check_files(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Compare the files with the manifest: DeepSpeed looks for names by pattern, so none may be there besides.

    Raises:
        _Damaged: they differ.
    """
    changed: dict[str, dict[str, Any]] = {}
    for name, stamp in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise _Damaged(f"{name} is missing")
        state = file.stat()
        if state.st_size != stamp["bytes"]:
            raise _Damaged(f"{name} has {state.st_size:,} bytes instead of {stamp['bytes']:,}")
        if state.st_ctime_ns != stamp.get("changed_ns"):  # written to, or copied, since it was stamped
            changed[name] = stamp
    with doing(f"reading {checkpoint.name} again"), ThreadPoolExecutor(num_cores()) as pool:
        hashes = pool.map(lambda name: file_hash(checkpoint / name), changed)
        for (name, stamp), found in zip(changed.items(), hashes, strict=True):
            if found != stamp["sha256"]:
                raise _Damaged(f"{name} does not match its checksum")
    for file in checkpoint.rglob("*"):
        name = file.relative_to(checkpoint)
        ours = name.parts[0] in (MANIFEST, UNIVERSAL, UNIVERSAL_POINTER)  # the last two are made when needed
        hidden = any(part.startswith(".") for part in name.parts)  # of file systems and half-written; no pattern's
        if (file.is_symlink() or file.is_file()) and not (ours or hidden or str(name) in manifest["files"]):
            raise _Damaged(f"holds {name}, which its manifest does not name")


def _stamp(file: Path, known_hash: str | None = None) -> dict[str, Any]:
    """Of a file that is on the disk then: what the manifest says of it."""
    flush(file)
    with file.open("rb") as opened:  # which asks a shared disk for what it has now
        digest = known_hash or hashlib.file_digest(opened, "sha256").hexdigest()
        state = os.fstat(opened.fileno())
    return {"bytes": state.st_size, "changed_ns": state.st_ctime_ns, "sha256": digest}
