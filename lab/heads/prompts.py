"""Look-ups and needles as tokens, with the places of what is to be copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from shoal.abilities import items
from shoal.abilities.item import Item
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
        asked = [
            item
            for size, depth in cells
            for item in items(
                task, split="eval", num_items=num_each, seed=seed, **{key: size}, **_at(task, size, depth)
            )
        ]
        prompts[task] = [prompt for item in asked if (prompt := copy_prompt(item, tokenizer)) is not None]
        if not prompts[task]:
            raise UserError(
                f"shoal lab heads: {task}: this tokenizer writes no answer in the tokens that it has in the text, "
                "so no head can copy them one by one; name another task"
            )
    return prompts


def _at(task: HeadTask, size: int, depth: int) -> dict[str, int]:
    return {"depth": depth} if task == "needle" else {"gold_position": round(depth / 100 * (size - 1))}


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
