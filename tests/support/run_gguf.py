"""Run a GGUF file with llama.cpp itself, in a process of its own: a failed assertion there ends the process.

As a script it reads a JSON request from stdin and answers with JSON on the last line of stdout.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 272


def llama_cpp_greedy(path: Path, prompt: list[int], num_tokens: int) -> tuple[list[int], Tensor]:
    """Greedy token ids after ``prompt`` and the log-probabilities [num_tokens, V] they were chosen from."""
    request = {"path": str(path), "prompt": prompt, "num_tokens": num_tokens, "num_probs": VOCAB_SIZE}
    done = subprocess.run([sys.executable, __file__], input=json.dumps(request), capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "ASSERT" in line or "rror" in line]
    assert done.returncode == 0, said
    answer = json.loads(done.stdout.splitlines()[-1])
    logprobs_NV = torch.full((num_tokens, VOCAB_SIZE), float("nan"))
    for row, entry in zip(logprobs_NV, answer, strict=True):
        for candidate in entry["top_logprobs"]:
            row[candidate["id"]] = candidate["logprob"]
    return [entry["id"] for entry in answer], logprobs_NV


def save_tokenizer(folder: Path) -> None:
    """A SentencePiece tokenizer, which the converter accepts without knowing it, unlike one of the GPT-2 kind.

    Every id is a text of its own: llama.cpp joins ids that are only parts of a character into one answer.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    model: Any = proto.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for index in range(len(model.pieces), VOCAB_SIZE):
        model.pieces.add(piece=f"t{index}", score=-float(index), type=1)
    model.trainer_spec.model_type = 2
    model.trainer_spec.vocab_size = VOCAB_SIZE
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def _answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    answer = xllamacpp.Server(params).handle_completions(
        {
            "prompt": request["prompt"],
            "n_predict": request["num_tokens"],
            "temperature": 0,
            "top_k": 1,
            "n_probs": request["num_probs"],
            "cache_prompt": False,
            "ignore_eos": True,
        }
    )
    content = answer if isinstance(answer, dict) else json.loads(answer)
    return content["choices"][0]["logprobs"]["content"]


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
