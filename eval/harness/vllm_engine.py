"""lm-eval's model interface over vLLM, for checkpoints that are finished: tokens, prompts, limits and the reading of
answers are those of engine.py, numbers and texts are vLLM's own.

Never run on a GPU: written from the code of vLLM 0.33.0, and tested with a stand-in of its interface whose answers are
those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig

from shoal.errors import UserError
from shoal.inference.prefix_sharing import Tokens, batches
from shoal.inference.scoring import Score
from shoal.inference.vllm import vllm_dtype, vllm_engine, vllm_version
from shoal.models.load import Checkpoint
from shoal.runtime import free_memory

from .engine import CausalLM
from .item_cache import key_of
from .writing import CHOICE_SETTINGS, GREEDY_SETTINGS, NEUTRAL_SETTINGS, Writing

AT_ONCE = 512
"""Requests that are handed over together: vLLM batches them as its memory allows. A kill costs as many answers."""
SPARE_POSITIONS = 2
"""Positions that are left free of a scored text: its last token is read too, and one more is written."""
POSSIBLE = CHOICE_SETTINGS | {"min_p", "repetition_penalty"}
"""Settings of generation that mean the same to vLLM."""


@dataclass(frozen=True)
class VllmModel:
    """A model that vLLM runs, with what is asked of a model of transformers besides running it."""

    checkpoint: Checkpoint
    engine: Any
    """A vllm.LLM."""
    seed: int
    """Seed of texts that their task wants drawn."""

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the checkpoint."""
        return self.checkpoint.config

    @property
    def device(self) -> torch.device:
        """Where answers arrive."""
        return torch.device("cpu")

    @property
    def version(self) -> str:
        """Version of vLLM."""
        return vllm_version()

    @property
    def dtype(self) -> str:
        """Precision, and what computes in it."""
        return f"{vllm_dtype(self.checkpoint)} by vLLM {self.version}"

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The settings of writing that lie beside the weights, else those of the configuration."""
        if (self.checkpoint.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.checkpoint.folder)
        return GenerationConfig.from_model_config(self.config)


@contextmanager
def vllm_model(checkpoint: Checkpoint, *, seed: int) -> Iterator[VllmModel]:
    """The model of ``checkpoint`` in vLLM until the block ends; then its memory is free."""
    engine = vllm_engine(checkpoint, seed=seed)
    try:
        yield VllmModel(checkpoint, engine, seed)
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        free_memory()


class VllmLM(CausalLM):
    """A running vLLM as lm-eval asks for it."""

    engine = "vllm"

    _model: Any

    @property
    def max_length(self) -> int:
        """Positions that a text and its continuation may take."""
        theirs = int(self._model.engine.llm_engine.model_config.max_model_len)
        return min(super().max_length, theirs - SPARE_POSITIONS)

    def _scored(self, asked: Sequence[tuple[Tokens, Tokens]]) -> Iterator[dict[int, Score]]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        # nothing but a prompt can be scored, and something has to be written
        how = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        for batch in batches(range(len(asked)), AT_ONCE):
            prompts = [{"prompt_token_ids": [*asked[index][0], *asked[index][1]]} for index in batch]
            outputs = self._model.engine.generate(prompts, how, use_tqdm=False)
            yield {
                index: _score(output.prompt_logprobs[len(asked[index][0]) :], asked[index][1])
                for index, output in zip(batch, outputs, strict=True)
            }

    def _written(self, prompts: Sequence[list[int]], how: Writing) -> Iterator[tuple[Sequence[int], list[list[int]]]]:
        for batch in batches(range(len(prompts)), AT_ONCE):
            rows = [prompts[index] for index in batch]
            outputs = self._model.engine.generate(
                [{"prompt_token_ids": row} for row in rows], self._sampling(rows, how.of(batch)), use_tqdm=False
            )
            yield batch, [list(output.outputs[0].token_ids) for output in outputs]

    def _sampling(self, prompts: Sequence[list[int]], how: Writing) -> list[Any]:
        """vLLM's parameters for each of the texts."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        settings = self._settings(how.settings)
        common = {
            "max_tokens": how.max_new_tokens,
            "stop": how.stop,
            # a stop string may hold special tokens, and what it ends is cut as everywhere
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "stop_token_ids": sorted(self._end_ids()),
            **{key: settings[key] for key in ("min_p", "repetition_penalty") if key in settings},
        }
        numbers = range(len(prompts)) if how.draws is None else how.draws.numbers
        if how.draws is not None:
            drawn = {"temperature": how.draws.samples.temperature, "top_p": how.draws.samples.top_p}
        elif settings.get("do_sample"):
            drawn = {key: settings[key] for key in ("temperature", "top_p", "top_k") if settings.get(key) is not None}
        else:
            return [SamplingParams(temperature=0.0, **common) for _ in prompts]
        seed = self._model.seed if how.draws is None else how.draws.seed
        seeds = [[seed, number, int(key_of(list(row)), 16)] for row, number in zip(prompts, numbers, strict=True)]
        return [
            SamplingParams(seed=int(np.random.default_rng(own).integers(2**31)), **drawn, **common) for own in seeds
        ]

    def _settings(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What the task wants over what the model's generation configuration says.

        Raises:
            UserError: something that vLLM does otherwise or not at all.
        """
        own = self._model.generation_config.to_diff_dict()
        kept = {key: value for key, value in own.items() if key not in NEUTRAL_SETTINGS}
        if wanted.get("do_sample"):
            kept |= {key: own[key] for key in GREEDY_SETTINGS & own.keys()}
        settings = kept | wanted
        for key, value in settings.items():
            if key not in POSSIBLE or (key == "num_beams" and value != 1):
                raise UserError(
                    f"eval.backend: vllm does not write with {key}: {value!r}, which a task or the model's "
                    "generation_config.json asks for; leave the task out, or use backend: transformers"
                )
        return settings


def _score(entries: Sequence[Any], continuation: Sequence[int]) -> Score:
    """Log-probability of the tokens in nats, and whether each is the likeliest; ``entries`` hold of every position its
    own token and the likeliest one."""
    own = [entry[token].logprob for entry, token in zip(entries, continuation, strict=True)]
    best = [max(candidate.logprob for candidate in entry.values()) for entry in entries]
    return float(sum(own)), all(value >= other for value, other in zip(own, best, strict=True))
