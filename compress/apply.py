"""Write the student of a plan to a folder that appears only when it is complete and proven."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifact import PruningPlan, written_folder
from shoal.errors import UserError
from shoal.models import decoder_layers, load_model, load_tokenizer, text_config

from .surgery import cut_model, skipped

log = logging.getLogger(__name__)

COPIED_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What goes from the teacher's folder to the student's byte for byte: a cut changes no token and no licence."""
PROOF_TOKENS = 24
"""Length of the random input on which a saved student must equal its teacher with layers skipped."""


def apply_plan(teacher_folder: Path, plan: PruningPlan, out: Path, *, trust_remote_code: bool = False) -> None:
    """Write the student of ``plan`` to the folder ``out``, which appears only when it is complete and proven.

    Proven: the saved folder is loaded again and gives, bit for bit, the logits of the teacher with the layers skipped.

    Raises:
        UserError: a plan for another model, ``out`` being the teacher's folder, an architecture that cannot be cut, a
            full disk.
    """
    if out.resolve() == teacher_folder.resolve():
        raise UserError(f"{out}: is the teacher's own folder; choose another one for the student")
    load_tokenizer(teacher_folder, trust_remote_code=trust_remote_code)
    teacher = load_model(teacher_folder, trust_remote_code=trust_remote_code)
    if not type(teacher).__module__.startswith("transformers."):
        raise UserError(
            f"{teacher_folder}: is built by code that came with it ({type(teacher).__module__}); "
            "the cut could not be loaded without that code, so shoal cuts only architectures that transformers has"
        )
    num_layers = len(decoder_layers(teacher))
    if plan.num_layers != num_layers:
        raise UserError(
            f"plan: is for a model of {plan.num_layers} layers, but {teacher_folder} has {num_layers}; "
            "make the plan for this model"
        )
    with written_folder(out) as folder:
        student = cut_model(teacher, plan.drop, share=True)
        student.save_pretrained(folder)
        del student
        for pattern in COPIED_FILES:
            for file in sorted(teacher_folder.glob(pattern)):
                copier = shutil.copytree if file.is_dir() else shutil.copyfile
                copier(file, folder / file.name)
        _prove(load_model(folder), teacher, plan.drop)


@torch.inference_mode()
def _prove(student: PreTrainedModel, teacher: PreTrainedModel, drop: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = text_config(teacher.config).vocab_size
    input_ids = torch.randint(0, vocabulary, (1, PROOF_TOKENS), generator=generator)
    with skipped(teacher, drop):
        expected = teacher(input_ids=input_ids, use_cache=False).logits
        expected_text = _greedy(teacher, input_ids)
    found = student(input_ids=input_ids, use_cache=False).logits
    if not torch.equal(expected, found):
        difference = (expected.double() - found.double()).abs().max().item()
        raise UserError(
            f"the saved student's logits differ from the teacher's with layers {list(drop)} skipped by up to "
            f"{difference:.3g}; shoal cannot cut the {teacher.config.model_type} family exactly"
        )
    if not torch.equal(expected_text, _greedy(student, input_ids)):
        raise UserError(
            f"the saved student writes other text with a KV cache than the teacher with layers {list(drop)} skipped; "
            f"shoal cannot cut the {teacher.config.model_type} family exactly"
        )


def _greedy(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """A few greedy tokens with the KV cache, whose slots follow the layers' indices."""
    return model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        use_cache=True,
        max_new_tokens=3,
    )
