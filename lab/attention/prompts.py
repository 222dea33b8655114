"""Look-ups and needles as tokens, with the places of what is to be copied, and their counterparts of one length
with another answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from shoal.abilities import items
from shoal.abilities.item import Item, generator
from shoal.abilities.retrieval import numbers_in
from shoal.errors import UserError

HeadTask = Literal["retrieval", "needle"]

SIZES: dict[HeadTask, tuple[str, tuple[int, ...]]] = {
    "retrieval": ("num_pairs", (8, 16, 32)),
    "needle": ("num_sentences", (20, 40, 80)),
}
"""What makes a text longer, and how long it gets."""
DEPTHS = (0, 25, 50, 75, 100)
"""Places of the needle, in percent of the text."""


@dataclass(frozen=True)
class CopyPrompt:
    """A text whose last tokens are found in it before."""

    input_ids: tuple[int, ...]
    """Context and answer, up to the last copied token."""
    needle: tuple[int, ...]
    """Places of the tokens that the answer copies; it ends with as many tokens, equal to these one by one."""
    question: int
    """Place of the first token behind the data."""

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens to copy."""
        return self.input_ids[-len(self.needle) :]


def copy_prompts(
    tasks: Sequence[HeadTask], num_each: int, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> dict[HeadTask, list[CopyPrompt]]:
    """``num_each`` prompts of every task, length and depth of the needle. Of items that training text never holds.

    Raises:
        UserError: a tokenizer that does not tell places, or that writes an answer in other tokens than the text has.
    """
    prompts: dict[HeadTask, list[CopyPrompt]] = {}
    for task in tasks:
        key, sizes = SIZES[task]
        cells = [(size, depth) for size in sizes for depth in DEPTHS]
        prompts[task] = []
        for size, depth in cells:
            at = {"depth": depth} if task == "needle" else {"gold_position": round(depth / 100 * (size - 1))}
            asked = items(task, split="eval", num_items=num_each, seed=seed, **{key: size}, **at)
            prompts[task] += [prompt for item in asked if (prompt := copy_prompt(item, tokenizer)) is not None]
        if not prompts[task]:
            raise UserError(
                f"shoal lab heads: {task}: this tokenizer writes no answer in the tokens that it has in the text, "
                "so no head can copy them one by one; name another task"
            )
    return prompts


def copy_prompt(item: Item, tokenizer: PreTrainedTokenizerBase) -> CopyPrompt | None:
    """``item`` with its right answer; None where that is not made of the tokens that the text has for it.

    Raises:
        UserError: a tokenizer that does not tell where its tokens stand.
    """
    value, encoded = str(item.params["final"]), Encoded.of(item.context + item.gold, tokenizer)
    start, answered = item.context.index(value), len(item.context) + item.gold.index(value)
    needle, answer = (encoded.over(at, at + len(value)) for at in (start, answered))
    if not needle or [encoded.ids[place] for place in needle] != [encoded.ids[place] for place in answer]:
        return None
    # context and question both begin with the data
    data = next(at for at, pair in enumerate(zip(item.context, item.question, strict=False)) if pair[0] != pair[1])
    behind = encoded.over(data, len(item.context))
    return CopyPrompt(tuple(encoded.ids[: answer[-1] + 1]), tuple(needle), behind[0])


@dataclass(frozen=True)
class Encoded:
    """A text as tokens that tell where they stand."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """``text`` in tokens."""
        if not tokenizer.is_fast:
            raise UserError(
                f"shoal lab: {type(tokenizer).__name__} does not tell where in a text its tokens stand; "
                "use a model with a fast tokenizer"
            )
        encoded: Any = tokenizer(text, return_offsets_mapping=True)
        return cls(encoded["input_ids"], encoded["offset_mapping"])

    def over(self, start: int, end: int) -> list[int]:
        """Places of the tokens that hold a character from ``start`` to before ``end``."""
        return [place for place, (a, b) in enumerate(self.offsets) if a < end and b > start]


COUNTERPART_PAIRS = 4
"""Counterparts are short: each is run once for every state that is put in."""
Corruption = Literal["value", "key", "question"]
"""How the counterpart of a look-up differs: another value at the key that is asked for, two keys exchanged in the data,
or another key asked for."""


@dataclass(frozen=True)
class Counterparts:
    """Two prompts of one length with different answers, which are left out."""

    clean_ids: tuple[int, ...]
    corrupted_ids: tuple[int, ...]
    right: int
    """First token of the clean prompt's answer."""
    wrong: int
    """First token of the corrupted prompt's answer."""
    groups: dict[str, tuple[int, ...]]
    """Places by group. `needle`: the value, for `key` both pairs whose keys are exchanged; of a `question` nothing
    there differs, and it has none. `question`: what stands behind the data, without the last token. `all` begins with
    the first token that differs."""


def look_up_pairs(count: int, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> dict[Corruption, list[Counterparts]]:
    """``count`` look-ups with a counterpart of every kind."""
    pairs_by_kind: dict[Corruption, list[Counterparts]] = {kind: [] for kind in get_args(Corruption)}
    for item in items("retrieval", split="eval", num_items=count, seed=seed, num_pairs=COUNTERPART_PAIRS):
        for kind, pairs in pairs_by_kind.items():
            candidates = (_counterparts(kind, item, other, tokenizer) for other in _corrupted(kind, item, seed))
            if (pair := next(filter(None, candidates), None)) is not None:
                pairs.append(pair)
    if (missing := next((kind for kind, pairs in pairs_by_kind.items() if not pairs), None)) is not None:
        raise UserError(
            f"shoal lab patching: this tokenizer encodes no look-up with another {missing} in as many tokens"
        )
    return pairs_by_kind


def _corrupted(kind: Corruption, item: Item, seed: int) -> Iterator[Item]:
    """What may be a counterpart of ``item``, in a random order."""
    # the seed keeps the setting's first name, so that counterparts are those of earlier tables
    rng, end = generator("twins", "eval", seed, item=item.id, kind=kind), item.context.index("}") + 1
    data, ask = item.context[:end], item.context[end:]
    pairs: dict[str, str] = json.loads(data[data.index("{") :])
    key, value = str(item.params["key"]), str(item.params["final"])
    if kind == "value":
        others = [number for number in numbers_in("eval") if number not in pairs.values()]
        for other in rng.sample(others, len(others)):
            yield _asking(item, data.replace(value, other), ask, other)
        return
    for other in rng.sample([name for name in pairs if name != key], len(pairs) - 1):
        if kind == "key":
            text = data.replace(f'"{key}":', '"":').replace(f'"{other}":', f'"{key}":').replace('"":', f'"{other}":')
            yield _asking(item, text, ask, pairs[other])
        else:
            yield _asking(item, data, ask.replace(key, other), pairs[other])


def _asking(item: Item, data: str, ask: str, value: str) -> Item:
    return replace(
        item,
        context=data + ask,
        question=data + item.question[len(data) :],
        options=tuple(option.replace(str(item.params["final"]), value) for option in item.options),
        params={**item.params, "final": value},
    )


def _counterparts(kind: Corruption, item: Item, other: Item, tokenizer: PreTrainedTokenizerBase) -> Counterparts | None:
    """None where the two have not the same length, differ elsewhere too, or begin their answers alike."""
    clean, corrupted = copy_prompt(item, tokenizer), copy_prompt(other, tokenizer)
    if clean is None or corrupted is None or clean.answer[0] == corrupted.answer[0]:
        return None
    ids, other_ids = (prompt.input_ids[: -len(prompt.needle)] for prompt in (clean, corrupted))
    different = [place for place, pair in enumerate(zip(ids, other_ids, strict=False)) if pair[0] != pair[1]]
    last = len(ids) - 1
    groups = {"needle": clean.needle, "question": tuple(range(clean.question, last)), "last": (last,)}
    if kind == "key":
        encoded, spans = Encoded.of(item.context, tokenizer), []
        for value in (str(item.params["final"]), str(other.params["final"])):
            pair = re.search(rf'"\w+": "{value}"', item.context)
            assert pair is not None
            spans += encoded.over(*pair.span())
        groups["needle"] = tuple(sorted(set(spans)))
    elif kind == "question":
        del groups["needle"]
    at = groups["question" if kind == "question" else "needle"]
    if len(ids) != len(other_ids) or not different or not set(different) <= set(at):
        return None
    groups["all"] = tuple(range(different[0], last + 1))
    return Counterparts(ids, other_ids, clean.answer[0], corrupted.answer[0], groups)
