"""What is made of the models for those who run them: quantised copies, a GGUF file, a push to the Hub.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import Tensor

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import QUANTIZED, Quantized
from shoal.atomic_files import written_folder
from shoal.data.sources import pack
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.track import Format
from shoal.runtime import barrier, is_main

from .evaluate import calibration_sources, quantized_from, quantized_inputs, roles
from .run import Run, is_done

log = logging.getLogger(__name__)


def quantize(run: Run) -> None:
    """quantized/ and teacher_quantized/, as far as they are not there."""
    from shoal.compress.quantize.copy import quantised_copy

    check_quantize(run)
    settings = run.recipe.quantize
    assert settings is not None
    for role, format in formats(run).items() if is_main() else ():
        source, inputs, path = quantized_from(run, role), quantized_inputs(run, role), run.dir / role
        if source is None:
            raise UserError(f"{run.dir}: there is no student to quantise yet; run `shoal distill` first")
        if (path / "config.json").is_file() and is_done(Quantized, path / Quantized.FILE, inputs, f"quantize, {role}"):
            continue
        name, folder = source
        unhealed = ", which is not healed: `shoal distill` comes before this" if name == "pruned" else ""
        log.info("quantize: %s to %s (%s%s)", name, format, folder, unhealed)
        with written_folder(path) as temporary:
            record = quantised_copy(
                Checkpoint.read(folder, LoadSettings(**run.load_args())),
                temporary,
                format,
                role=name,
                group_size=settings.group_size,
                calibration=lambda: _calibration_rows(run),
                inputs=inputs,
            )
        sizes = bytes_text(record.num_bytes), bytes_text(record.source_bytes)
        log.info("quantize: %s: %s of %s, by %s", path, *sizes, record.library)
    barrier()


def check_quantize(run: Run) -> None:
    """Refuse, before any work, formats that cannot be made or loaded here.

    Raises:
        UserError: nothing is asked for, a library or device is missing, or the model is quantised already.
    """
    from shoal.compress.quantize.copy import check_quantisable
    from shoal.compress.quantize.formats import SETTINGS

    if run.recipe.quantize is None:
        raise UserError(
            "quantize: the recipe does not say into which format; add for instance quantize.format=int8 to the command"
        )
    for role, format in formats(run).items():
        teacher = Checkpoint.read(run.teacher, LoadSettings(**run.load_args()))  # a student is as its teacher is
        check_quantisable(teacher, format, SETTINGS[role])


def formats(run: Run) -> dict[str, Format]:
    """The quantised roles that the recipe asks for, and their formats."""
    settings = run.recipe.quantize
    if settings is None:
        return {}
    return {role: format for role in QUANTIZED if (format := settings.format_of(role)) is not None}


def _calibration_rows(run: Run) -> Tensor:
    """Token ids (B, S) of the training text."""
    if not (sources := calibration_sources(run)):
        raise UserError("quantize: distill.data holds no text but what the teacher writes; name a source beside it")
    assert run.recipe.quantize is not None
    rows = pack(
        [(source, None) for source in sources],
        run.tokenizer(),
        sequence_length=run.recipe.distill.sequence_length,
        num_tokens=run.recipe.quantize.num_tokens,
        seed=run.recipe.seed,
    )
    return rows.input_ids_NS


def export_gguf(run: Run) -> None:
    """gguf/<model>-<role>.gguf, proven, of the distilled checkpoint, or of the pruned one where there is no other."""
    from shoal.compress.targets import gguf

    folders = roles(run)
    role = next((role for role in ("distilled", "pruned") if role in folders), None)
    if role is None:
        raise UserError(f"{run.dir}: nothing to export yet; run `shoal prune` first")
    inputs = {"model": model_fingerprint(folders[role]), "converter": gguf.converter_fingerprint()}
    path = run.dir / gguf.Gguf.FILE
    if is_done(gguf.Gguf, path, inputs, "gguf") and (path.parent / gguf.Gguf.read(path).file).is_file():
        return
    name = re.sub(r"[^\w.-]+", "-", f"{Path(run.recipe.model).name}-{role}.gguf")
    log.info("gguf: converting %s with llama.cpp's converter", folders[role])
    with written_folder(path.parent) as temporary:
        proof = gguf.export_gguf(folders[role], temporary / name)
        gguf.Gguf(Provenance(inputs), name, proof).write(temporary / path.name)
    log.info("gguf: %s: %s", path.parent / name, proof.in_words())


def export(run: Run) -> None:
    """Push distilled/ with its model card to the Hub."""
    from shoal.eval.export.card import model_card
    from shoal.eval.export.hub import push

    distilled = run.dir / "distilled"
    if not (distilled / "config.json").is_file():
        raise UserError(f"{distilled}: nothing to export yet; run `shoal distill` first")
    assert run.recipe.export.hub_repo is not None
    url = push(
        distilled,
        model_card(run.dir, base_folder=run.teacher),
        run.recipe.export.hub_repo,
        private=run.recipe.export.private,
    )
    log.info("export: %s", url)
