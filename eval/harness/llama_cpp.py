"""A GGUF file as lm-eval asks for it: llama.cpp runs it, with the requests and tokens that transformers gets.

Tokens come from the tokenizer beside the file, so that both engines are asked the same. What llama.cpp answers
differs by its kernels and by its half-precision cache of keys and values; scores name it, and are paired with none of
another engine. S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from shoal.errors import UserError
from shoal.inference.drawing import likeliest
from shoal.inference.prefix_sharing import Tokens
from shoal.inference.scoring import Score
from shoal.machine import num_cores

from .engine import CausalLM
from .writing import Writing

PACKAGE = "llama-cpp-python"
ALL_LAYERS = -1
"""Layers on the accelerator, where the binding was built for one."""


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, with what is asked of a model of transformers besides running it."""

    file: Path
    config: PreTrainedConfig
    """Configuration of the checkpoint that the file was made of."""

    @property
    def device(self) -> torch.device:
        """Where logits arrive."""
        return torch.device("cpu")

    @property
    def dtype(self) -> str:
        """What computes, in place of a precision."""
        return f"GGUF by {PACKAGE} {version(PACKAGE)}"

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The settings of writing that lie beside the file, else those of the configuration."""
        if (self.file.parent / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.file.parent)
        return GenerationConfig.from_model_config(self.config)


class LlamaCppLM(CausalLM):
    """A GGUF file through llama.cpp's Python binding, one request after another; what two begin with is read once."""

    engine = "llama.cpp"

    _model: Any
    _llama: Any = None
    _room: int = 0
    """Positions of its context."""
    _goes_back: bool = True
    """Whether the end of what was read can be taken back; a recurrent state only can be emptied."""
    _read: Tokens = ()
    """Tokens whose keys, values and logits are held."""

    def _scored(self, asked: Sequence[tuple[Tokens, Tokens]]) -> Iterator[dict[int, Score]]:
        self._make_room(max(len(context) + len(continuation) for context, continuation in asked))
        for index in sorted(range(len(asked)), key=lambda index: asked[index]):
            context, continuation = asked[index]
            self._go_to((*context, *continuation[:-1]))
            log_probs_SV = self._logits(len(context) - 1, len(continuation)).log_softmax(dim=-1)
            tokens = torch.tensor(continuation)
            chosen = log_probs_SV.gather(1, tokens[:, None])
            yield {index: (float(chosen.sum()), bool((log_probs_SV.argmax(dim=-1) == tokens).all()))}

    def _written(self, prompts: Sequence[list[int]], how: Writing) -> Iterator[tuple[Sequence[int], list[list[int]]]]:
        if not self._is_plain(how.settings):
            raise UserError(
                "a task asks for sampling or penalties of its own, or the model's generation_config.json does, which "
                "shoal has transformers do; leave the task out of eval.tasks, or quantise to another format than GGUF"
            )
        self._make_room(max(map(len, prompts)) + how.max_new_tokens)
        finish = self._finish(how)
        for index in sorted(range(len(prompts)), key=lambda index: prompts[index]):
            draws = how.of([index]).draws
            choose = likeliest if draws is None else draws.choice([prompts[index]], how.max_new_tokens, self.device)
            written: list[int] = []
            while len(written) < how.max_new_tokens and not (written and finish(written)):
                self._go_to((*prompts[index], *written))
                logits_1V = self._logits(len(self._read) - 1, 1)
                written.append(int(choose(logits_1V, [0], len(written))[0]))
            yield [index], [written]

    def _make_room(self, num_tokens: int) -> None:
        """A context of ``num_tokens``; memory for logits and cache grows with it, so it is no longer than asked."""
        if num_tokens <= self._room:
            return
        import llama_cpp

        binding: Any = llama_cpp
        self._read, self._room = (), num_tokens
        try:
            self._llama = binding.Llama(
                str(self._model.file),
                n_ctx=num_tokens,
                logits_all=True,
                n_threads=num_cores(),
                n_threads_batch=num_cores(),
                n_gpu_layers=ALL_LAYERS,
                verbose=False,
            )
        except ValueError as error:
            raise UserError(
                f"{self._model.file}: llama.cpp cannot load it ({error}); make it again with `shoal quantize`"
            ) from error
        kinds = (binding.llama_model_is_recurrent, binding.llama_model_is_hybrid)
        self._goes_back = not any(is_kind(self._llama.model) for is_kind in kinds)

    def _go_to(self, tokens: Tokens) -> None:
        """Read ``tokens``, from where they stop being those that were read before."""
        shared = 0
        for before, now in zip(self._read, tokens, strict=False):
            if before != now:
                break
            shared += 1
        if shared < len(tokens):
            if shared < self._llama.n_tokens and not self._goes_back:
                self._llama.reset()
                shared = 0
            self._llama.n_tokens = shared
            self._llama.eval(list(tokens[shared:]))
            self._read = tokens
        elif shared < len(self._read):
            self._read = tokens

    def _logits(self, start: int, count: int) -> Tensor:
        """fp32 logits (count, V) at the positions from ``start`` on."""
        return torch.from_numpy(self._llama.scores[start : start + count])
