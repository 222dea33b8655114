"""Write the student of a plan to a folder that appears only when it is complete and proven.

Two routes lead there. Where only layers go, the stored tensors are copied file by file under their new names, and no
model is built: any size, any dtype, any quantisation. Where tensors themselves must change, the student is made in
memory. Both are proven in the same ways.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from shoal.artifacts.plan import ClosedGap, PruningPlan
from shoal.atomic_files import fingerprint, write_json, written_folder
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.models.anatomy import anatomy, decoder_layers, text_config
from shoal.models.checkpoint_files import (
    CLOSED_GAPS,
    Shard,
    StoredTensor,
    copy_beside,
    has_tokenizer,
    json_or_empty,
    read_shards,
)
from shoal.models.load import (
    load_config,
    load_model,
    load_tokenizer,
    loaded_dtype,
    refuse_incomplete,
)
from shoal.progress import doing
from shoal.recipe.prune import Compensate, Width

from .changes.calibration import calibrating
from .changes.fit import COMPENSATE, Compensation, refuse_quantised
from .changes.fit import compensate as compensate_gaps
from .changes.fold import output_names
from .changes.narrowing import NARROW, NarrowedTensors, NarrowFiles, Narrowing, Units, cannot_narrow, narrow_files
from .changes.units import as_kept, measure_width
from .edits.tensors import tensors_in_place, with_layers
from .surgery.changed_tensors import changed_tensors, stored_places
from .surgery.config_cut import uncut_layers
from .surgery.cut_model import kept_layers, refuse_changed_layers, skipped
from .surgery.proof import Behaviour, behaviour, memory_shortage, prove_by_files, prove_by_run, why_not_run
from .surgery.quantised import SIDE_FILES, LayerNames, cut_stored_config, renumbered, without_quantization
from .surgery.resumable_folder import only_writer
from .surgery.shards import (
    UNCHANGED,
    Changed,
    NewShard,
    compare_shards,
    new_shards,
    shards_fingerprint,
    write_shards,
)
from .surgery.stored_names import (
    Loading,
    NotByCopy,
    find_layers,
    load_without_data,
    modules_inside,
    other_towers,
    student_names,
)

log = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"

Proof = Literal["auto", "run", "files"]


@dataclass(frozen=True)
class Teacher:
    """A checkpoint folder and what can be said of it without its weights."""

    folder: Path
    config: PreTrainedConfig
    shards: list[Shard]
    trust_remote_code: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape, of all tensors."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """All tensors by their stored names."""
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}

    def load(self, *, dtype: str = "stored") -> PreTrainedModel:
        """The model itself."""
        return load_model(self.folder, dtype=dtype, attention=None, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Copy:
    """A student that can be written without building it."""

    teacher: Teacher
    config: PreTrainedConfig
    """Configuration of the student."""
    shards: list[NewShard]
    side_files: dict[str, object]
    """Settings of the quantisation that lie beside config.json: file name -> content."""


def apply_plan(
    teacher_folder: Path,
    plan: PruningPlan,
    out: Path,
    *,
    seed: int = 0,
    proof: Proof = "auto",
    compensate: Compensate | None = None,
    width: Width | None = None,
    trust_remote_code: bool = False,
) -> PruningPlan:
    """Write the student of ``plan`` to the folder ``out``, which appears only when it is complete and proven.

    Returns ``plan`` with how the gaps were closed, where ``compensate`` asks for it, and with what stays of layers that
    it narrows, which is measured as ``width`` says.

    A plan that only drops layers is carried out by copying bytes, with a few megabytes of memory; a copy that was
    interrupted goes on where it stopped. What makes up for the layers is written over the copy, and so are tensors that
    become smaller. ``seed`` is for calibration text. ``proof``:

    - `run`: the saved folder is loaded and gives, bit for bit, the logits and greedy text of the teacher with the
      layers skipped and the edits in force. One of the two is in memory at a time.
    - `files`: headers, samples of every tensor's bytes, and every layer's kind and settings are what they were.
    - `auto`: `files`, and `run` too where the model can run here.

    Of narrowed layers both say that they are what they were with zeros in the places of what goes, up to rounding in
    float32: sums over fewer terms are rounded otherwise.

    Raises:
        UserError: a plan for another model, ``out`` being the teacher's folder or being written by another process, an
            architecture or a quantisation that cannot be cut, a damaged checkpoint, a full disk.
    """
    teacher = _read_teacher(teacher_folder, out, plan, trust_remote_code=trust_remote_code)
    keep = kept_layers(plan.num_layers, plan.drop)
    runs = _shall_run(teacher, proof, in_float32=plan.width is not None)
    whole, smaller = teacher, narrow_files(teacher_folder, teacher.config, plan.width, teacher.shards)
    if smaller is not None:
        teacher = replace(teacher, config=smaller.own.config, shards=smaller.shards)
    skeleton, copy = _route(teacher, plan, keep, compensate)
    with only_writer(out):
        compensation = None if compensate is None else _compensation(teacher, plan, compensate, seed=seed)
        plan, units = replace(plan, gaps=() if compensation is None else compensation.gaps), dict[int, Units]()
        if smaller is not None:
            assert width is not None
            units = _units(whole, plan, smaller.own, width, seed=seed)
            plan = replace(plan, width=as_kept(smaller.width, units))
        source = [shards_fingerprint(copy.shards)] if copy else [str(teacher_folder.resolve()), asdict(plan)]
        # gaps that were closed to the last digit as before have the same tensors
        chosen = [*map(asdict, plan.gaps), *([asdict(plan.width)] if plan.width else [])]
        with written_folder(out, key=fingerprint([*source, *chosen])) as folder:
            new_layers = _as_loaded(teacher, compensation) if compensation and (runs or not copy) else {}
            if copy:
                _name_closed_gaps(copy.config, teacher, plan.gaps)
                expected = _write_copy(copy, folder, _changed(copy, skeleton, compensation, smaller, units))
            else:
                expected = _write_from_memory(teacher, plan, folder, compensated=new_layers, runs=runs)
            copy_beside(teacher_folder, folder)  # a cut changes no token and no licence
            with doing("prune: proving the student by its files"):
                prove_by_files(folder, skeleton, keep)
            if runs:
                log.info("prune: running the teacher after %s, then the student", plan.in_words())
                with doing("prune: running the teacher as planned"):
                    if smaller is not None:
                        model = whole.load(dtype="float32")
                        with smaller.own.masked(model, units), skipped(model, plan.drop):
                            expected = behaviour(model)
                        del model
                    expected = expected or _planned_behaviour(teacher.load(), plan, new_layers)
                with doing("prune: proving the student by running it"):
                    reference = f"the teacher after {plan.in_words()}"
                    prove_by_run(folder, expected, reference=reference, is_rounded=smaller is not None)
    return plan


def _units(teacher: Teacher, plan: PruningPlan, own: Narrowing, settings: Width, *, seed: int) -> dict[int, Units]:
    """What stays of every layer."""
    trusted = teacher.trust_remote_code
    with calibrating(teacher.folder, settings, section=NARROW, seed=seed, trust_remote_code=trusted) as (source, rows):
        return measure_width(source, own, plan.drop, settings, rows)


def _read_teacher(folder: Path, out: Path, plan: PruningPlan, *, trust_remote_code: bool) -> Teacher:
    if folder.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: is the teacher's own folder, or holds it; choose another one for the student")
    if has_tokenizer(folder):  # a damaged one is refused
        load_tokenizer(folder, must_fit=False, trust_remote_code=trust_remote_code)
    else:
        log.info("prune: %s holds no tokenizer, so there is none to copy", folder)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    refuse_own_code(folder, config, trust_remote_code=trust_remote_code)
    num_layers = text_config(config).num_hidden_layers
    if plan.num_layers != num_layers:
        raise UserError(
            f"plan: is for a model of {plan.num_layers} layers, but {folder} has {num_layers}; "
            "make the plan for this model"
        )
    shards = read_shards(folder)
    if inside := [shard.file for shard in shards if shard.file.resolve().is_relative_to(out.resolve())]:
        raise UserError(f"{out}: holds {inside[0].name} of the teacher; choose another folder for the student")
    return Teacher(folder, config, shards, trust_remote_code)


def refuse_own_code(folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool) -> None:
    """Refuse a model that transformers alone cannot build.

    Raises:
        UserError: its code came with the checkpoint.
    """
    module = type(config).__module__
    if trust_remote_code:  # without consent the class of that name in transformers is taken
        module = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", module)
    if not module.startswith("transformers."):
        raise UserError(
            f"{folder}: is built by code that came with it ({module}); the cut could not be loaded without that "
            "code, so shoal cuts only architectures that transformers has: give another model"
        )


def _shall_run(teacher: Teacher, proof: Proof, *, in_float32: bool) -> bool:
    if proof == "files":
        return False
    if reason := why_not_run(teacher.config, teacher.shards):
        if proof == "run":
            raise UserError(f"prune: the student cannot be proven by running it: {reason}; ask for proof: files")
        log.warning(
            "prune: proven by its files and layers, not by running it: %s. Run it where it can run before you trust it",
            reason,
        )
        return False
    if shortage := memory_shortage(teacher.shards, in_float32=in_float32):
        log.warning(
            "prune: %s; %s",
            shortage,
            "trying all the same" if proof == "run" else "so it is proven by its files and layers, not by its logits",
        )
        return proof == "run"
    return True


def _route(
    teacher: Teacher, plan: PruningPlan, keep: Sequence[int], settings: Compensate | None
) -> tuple[PreTrainedModel, Copy | None]:
    """The teacher without its weights, and what there is to copy; None where the student must be made in memory."""
    plain, quantisation = without_quantization(teacher.config)
    if settings is not None:
        refuse_quantised(teacher.folder, teacher.config)
    skeleton, loading = load_without_data(plain, teacher.shapes)
    if not quantisation:
        refuse_incomplete(teacher.folder, plain.model_type, loading.missing, loading.mismatched)
    try:
        copy = _planned_copy(teacher, plain, skeleton, loading, keep)
        if settings is not None:
            for layer in keep[keep.index(min(plan.drop) - 1) :]:
                stored_places(skeleton, layer, output_names(skeleton, layer), teacher.stored)
        return skeleton, copy
    except NotByCopy as reason:
        if quantisation:
            raise UserError(
                f"{teacher.folder}: is quantised, and its tensors cannot be copied as they are: {reason}; "
                "give the full-precision model"
            ) from reason
        if plan.width is not None:
            raise cannot_narrow(teacher.folder, reason) from reason
        log.info("prune: making the student in memory: %s", reason)
        return skeleton, None


def _planned_copy(
    teacher: Teacher,
    plain: PreTrainedConfig,
    skeleton: PreTrainedModel,
    loading: Loading,
    keep: Sequence[int],
) -> Copy:
    """Raises: NotByCopy, or the UserErrors of cut_config."""
    prefix, model_prefix = find_layers(teacher.shapes, skeleton, plain), f"{anatomy(skeleton).layers_name}."
    num_layers = len(decoder_layers(skeleton))
    names = student_names(teacher.shapes, prefix=prefix, num_layers=num_layers, keep=keep)
    layer_names = LayerNames(
        prefixes=tuple({prefix, model_prefix}),
        others=frozenset(other_towers(teacher.shapes, {prefix, model_prefix})),
        modules=tuple(
            sorted(modules_inside(teacher.shapes, prefix) | modules_inside(skeleton.state_dict(), model_prefix))
        ),
    )
    config = cut_stored_config(teacher.config, keep, layer_names)
    config.architectures = config.architectures or [type(skeleton).__name__]
    shapes = {names[name]: shape for name, shape in teacher.shapes.items() if name in names}
    student, student_loading = load_without_data(without_quantization(config)[0], shapes)
    # of multi-token prediction, which transformers ignores by the teacher's numbers, neither says anything
    own = student_loading.renumbered((model_prefix, prefix), range(len(keep)))
    if difference := own.difference(loading.renumbered((model_prefix, prefix), keep)):
        raise NotByCopy(f"of the stored tensors, {difference} in the student")
    refuse_changed_layers(skeleton, student, keep)
    side_files = {
        name: renumbered(settings, keep, layer_names, where=name)
        for name in SIDE_FILES
        if (settings := json_or_empty(teacher.folder / name))
    }
    shards = new_shards(teacher.shards, names)
    log.info(
        "prune: copying %s of %s as they are stored, without building the model",
        *(bytes_text(sum(shard.num_bytes for shard in some)) for some in (shards, teacher.shards)),
    )
    return Copy(teacher, config, shards, side_files)


def _write_copy(copy: Copy, folder: Path, changed: Changed) -> None:
    write_shards(copy.shards, folder, changed)
    with doing("prune: reading back what was copied"):
        compare_shards(copy.shards, folder, changed)
    copy.config.save_pretrained(folder)
    for name, content in copy.side_files.items():
        write_json(folder / name, content)
    generation = copy.teacher.folder / GENERATION_FILE
    if generation.is_file():
        copy_beside(copy.teacher.folder, folder, (GENERATION_FILE,))
    else:  # what transformers does where the settings are still in config.json
        GenerationConfig.from_pretrained(
            copy.teacher.folder, config_file_name="config.json", _from_model_config=True
        ).save_pretrained(folder)


def _changed(
    copy: Copy,
    skeleton: PreTrainedModel,
    compensation: Compensation | None,
    smaller: NarrowFiles | None,
    units: Mapping[int, Units],
) -> Changed:
    names = {old: new for shard in copy.shards for old, new in shard.tensors.items()}
    if smaller is not None:
        return NarrowedTensors(smaller.own, units, smaller.slices, {new: old for old, new in names.items()})
    if compensation is None:
        return UNCHANGED
    layers = {layer: tuple(tensors) for layer, tensors in compensation.layers.items()}
    return changed_tensors(skeleton, layers, compensation.layers.__getitem__, copy.teacher.stored, names)


def _as_loaded(teacher: Teacher, compensation: Compensation) -> dict[int, dict[str, Tensor]]:
    """The new tensors of all layers, in memory, in the precision in which the teacher is loaded."""
    dtype = loaded_dtype(teacher.config, shards=teacher.shards)
    return {
        layer: {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
        for layer, tensors in compensation.layers.items()
    }


def _compensation(teacher: Teacher, plan: PruningPlan, settings: Compensate, *, seed: int) -> Compensation:
    """What makes up for the dropped layers."""
    folder, trusted = teacher.folder, teacher.trust_remote_code
    with calibrating(folder, settings, section=COMPENSATE, seed=seed, trust_remote_code=trusted) as (source, rows):
        return compensate_gaps(source, plan.drop, settings, rows)


def _write_from_memory(
    teacher: Teacher,
    plan: PruningPlan,
    folder: Path,
    *,
    compensated: Mapping[int, Mapping[str, Tensor]],
    runs: bool,
) -> Behaviour | None:
    """Returns what the teacher as planned answers where that is asked for, because it is in memory now."""
    model = teacher.load()
    with doing("prune: writing the student"):
        student = with_layers(model, plan.drop, compensated, share=True)
        _name_closed_gaps(student.config, teacher, plan.gaps)
        student.save_pretrained(folder)
    return _planned_behaviour(model, plan, compensated) if runs else None


def _name_closed_gaps(config: PreTrainedConfig, teacher: Teacher, gaps: Sequence[ClosedGap]) -> None:
    """Let the student's configuration say what its weights make up for, beside what the teacher's do already."""
    uncut = uncut_layers(teacher.config, text_config(teacher.config).num_hidden_layers)
    closed = [asdict(replace(gap, first=uncut[gap.first], last=uncut[gap.last])) for gap in gaps if gap.is_closed]
    if closed:
        setattr(config, CLOSED_GAPS, [*(getattr(config, CLOSED_GAPS, None) or ()), *closed])


def _planned_behaviour(
    model: PreTrainedModel, plan: PruningPlan, new_layers: Mapping[int, Mapping[str, Tensor]]
) -> Behaviour:
    with tensors_in_place(model, new_layers), skipped(model, plan.drop):
        return behaviour(model)
