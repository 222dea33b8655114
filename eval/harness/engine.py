"""lm-eval's model interface over a transformers model in memory.

Requests are tokenised exactly as lm-eval's own transformers class (HFLM) does it and get the same values; what differs
is the work behind them: see scoring.py and generation.py.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.data.chat import template_of_one_day
from shoal.errors import UserError
from shoal.inference.decoder import Decoder, answers_at
from shoal.inference.generation import Finish, end_tokens, write_after
from shoal.inference.prefix_sharing import Reader, Tokens, batches, batches_by_beginning, common_beginnings
from shoal.inference.scoring import Score, scored
from shoal.models.load import not_finite_in
from shoal.progress import Work, progress
from shoal.ranks import world_size
from shoal.runtime import barrier

from .item_cache import ItemCache, key_of

log = logging.getLogger(__name__)

GREEDY_SETTINGS = {"do_sample", "temperature", "top_p", "top_k"}
"""Settings of a generation configuration that change nothing about greedy text."""
NEW_TOKENS = 256
"""How many a task gets that does not say how many it wants, as in lm-eval."""
NEUTRAL_SETTINGS = {
    *(*GREEDY_SETTINGS, "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("transformers_version", "output_attentions", "output_hidden_states", "return_dict_in_generate"),
    "_from_model_config",
}


@dataclass(frozen=True)
class Writing:
    """How texts are written."""

    max_new_tokens: int
    stop: list[str]
    settings: dict[str, Any]
    """All else that the task asks for: sampling, penalties, ..."""


@dataclass(frozen=True)
class Ending:
    """How a text ended."""

    num_tokens: int
    """New tokens, the one that ended it included."""
    finished: bool
    """False = the limit of new tokens ended it."""


def prompt_room(settings: dict[str, Any], max_length: int) -> tuple[int, dict[str, Any]]:
    """How many tokens of a prompt ``max_length`` positions leave room for, and a task's settings in lm-eval's names."""
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, NEW_TOKENS))
    if wanted["max_gen_toks"] >= max_length:
        raise UserError(
            f"a task asks for {wanted['max_gen_toks']} new tokens (max_gen_toks), but the model has {max_length} "
            "positions; remove this task from eval.tasks"
        )
    return max_length - wanted["max_gen_toks"], wanted


class CausalLM(TemplateLM):
    """A transformers model as lm-eval asks for it; lm-eval deals its documents out by `rank` and `world_size`."""

    engine = "transformers"
    """What runs the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 16,
        *,
        items: ItemCache | None = None,
        called: str = "eval",
    ) -> None:
        """``called`` is what is being done, for the log."""
        super().__init__()
        self.items = ItemCache() if items is None else items
        """Answers so far; who hands them in has them kept on disk."""
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.endings: dict[tuple[str, str], Ending] = {}
        """By prompt and settings (as JSON) of every text that was written."""
        self._model = model
        self._called = called
        self._device: torch.device = model.device  # pyright: ignore[reportIncompatibleVariableOverride]
        together = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank() if together else 0
        self._world_size = dist.get_world_size() if together else 1

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Where the model computes."""
        return self._device

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self._model)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.tokenizer)

    @property
    def max_length(self) -> int:
        """Positions the model has."""
        return resolve_max_length(self._model.config, self.tokenizer)

    @property
    def max_gen_toks(self) -> int:
        return NEW_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; no second start token where the text has one already."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **chosen)

    @property
    def tokenizer_name(self) -> str:
        """lm-eval names caches of rendered requests by it, of which none is kept here."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as the tokenizer's template renders them; without what the system says where it refuses that, as
        HFLM does it."""
        render: Any = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            chat_template=template_of_one_day(self.tokenizer),
        )
        try:
            return render(chat_history)
        except TemplateError:
            return render([turn for turn in chat_history if turn["role"] != "system"])

    def count_tokens(self, context: str, continuation: str) -> int:
        """How many tokens of (context, continuation) are scored."""
        if context == "":
            return len(self.tok_encode(continuation, add_special_tokens=False))
        return len(self._encode_pair(context, continuation)[1])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def log_likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        """Scores of (context, continuation) that are tokens already."""
        return self._loglikelihood_tokens([(None, context, continuation) for context, continuation in pairs])

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        fitted = [self._fit(context, continuation) for _, context, continuation in requests]
        self._report_truncation(sum(cut for _, _, cut in fitted), len(fitted), "context")
        with progress(f"{self._called}: likelihoods", total=len(requests), unit="requests") as step:
            return self._score([(context, continuation) for context, continuation, _ in fitted], step)

    def _score(self, pairs: list[tuple[Tokens, Tokens]], step: Work) -> list[Score]:
        """Scores of (context, continuation) that fit the model."""
        keys = self._score_keys(pairs)
        missing = self.items.missing(keys)
        step.known(len(pairs) - len(missing))
        if missing:
            asked = [pairs[index] for index in missing]
            for scores in scored(self._decoder, asked, batch_size=self.batch_size):
                # among options that are all NaN lm-eval would choose the first and go on
                if any(math.isnan(log_prob) for log_prob, _ in scores.values()):
                    raise UserError(f"the model's likelihoods are NaN {not_finite_in(self._model.dtype)}")
                self.items.add([keys[missing[index]] for index in scores], list(scores.values()))
                step(len(scores))
        return [(log_prob, is_greedy) for log_prob, is_greedy in map(self.items.__getitem__, keys)]

    def _score_keys(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[str]:
        return [key_of("score", *pair) for pair in pairs]

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """Both as the model can take them, and whether the context had to lose its beginning.

        A context of white space alone goes to the continuation; what is left is asked as lm-eval asks it after an empty
        one: behind the prefix token, unless that is what the continuation begins with.
        """
        if not context and continuation:
            begins = continuation[0] == self.prefix_token_id
            context, continuation = (
                (continuation[:1], continuation[1:]) if begins else ([self.prefix_token_id], continuation)
            )
        if not continuation:
            raise UserError("a task asks for the likelihood of an empty continuation; check its doc_to_choice")
        if len(continuation) > self.max_length:
            raise UserError(
                f"an answer option has {len(continuation)} tokens, but the model has {self.max_length} positions; "
                "remove this task from eval.tasks"
            )
        whole = (*context, *continuation)[-(self.max_length + 1) :]
        kept = whole[: len(whole) - len(continuation)]
        return kept, tuple(continuation), len(kept) < len(context)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text in nats, in windows as long as the model allows, every token once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(ending_key("", request.args[1])[1], []).append(index)
        texts = [""] * len(requests)
        with progress(f"{self._called}: writing", total=len(requests), unit="texts") as step:
            for indices in by_settings.values():
                prompts = [requests[index].args[0] for index in indices]
                written = self._texts(prompts, copy.deepcopy(requests[indices[0]].args[1]), step)
                for index, text in zip(indices, written, strict=True):
                    texts[index] = text
        return texts

    def _texts(self, prompts: list[str], settings: dict[str, Any], step: Work) -> list[str]:
        """The texts after ``prompts``, which share their generation settings."""
        room, wanted = prompt_room(settings, self.max_length)
        stop = handle_stop_sequences(wanted.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id]))
        how = Writing(wanted.pop("max_gen_toks"), stop, wanted)
        encoded = [self._encode_prompt(prompt) for prompt in prompts]
        self._report_truncation(sum(len(ids) > room for ids in encoded), len(encoded), "prompt")
        encoded = [ids[-room:] for ids in encoded]
        written = self._write(encoded, how, step)
        for prompt, tokens in zip(prompts, written, strict=True):
            self.endings[ending_key(prompt, settings)] = self._ending(tokens, how)
        texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written)
        return [postprocess_generated_text(text, stop, None) for text in texts]

    def _ending(self, tokens: list[int], how: Writing) -> Ending:
        """Of a text that may have been padded, or written on, to the length of others after its end."""
        finish, ends = self._finish(how), set(end_tokens(self._model.generation_config, self.eot_token_id))
        own = tokens[: next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))]
        own = own[: finish.length(own)]
        return Ending(len(own), len(own) < how.max_new_tokens or finish(own))

    def _write(self, prompts: list[list[int]], how: Writing, step: Work) -> list[list[int]]:
        """The new tokens of every prompt."""
        keys, items = self._text_keys(prompts, how), self.items
        if how.settings.get("do_sample"):  # what is drawn depends on what was drawn before: nothing to be kept
            keys, items = [f"{key} {index}" for index, key in enumerate(keys)], ItemCache()
        missing = items.missing(keys)
        step.known(len(prompts) - len(missing))
        if missing:
            for batch, texts in self._written([prompts[index] for index in missing], how):
                items.add([keys[missing[index]] for index in batch], texts)
                step(len(batch))
        return [items[key] for key in keys]

    def _text_keys(self, prompts: list[list[int]], how: Writing) -> list[str]:
        settings = (how.max_new_tokens, how.stop, sorted(how.settings.items()))
        return [key_of("write", prompt, *settings) for prompt in prompts]

    def _written(self, prompts: Sequence[list[int]], how: Writing) -> Iterator[tuple[Sequence[int], list[list[int]]]]:
        """Indices of prompts and their texts, batch after batch."""
        if not self._writes_itself(how):
            by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
            for batch in batches(by_length, self.batch_size):
                yield batch, self._generate_with_transformers([prompts[index] for index in batch], how)
            return
        rows = [tuple(prompt) for prompt in prompts]
        shared = common_beginnings(rows)
        beginnings = [row[:count] for row, count in zip(rows, shared, strict=True)]
        reader = Reader(self._decoder, beginnings)
        # as many rows as there may be: it is the steps after the prompts that cost, and they have no padding
        for batch in batches_by_beginning(
            range(len(rows)),
            self.batch_size,
            lambda index: (beginnings[index], len(rows[index])),
            enough_tokens=sys.maxsize,
        ):
            start = reader.start([rows[index] for index in batch], [shared[index] for index in batch])
            own, most = [prompts[index] for index in batch], how.max_new_tokens
            yield (
                batch,
                write_after(self._decoder, own, max_new_tokens=most, is_finished=self._finish(how), start=start),
            )

    def _writes_itself(self, how: Writing) -> bool:
        """Whether the text can be written by our own loop; recurrent models, penalties and the like need another."""
        return self._decoder.can_branch and self._is_plain(how.settings)

    def _finish(self, how: Writing) -> Finish:
        return Finish(self.tokenizer, set(end_tokens(self._model.generation_config, self.eot_token_id)), how.stop)

    def _encode_prompt(self, prompt: str) -> list[int]:
        has_start = has_bos_prefix(prompt, getattr(self.tokenizer, "bos_token", None))
        return self.tokenizer(prompt, **({"add_special_tokens": False} if has_start else {}))["input_ids"]

    def _is_plain(self, wanted: dict[str, Any]) -> bool:
        """Whether text comes from the logits alone: nothing sampled by the task, nothing penalised by task or model."""
        config = self._model.generation_config
        model_settings = set() if config is None else config.to_diff_dict().keys() - NEUTRAL_SETTINGS
        return not wanted.get("do_sample") and not wanted.keys() - GREEDY_SETTINGS and not model_settings

    def _generate_with_transformers(self, rows: Sequence[list[int]], how: Writing) -> list[list[int]]:
        """A task's own sampling, beams, penalties and models with a recurrent state are left to transformers."""
        wanted = how.settings
        if not wanted.get("do_sample"):
            wanted = {key: value for key, value in wanted.items() if key not in GREEDY_SETTINGS} | {"do_sample": False}
        ids, mask, _ = self._decoder.left_padded(rows)
        model: Any = self._model
        with torch.no_grad(), answers_at(model, ids.shape[1]):
            written = model.generate(
                input_ids=ids.masked_fill(mask == 0, self.tokenizer.pad_token_id),
                attention_mask=mask,
                max_new_tokens=how.max_new_tokens,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, how.stop, ids.shape[1], len(rows)),
                pad_token_id=self.tokenizer.pad_token_id,
                # whole on every rank also where ZeRO 3 trains it, and ranks have unequal numbers of batches
                synced_gpus=False,
                **wanted,
            )
        return written[:, ids.shape[1] :].tolist()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered) if tensor.ndim == 0 else torch.cat(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        if self.world_size == 1:
            return [obj]
        barrier()  # which waits for as long as it takes: some ranks' answers are longer
        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            barrier()

    def _report_truncation(self, num_truncated: int, num_requests: int, what: str) -> None:
        if num_truncated:
            log.warning(
                "%d of %d requests are longer than the model's %d positions; the beginning of their %s was cut off",
                num_truncated,
                num_requests,
                self.max_length,
                what,
            )


def ending_key(prompt: str, settings: dict[str, Any]) -> tuple[str, str]:
    """Prompt and settings, by which the ending of a written text is looked up."""
    return prompt, json.dumps(settings, sort_keys=True, default=str)


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What text without a context follows: the start token, or the end token where there is none."""
    special: Any = tokenizer
    first = special.eos_token_id if special.bos_token_id is None else special.bos_token_id
    if first is None:
        raise UserError("the tokenizer has no start and no end token; set eos_token in its tokenizer_config.json")
    return first


def connect_ranks(device: torch.device) -> None:
    """Let the ranks that a launcher started talk to each other, unless they already do."""
    if world_size() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
