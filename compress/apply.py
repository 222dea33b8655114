"""Write the student of a plan to a folder that appears only when it is complete and proven.

Two routes lead there. Where the stored tensors can be told apart by layers they are copied file by file under their new
names, new ones written over them, and no model is built: any size, any dtype, any quantisation. Else the student is
made in memory. Both are proven in the same ways.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.plan import Plan
from shoal.atomic_files import fingerprint, written_folder
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import OWN_FOLDER, copy_beside, has_tokenizer, refuse_incomplete
from shoal.models.load import load_tokenizer
from shoal.progress import doing
from shoal.recipe.measure import Measure
from shoal.recipe.prune import Compensate, Prune, Width

from .changes.change import Change, NewTensors, Tensors
from .changes.compensation import Compensation, as_stored
from .changes.width import Narrowing
from .edits.tensors import tensors_in_place
from .metrics.metric import Calibration
from .surgery.copying import ChangedTensors, Copy, changed_tensors, planned_copy, write_copy
from .surgery.cut_model import cut_model, kept_layers, skipped
from .surgery.narrow_config import NARROW
from .surgery.proof import Behaviour, behaviour, memory_shortage, prove_by_files, prove_by_run, why_not_run
from .surgery.quantised import without_quantization
from .surgery.shards import shards_fingerprint
from .surgery.stored_names import NotByCopy, load_without_data
from .surgery.teacher import Teacher, read_teacher

log = logging.getLogger(__name__)

KINDS: dict[type, Callable[[Any], Change]] = {Width: Narrowing, Compensate: Compensation}
"""Settings of a change -> the change."""


def changes_of(prune: Prune) -> tuple[Change, ...]:
    """The changes besides dropping layers that the recipe's section ``prune`` asks for, in the order in which they
    act."""
    return tuple(KINDS[type(settings)](settings) for settings in prune.changes)


def num_tokens_of(changes: Sequence[Change], teacher: PreTrainedModel, plan: Plan, settings: Measure) -> int:
    """Tokens of the text of ``settings`` that all of ``changes`` are decided on; ``teacher`` is without weights."""
    return max((change.num_tokens(teacher, plan, settings) for change in changes), default=0)


def apply_plan(
    teacher_folder: Path,
    plan: Plan,
    out: Path,
    *,
    changes: Sequence[Change] = (),
    text: Calibration | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Write the student of ``plan``, with ``changes``, to the folder ``out``, which appears only when it is complete
    and proven. Returns ``plan`` with what the changes found.

    A copy takes a few megabytes of memory and, interrupted, goes on where it stopped. ``text`` is what changes are
    decided on, num_tokens_of tokens. It is proven by headers, samples of every tensor's bytes, and every layer's kind
    and settings. Where the model can run here the saved folder is loaded, too, and gives, bit for bit, the logits and
    greedy text of the teacher with the layers skipped and the changes in force; after changes that are rounded the same
    up to rounding in float32. One of the two is in memory at a time.

    Raises:
        UserError: a plan for another model, ``out`` being the teacher's folder or being written by another process, an
            architecture or a quantisation that cannot be cut, a damaged checkpoint, a full disk.
    """
    teacher = _teacher(teacher_folder, out, plan, trust_remote_code=trust_remote_code)
    is_rounded = any(change.IS_ROUNDED for change in changes)
    runs, sized = _shall_run(teacher, in_float32=is_rounded), teacher
    for change in changes:
        sized = change.sizes(sized, plan)
    skeleton, copy = _route(sized, plan)
    new: list[NewTensors] = []
    for change in changes:
        assert text is not None
        new.append(change.tensors(teacher, plan, text, partial(_in_force, tuple(new)) if new else None))
        plan = new[-1].plan
    copy, changed = _with_tensors(sized, skeleton, copy, new)
    if copy is None and sized is not teacher:
        raise UserError(f"{teacher_folder}: cannot be narrowed file by file; leave {NARROW} out")
    source = shards_fingerprint(copy.shards) if copy else str(teacher_folder.resolve())
    with written_folder(out, key=fingerprint([source, plan.sealed("")])) as folder:
        if copy:
            for own in new:
                copy.config.update(dict(own.settings))
            write_copy(copy, folder, changed)
        else:
            _write_from_memory(teacher, plan, folder, new)
        copy_beside(teacher_folder, folder)  # a cut changes no token and no licence
        with doing("prune: checking the student's files"):
            prove_by_files(folder, skeleton, plan.keep)
        if runs:
            log.info("prune: running the teacher after %s, then the student", plan.in_words())
            with doing("prune: running the teacher as planned"):
                expected = _planned_behaviour(teacher, plan, new, in_float32=is_rounded)
            with doing("prune: checking the student by running it"):
                reference = f"the teacher after {plan.in_words()}"
                prove_by_run(folder, expected, reference=reference, is_rounded=is_rounded)
    return plan


def _teacher(folder: Path, out: Path, plan: Plan, *, trust_remote_code: bool) -> Teacher:
    if folder.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: {OWN_FOLDER}")
    if has_tokenizer(folder):  # a damaged one is refused
        load_tokenizer(folder, trust_remote_code=trust_remote_code)
    else:
        log.info("prune: %s holds no tokenizer, so there is none to copy", folder)
    teacher = read_teacher(folder, trust_remote_code=trust_remote_code)
    num_layers = text_config(teacher.config).num_hidden_layers
    if plan.num_layers != num_layers:
        raise UserError(
            f"plan: is for a model of {plan.num_layers} layers, but {folder} has {num_layers}; make another plan"
        )
    kept_layers(num_layers, plan.drop)  # refuses what is no layer, and all of them
    if inside := [shard.file for shard in teacher.shards if shard.file.resolve().is_relative_to(out.resolve())]:
        raise UserError(f"{out}: holds the teacher's file {inside[0].name}; choose another folder for the student")
    return teacher


def _shall_run(teacher: Teacher, *, in_float32: bool) -> bool:
    reason = why_not_run(teacher.config, teacher.shards) or memory_shortage(teacher.shards, in_float32=in_float32)
    if reason:
        log.warning(
            "prune: %s; so the student was checked by its files and layers, not by running it. Run it on a machine "
            "that can before you rely on it",
            reason,
        )
    return not reason


def _route(teacher: Teacher, plan: Plan) -> tuple[PreTrainedModel, Copy | None]:
    """The teacher without its weights, and what there is to copy; None where the student must be made in memory."""
    plain, quantisation = without_quantization(teacher.config)
    skeleton, loading = load_without_data(plain, teacher.shapes)
    if not quantisation:
        refuse_incomplete(teacher.folder, plain.model_type, loading.missing, loading.mismatched)
    try:
        return skeleton, planned_copy(teacher, plain, skeleton, loading, plan.keep)
    except NotByCopy as reason:
        if quantisation:
            raise UserError(
                f"{teacher.folder}: is quantised and cannot be copied: {reason}; give the full-precision model"
            ) from reason
        log.info("prune: building the student in memory: %s", reason)
        return skeleton, None


def _with_tensors(
    teacher: Teacher, skeleton: PreTrainedModel, copy: Copy | None, new: Sequence[NewTensors]
) -> tuple[Copy | None, ChangedTensors]:
    """What there is to copy, and what stands in the places of copied tensors; None where these have no place."""
    names = dict[int, tuple[str, ...]]()
    for own in new:
        names |= {layer: tuple(dict.fromkeys((*names.get(layer, ()), *found))) for layer, found in own.names.items()}

    def load(layer: int) -> Tensors:
        tensors = dict[str, Tensor]()
        for index, own in enumerate(new):
            found = own.load(layer) if layer in own.names else {}
            for earlier in reversed(new[:index]):
                found = earlier.of_later(layer, found)
            tensors |= found
        return tensors

    try:
        stored_names = copy.names if copy else {}
        return copy, changed_tensors(skeleton, names if copy else {}, load, teacher.stored, stored_names)
    except NotByCopy as reason:
        log.info("prune: building the student in memory: %s", reason)
        return None, changed_tensors(skeleton, {}, load, teacher.stored, {})


def _write_from_memory(teacher: Teacher, plan: Plan, folder: Path, new: Sequence[NewTensors]) -> None:
    model = teacher.load()
    with doing("prune: writing the student"):
        layers = {layer: as_stored(model, layer, own.load(layer)) for own in new for layer in own.names}
        with tensors_in_place(model, layers):
            student = cut_model(model, plan.drop, share=True)
        for own in new:
            student.config.update(dict(own.settings))
        student.save_pretrained(folder)


def _planned_behaviour(teacher: Teacher, plan: Plan, new: Sequence[NewTensors], *, in_float32: bool) -> Behaviour:
    model = teacher.load(dtype="float32" if in_float32 else "stored")
    with _in_force(new, model), skipped(model, plan.drop):
        return behaviour(model)


@contextmanager
def _in_force(new: Sequence[NewTensors], model: PreTrainedModel) -> Iterator[None]:
    """A block in which the teacher ``model`` answers as it will with all of ``new``."""
    with ExitStack() as stack:
        for own in new:
            stack.enter_context(own.in_force(model))
        yield
