"""Proof that a saved student is the teacher as planned: by running both, or by their files and layers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import CLOSED_GAPS, KEPT_LAYERS, Shard, read_shards
from shoal.models.load import align_weights, load_config, load_model, refuse_broken_weights

from .config_cut import GROUP_RULES, RULES, SPELT_OUT_BY, refuse_wrong_entries
from .cut_model import refuse_changed_layers
from .quantised import without_quantization
from .stored_names import load_without_data

PROOF_TOKENS = 24
"""Length of the random input on which a saved student must equal its teacher as planned."""
PROOF_NEW_TOKENS = 3
ROUNDING = 1e-3
"""By which logits in float32 may differ, relative to their size, that are sums of the same terms in other orders."""
MEMORY_MARGIN = 1.2
"""Memory that a run needs, as a multiple of the weights."""
RUNNABLE = {"F64", "F32", "F16", "BF16"}
"""Number formats that torch calculates in by itself."""

NOT_COMPARED = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "transformers_version"),
    *(CLOSED_GAPS, KEPT_LAYERS),
}
"""Settings that change no number, or that a cut or an edit writes."""


@dataclass(frozen=True)
class Behaviour:
    """Answers of a model to the proof's fixed random input of S tokens, vocabulary V."""

    logits_1SV: Tensor
    text_1S: Tensor
    """Tokens of the input and a few greedy ones, of a saved student written with the KV cache."""


@torch.inference_mode()
def behaviour(model: PreTrainedModel) -> Behaviour:
    """The answers of ``model``; compare them with another's by prove_by_run."""
    align_weights(model)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, text_config(model.config).vocab_size, (1, PROOF_TOKENS), generator=generator)
    input_ids = input_ids.to(model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits
    generate: Any = model.generate
    text = generate(  # with the KV cache its slots show too, which follow the layers' indices
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        use_cache=True,
        max_new_tokens=PROOF_NEW_TOKENS,
    )
    return Behaviour(logits, text)


def prove_by_run(student_folder: Path, expected: Behaviour, *, reference: str, is_rounded: bool = False) -> None:
    """Load the saved student and compare its answers, bit for bit, with ``expected``, those of ``reference``.

    ``reference`` reads like `the teacher with layers [3] skipped`; its model need not be in memory any more. With
    ``is_rounded`` its answers are those of float32, and the student's logits in float32 are compared up to rounding.
    """
    student = load_model(student_folder, dtype="float32" if is_rounded else "stored", attention=None)
    refuse_broken_weights({"the pruned model": student})  # two models that answer NaN alike would pass
    actual = behaviour(student)
    difference, problem = expected.logits_1SV.double() - actual.logits_1SV.double(), ""
    if is_rounded:
        size = float(difference.norm() / expected.logits_1SV.double().norm())
        if not size <= ROUNDING:
            problem = f"the saved student's logits differ from those of {reference} by {size:.3g} of their size"
    elif not torch.equal(expected.logits_1SV, actual.logits_1SV):
        problem = f"the saved student's logits differ from those of {reference} by up to {difference.abs().max():.3g}"
    elif not torch.equal(expected.text_1S, actual.text_1S):
        problem = f"the saved student writes other text with a KV cache than {reference}"
    if problem:
        raise UserError(f"{problem}; shoal cannot cut or narrow the {student.config.model_type} family exactly")


def prove_by_files(student_folder: Path, teacher: PreTrainedModel, keep: Sequence[int]) -> None:
    """Read the saved student's configuration and headers back, build it without weights, and compare it with
    ``teacher`` (which may be on the meta device): every tensor has its place, every layer and setting is what it was.

    Raises:
        UserError: tensors without a place, places without a tensor, a layer or a setting that has changed.
    """
    config, quantisation = without_quantization(load_config(student_folder))
    shapes = {name: tensor.shape for shard in read_shards(student_folder) for name, tensor in shard.tensors.items()}
    student, loading = load_without_data(config, shapes)
    if not quantisation and (wrong := sorted(loading.missing | loading.mismatched)):
        raise UserError(
            f"the saved student has no {wrong[0]} of the right shape ({len(wrong)} such tensors in all); "
            f"shoal cannot cut the {teacher.config.model_type} family exactly"
        )
    refuse_changed_layers(teacher, student, keep)
    refuse_changed_settings(teacher.config, config, keep)


def refuse_changed_settings(teacher: PreTrainedConfig, student: PreTrainedConfig, keep: Sequence[int]) -> None:
    """Compare all that two configurations say: lists with one entry per layer, and all that no cut may change.

    RoPE, scales and kinds of masks that were lost while saving or loading show in no tensor and in few layers.
    """
    refuse_wrong_entries(text_config(teacher), text_config(student), keep)
    old, new = _untouched(teacher), _untouched(student)
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            raise UserError(
                f"config.{field}: is {old.get(field)!r} but would become {new.get(field)!r} in the student; "
                f"shoal cannot cut the {teacher.model_type} family exactly"
            )


def _untouched(config: PreTrainedConfig) -> dict[str, Any]:
    text = text_config(config)
    num_layers = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    may_change = (
        RULES.keys() | SPELT_OUT_BY.keys() | {field for fields in GROUP_RULES for field in fields} | {num_layers}
    )
    outer = config.to_dict() if text is not config else {}
    parts = [name for name in outer if getattr(config, name, None) is text]
    values = {key: value for key, value in outer.items() if key not in parts} | text.to_dict()
    return {key: value for key, value in _compared(values).items() if key not in may_change}


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _compared(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in NOT_COMPARED
    }


def why_not_run(config: PreTrainedConfig, shards: Sequence[Shard]) -> str:
    """Why the model of these files cannot run on this machine; empty where nothing speaks against it."""
    quantisation = without_quantization(config)[1]
    if quantisation and torch.accelerator.is_available():
        return "its quantised weights run only on the accelerator, and this check runs on the CPU"
    for settings in quantisation.values():
        try:
            AutoHfQuantizer.from_config(dict(settings)).validate_environment(device_map=None)
        except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            return f"its quantised weights cannot run here ({str(error).strip().splitlines()[0]})"
    dtypes = {tensor.dtype for shard in shards for tensor in shard.tensors.values()}
    strange = sorted({dtype for dtype in dtypes if dtype.startswith(("F", "BF"))} - RUNNABLE)
    if strange and not quantisation:
        return f"its weights are {strange[0]}, in which torch cannot calculate"
    return ""


def memory_shortage(shards: Sequence[Shard], *, in_float32: bool = False) -> str:
    """Why the model of these files does not fit into memory, as it is stored or in float32; empty where it does."""
    tensors = [tensor for shard in shards for tensor in shard.tensors.values()]
    # transformers turns FP8 into BF16 where there is no hardware for it
    unpacked = sum((tensor.end - tensor.start) * (2 if tensor.dtype.startswith("F8") else 1) for tensor in tensors)
    if in_float32:
        unpacked = sum(4 * math.prod(tensor.shape) for tensor in tensors)
    needed, available = int(MEMORY_MARGIN * unpacked), available_memory()
    if needed <= available:
        return ""
    return f"running the model takes {bytes_text(needed)} of memory, and {bytes_text(available)} are free"
