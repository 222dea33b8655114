"""A module with the part of vLLM's interface that shoal uses (vLLM 0.33.0), whose answers are those of transformers."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class SamplingParams:
    """Fields, names and defaults as in vllm/sampling_params.py."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    max_tokens: int = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    spaces_between_special_tokens: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int


class LLM:
    """vllm.LLM; ``made`` holds all of them."""

    made: ClassVar[list[LLM]] = []
    asked: ClassVar[list[tuple[list[int], SamplingParams]]] = []

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        seed: int = 0,
        max_logprobs: int = 20,
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        **_: Any,
    ) -> None:
        assert dtype in ("float32", "bfloat16", "float16"), "auto would make float16 of float32"
        assert not any(other.is_open for other in LLM.made), "the memory of the one before is not free yet"
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.dtype: torch.dtype = self._model.dtype
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._end: Any = self._model.generation_config.eos_token_id
        self.is_open, self._max_logprobs = True, max_logprobs
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=max_model_len or self._model.config.max_position_embeddings),
            engine_core=SimpleNamespace(shutdown=self._shutdown),
        )
        LLM.made.append(self)

    def _shutdown(self) -> None:
        self.is_open = False

    def generate(self, prompts: Sequence[Any], sampling_params: Any, *, use_tqdm: bool = True, **_: Any) -> list[Any]:
        assert self.is_open
        every = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        pairs = zip(prompts, every, strict=True)
        return [self._answer(list(prompt["prompt_token_ids"]), params) for prompt, params in pairs]

    @torch.no_grad()
    def _answer(self, prompt: list[int], params: SamplingParams) -> Any:
        if len(prompt) >= self.llm_engine.model_config.max_model_len:
            raise ValueError("the prompt leaves no room for an output token")
        LLM.asked.append((prompt, params))
        logits_SV = self._model(torch.tensor([prompt])).logits[0].float()
        found = None
        if params.prompt_logprobs is not None:
            assert params.prompt_logprobs <= self._max_logprobs
            pairs = zip(logits_SV.log_softmax(-1), prompt[1:], strict=False)
            found = [None, *(_entry(row, token, params.prompt_logprobs) for row, token in pairs)]
        written = self._text(prompt, logits_SV[-1], params)
        text = self._tokenizer.decode(written, skip_special_tokens=True)
        return SimpleNamespace(prompt_logprobs=found, outputs=[SimpleNamespace(token_ids=written, text=text)])

    def _text(self, prompt: list[int], logits_V: torch.Tensor, params: SamplingParams) -> list[int]:
        written: list[int] = []
        generator = torch.Generator().manual_seed(params.seed or 0)
        while True:
            seen = torch.tensor([*prompt, *written]).unique()
            score = logits_V[seen]
            logits_V[seen] = torch.where(
                score > 0, score / params.repetition_penalty, score * params.repetition_penalty
            )
            token = int(logits_V.argmax())
            if params.temperature > 0:
                token = int(torch.multinomial((logits_V / params.temperature).softmax(-1), 1, generator=generator))
            written.append(token)
            text = self._tokenizer.decode(written, skip_special_tokens=params.skip_special_tokens)
            ends = token == self._end or token in params.stop_token_ids
            if ends or any(stop in text for stop in params.stop) or len(written) >= params.max_tokens:
                return written
            logits_V = self._model(torch.tensor([[*prompt, *written]])).logits[0, -1].float()


def _entry(log_probs_V: torch.Tensor, token: int, count: int) -> dict[int, Logprob]:
    """The likeliest tokens and the one that stands there, as vLLM reports a position of the prompt."""
    best = log_probs_V.topk(count).indices.tolist()
    ranks = {own: 1 + int((log_probs_V > log_probs_V[own]).sum()) for own in (*best, token)}
    return {own: Logprob(float(log_probs_V[own]), rank) for own, rank in ranks.items()}


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """`import vllm` gives this module until the test ends."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    vars(module).update(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=dict)
    monkeypatch.setitem(sys.modules, "vllm", module)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.0" if name == "vllm" else real(name))
    parts: dict[str, dict[str, Any]] = {
        "lora": {},
        "lora.request": {"LoRARequest": object},
        "renderers": {},
        "renderers.hf": {"resolve_chat_template": lambda **_: None},
        "tokenizers": {"get_tokenizer": lambda name, **_: AutoTokenizer.from_pretrained(name)},
    }
    for name, holds in parts.items():
        part = ModuleType(f"vllm.{name}")
        vars(part).update(holds)
        monkeypatch.setitem(sys.modules, f"vllm.{name}", part)
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "asked", [])
    return LLM
