"""Checkpoints that are complete or absent.

DeepSpeed writes its pointer before all shards exist, accepts flipped bytes and, with the pointer missing, quietly
starts from the beginning. So a checkpoint here counts only once its manifest, written last and renamed, names every
file with its size and checksum; one that does not match its manifest is skipped with a message.

Under ZeRO 1 to 3 every rank's files hold its share of the optimizer. Before another number of ranks can go on, rank 0
writes the shares once more as one file per parameter (DeepSpeed's universal format), beside the ranks' own files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.artifact import differences
from shoal.errors import UserError
from shoal.runtime import barrier, is_main, rank, world_size
from shoal.whole_files import file_hash, write_text, written_folder

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNIVERSAL = "universal"


def commit(folder: Path, inputs: dict[str, Any], *, zero_stage: int = 0) -> None:
    """Make the files in ``folder`` a complete checkpoint of the run that ``inputs`` describes; every rank calls this.

    Ranks share the hashing: a large checkpoint is read once by all of them together.
    """
    barrier()
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    mine = {str(file.relative_to(folder)): _stamp(file) for file in files[rank() :: world_size()]}
    gathered: list[Any] = [mine]
    if dist.is_initialized() and world_size() > 1:
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, mine)
    if is_main():
        stamps = {name: stamp for part in gathered for name, stamp in part.items()}
        manifest = {"inputs": inputs, "layout": {"ranks": world_size(), "zero_stage": zero_stage}, "files": stamps}
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    barrier()


def last_complete(folder: Path, inputs: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint under ``folder``; damaged ones are named in the log and skipped.

    Raises:
        UserError: the newest complete one belongs to another run.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        problem = _damage(checkpoint)
        if problem is not None:
            log.warning("%s: %s; going back to the checkpoint before it", checkpoint, problem)
            continue
        _refuse_other_run(checkpoint, json.loads((checkpoint / MANIFEST).read_text()), inputs)
        return checkpoint
    return None


def refuse_other_run(folder: Path, inputs: dict[str, Any]) -> None:
    """Refuse the newest finished checkpoint under ``folder`` if it is another run's, by its manifest alone: its files
    are not read, which takes minutes where they are large.

    Raises:
        UserError: it is.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # unfinished or torn: not gone on from
            _refuse_other_run(checkpoint, json.loads((checkpoint / MANIFEST).read_text()), inputs)
            return


def _refuse_other_run(checkpoint: Path, manifest: dict[str, Any], inputs: dict[str, Any]) -> None:
    if differing := differences(inputs, manifest["inputs"]):
        raise UserError(
            f"{checkpoint}: belongs to another run: {'; '.join(differing)}. Set the recipe back, choose another "
            f"run_dir, or delete {checkpoint.parent} to train from the beginning"
        )


def layout(checkpoint: Path) -> dict[str, int]:
    """How many ranks wrote this complete checkpoint (`ranks`), and under which ZeRO stage (`zero_stage`)."""
    return json.loads((checkpoint / MANIFEST).read_text())["layout"]


def needs_universal(checkpoint: Path, *, zero_stage: int) -> bool:
    """Whether DeepSpeed has to load the universal form of ``checkpoint``, which is made here where it is missing.

    Raises:
        UserError: the checkpoint's ZeRO stage lays the optimizer out in a way that this stage cannot read.
    """
    saved = layout(checkpoint)
    if saved["zero_stage"] != zero_stage and not {saved["zero_stage"], zero_stage} <= {1, 2}:
        raise UserError(
            f"{checkpoint}: was trained under ZeRO stage {saved['zero_stage']}, and DeepSpeed cannot go on from it "
            f"under stage {zero_stage}: they lay out the optimizer differently (only 1 and 2 can be exchanged). "
            f"Set stage {saved['zero_stage']} in distill.deepspeed again; the number of ranks may change"
        )
    if zero_stage == 0 or saved == {"ranks": world_size(), "zero_stage": zero_stage}:
        return False  # stage 0 keeps the optimizer whole on every rank
    universal = checkpoint / UNIVERSAL
    if not universal.is_dir() or _damage(universal) is not None:
        log.info("%s: written by %d rank(s), made to fit %d", checkpoint, saved["ranks"], world_size())
        _convert(checkpoint, universal)
    write_text(checkpoint / "latest_universal", UNIVERSAL)  # where DeepSpeed looks for the folder's name
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
        stamps = {str(file.relative_to(folder)): _stamp(file) for file in folder.rglob("*") if file.is_file()}
        write_text(folder / MANIFEST, json.dumps({"files": stamps}))


def separate_groups(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Undo what DeepSpeed mixes up when it loads the universal form of a ZeRO-3 checkpoint.

    All groups are given one and the same `step` tensor, which each of them then advances, so Adam's bias correction
    runs ahead; and all are given the first group's settings, so norms and biases would decay.
    """
    saved = torch.load(checkpoint / UNIVERSAL / "zero" / "optimizer_state.pt", weights_only=False)["param_groups"]
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def remove_older(folder: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints. Called after a commit, so that one always remains."""
    complete = [c for c in sorted(folder.glob("checkpoint-*"), key=_step) if (c / MANIFEST).is_file()]
    for old in complete[:-keep]:
        (old / MANIFEST).unlink()  # first: a half-deleted checkpoint must not look whole
        shutil.rmtree(old)


def _damage(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return "was not finished"
    except json.JSONDecodeError:
        return "has a damaged manifest"
    for name, stamp in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"lacks {name}"
        if file.stat().st_size != stamp["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {stamp['bytes']:,}"
        if _stamp(file) != stamp:
            return f"{name} does not match its checksum"
    return None


def _stamp(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def _step(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1
