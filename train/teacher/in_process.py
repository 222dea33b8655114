"""A teacher that vLLM runs in this process.

Never run on a GPU: written from the code of vLLM's main branch of November 2026, and tested with a stand-in of its
interface whose answers are those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

from shoal.errors import UserError
from shoal.inference.vllm import check_vllm, vllm_dtype, vllm_engine, vllm_version
from shoal.models.anatomy import text_config
from shoal.models.load import Checkpoint
from shoal.recipe.distill import Record

from .prompt_scores import Answer
from .server import SPARE_POSITIONS

T = TypeVar("T")
TOKENS_AT_ONCE = 2048
"""Tokens of a forward: logits of all of them exist at one time, which vLLM does not reckon with."""
AT_ONCE = 64
"""Prompts that are handed over together; Python holds all that is told of them."""


class VllmEngine:
    """The teacher in vLLM, loaded when it is first asked.

    Raises:
        UserError: vLLM is not installed, several ranks would each start it, or rows fill all of the model's positions.
    """

    def __init__(self, record: Record, teacher: Checkpoint, *, length: int) -> None:
        self.place = "record.backend: vllm"
        check_vllm("record.backend")
        longest = getattr(text_config(teacher.config), "max_position_embeddings", None)
        if longest is not None and longest < length + SPARE_POSITIONS:
            raise UserError(
                f"{self.place} takes the {longest} positions of {teacher.folder}, and a row of {length} needs "
                f"{length + SPARE_POSITIONS}; lower distill.sequence_length"
            )
        self._teacher, self._top_k, self._length = teacher, record.top_k, length
        self.about: dict[str, Any] = {"engine": "vllm", "version": vllm_version(), "dtype": vllm_dtype(teacher)}

    @cached_property
    def _llm(self) -> Any:
        return vllm_engine(
            self._teacher,
            seed=0,  # nothing of what is drawn is read
            max_logprobs=self._top_k,
            max_model_len=self._length + SPARE_POSITIONS,
            max_num_batched_tokens=TOKENS_AT_ONCE,
            enable_prefix_caching=False,
        )

    def scored(self, prompts: Sequence[list[int]], read: Callable[[list[int], Answer], T]) -> Iterator[T]:
        """As PromptEngine says."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        how = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=self._top_k, detokenize=False)
        for start in range(0, len(prompts), AT_ONCE):
            part = prompts[start : start + AT_ONCE]
            asked = [{"prompt_token_ids": prompt} for prompt in part]
            for prompt, output in zip(part, self._llm.generate(asked, how, use_tqdm=False), strict=True):
                told = [
                    None if of_token is None else {token: entry.logprob for token, entry in of_token.items()}
                    for of_token in output.prompt_logprobs
                ]
                yield read(prompt, told)
