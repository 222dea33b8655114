"""Where a student will load, and load right, told from its configuration before it is written.

Edits of single layers change no verdict. An attention, MLP or head that an edit silences is an ordinary part with zeros
in its output projection: every runtime loads it and spends on it what it spent before. None needs the zeros gone: vLLM
multiplies by them, and llama.cpp's quantised formats hold a block of zeros exactly, with scale 0 (ggml-quants.c).
Layers that merges and replacements take in are gone like dropped ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedConfig

from shoal.artifacts.width import KeptWidth
from shoal.errors import UserError
from shoal.models.load import has_no_text_model
from shoal.recipe.prune import Target

from ..surgery.config_cut import cut_config
from ..surgery.narrow_config import has_strange_heads, narrowed_config
from ..surgery.quantised import without_quantization
from . import llama_cpp, vllm

log = logging.getLogger(__name__)

TARGETS: tuple[Target, ...] = get_args(Target)
TITLES: dict[Target, str] = {
    "transformers": "transformers",
    "vllm": f"vLLM {vllm.VERSION} (its source was read, not run)",
    "llama_cpp": f"llama.cpp {llama_cpp.VERSION}",
}


@dataclass(frozen=True)
class Verdict:
    """Whether one runtime loads a student and runs it as transformers does."""

    target: Target
    loads: Literal["yes", "no", "unknown"]
    """`no` too where it would load and be another model."""
    reason: str
    remedy: str = ""
    """Advice where it does not load."""

    def in_words(self) -> str:
        """One line for a reader."""
        return f"{TITLES[self.target]}: {self.loads}, {self.reason}"


def check_targets(student: PreTrainedConfig, *, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Verdicts of each of ``targets`` on a student with this configuration.

    transformers is right by construction, and `shoal prune` proves it on the files. The others are judged by what their
    sources do with the configuration, as read at one release; whether a kernel for some hardware exists is not asked.
    llama.cpp's rules are compared with its sources where they are installed, vLLM's with nothing.
    """
    return [_verdict(target, student) for target in targets]


def student_config(teacher: PreTrainedConfig, keep: Sequence[int], width: KeptWidth | None = None) -> PreTrainedConfig:
    """The configuration of the student that keeps the layers ``keep``, as wide as ``width`` says, without settings of a
    quantisation.

    Raises:
        UserError: as cut_config.
    """
    return cut_config(narrowed_config(without_quantization(teacher)[0], width), keep)


def refuse_for_targets(student: PreTrainedConfig, targets: Sequence[Target]) -> None:
    """Refuse a student that one of ``targets`` would not load or would take for another model; log what all of them do.

    Raises:
        UserError: as refuse does.
    """
    verdicts = check_targets(student, targets=targets)
    refuse(verdicts)
    log_verdicts(verdicts)


def refuse(verdicts: Sequence[Verdict]) -> None:
    """Nothing, unless one says no.

    Raises:
        UserError: naming every target that does, why, and what to do.
    """
    refused = [verdict for verdict in verdicts if verdict.loads == "no"]
    if refused:
        lines = (f"prune.targets: {TITLES[verdict.target]}: {verdict.reason}; {verdict.remedy}" for verdict in refused)
        raise UserError("\n".join(lines))


def log_verdicts(verdicts: Sequence[Verdict]) -> None:
    """One line each; a warning where it is not a plain yes."""
    for verdict in verdicts:
        log.log(logging.INFO if verdict.loads == "yes" else logging.WARNING, "prune: %s", verdict.in_words())


def _verdict(target: Target, student: PreTrainedConfig) -> Verdict:
    loads, reason = "yes", "these are its own layers; shoal proves it on the written files"
    if target != "transformers" and has_no_text_model(student):
        loads, reason = "unknown", f"shoal has not compared how it reads {student.model_type}, which takes images"
    elif target != "transformers" and has_strange_heads(student):
        loads, reason = "unknown", "its heads side by side are narrower than its states, as in no model of this family"
    elif target == "vllm":
        loads, reason = vllm.vllm_loads(student)
    elif target == "llama_cpp":
        refusal, caveat = llama_cpp.llama_cpp_refusal(student), llama_cpp.llama_cpp_caveat(student)
        loads = "no" if refusal else "yes"
        reason = refusal or caveat or "it has a converter that takes every layer for what it is"
    remedy = f"drop other layers, or take {target} out of prune.targets" if loads == "no" else ""
    return Verdict(target, loads, reason, remedy)
