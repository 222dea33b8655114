"""One multiple-choice item, the forms in which it can be asked, and the rule that decides which split content is in."""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from shoal.abilities.words import table

Value = int | str | None
SPLITS = ("train", "eval")
ATTEMPTS = 200
"""Draws per item wanted until it is clear that there are not so many."""


@dataclass(frozen=True)
class Item:
    """A prompt with one right continuation among wrong ones of the same kind."""

    task: str
    """The generator that made it: retrieval, knowledge, state_tracking ..."""

    id: str
    """Hash of the content: equal items have equal ids in every run, and in every form."""

    context: str
    """What the model reads; ends without a space."""

    options: tuple[str, ...]
    """Full continuations; each starts with the character that follows the context."""

    answer: int
    """Index of the right option."""

    question: str
    """The bare question, from which a lettered prompt can be built."""

    params: dict[str, int | str]
    """What the item was made with, and `final`: the short answer that generated text has to contain."""

    @property
    def gold(self) -> str:
        """The right option."""
        return self.options[self.answer]


@dataclass(frozen=True)
class Wanted:
    """So many different items of a split; equal seeds give equal items."""

    split: str
    num_items: int
    seed: int

    def generator(self, task: str, **params: Value) -> random.Random:
        """A random generator that depends on everything asked for, so that changing one setting changes all items."""
        return generator(task, self.split, self.seed, **params)

    def distinct(self, task: str, make: Callable[[random.Random, int], Item], **params: Value) -> list[Item]:
        """Items that ask different things; ``make`` is given how many there are already.

        Raises:
            ValueError: when ``make`` does not find so many.
        """
        rng, items = self.generator(task, **params), dict[str, Item]()
        for _ in range(ATTEMPTS * self.num_items):
            item = make(rng, len(items))
            items.setdefault(item.context, item)
            if len(items) == self.num_items:
                return list(items.values())
        told = ", ".join(f"{name}: {value}" for name, value in params.items())
        raise ValueError(f"{task} ({told}; split {self.split}): has fewer than {self.num_items} items; lower num_items")


@dataclass(frozen=True)
class Form:
    """One way in which an ability's content is put into text: its carrier and wording, as str.format templates.

    Every field of a subclass that is text, or a tuple of texts, is such a template.
    """

    name: str

    reworded: bool = field(default=False, kw_only=True)
    """True: no training text has this form, so that a score in it tells the ability from the form that was trained."""

    @property
    def templates(self) -> tuple[str, ...]:
        """Every template of the form."""
        values = [getattr(self, field.name) for field in fields(self) if field.name != "name"]
        texts = (text for value in values for text in (value if isinstance(value, tuple) else (value,)))
        return tuple(text for text in texts if text and isinstance(text, str))


F = TypeVar("F", bound=Form)


def forms_of(kind: type[F], ability: str) -> tuple[F, ...]:
    """The forms of an ability, as forms.yaml has them; the first is the one asked for where none is named. Which are
    reworded ones was chosen so that the intact demo model finds both kinds equally hard."""
    forms: list[F] = []
    for told in table("forms")[ability]:
        own: dict[str, Any] = {key: tuple(text) if isinstance(text, list) else text for key, text in told.items()}
        forms.append(kind(**own))
    return tuple(forms)


def assigned_forms(forms: Sequence[F], asked: Value, task: str, num_items: int) -> list[F]:
    """The form of each item: the first one, or ``asked``: a name, or "trained" or "reworded" for all of these by turns.

    Every run of as many items as there are forms has each of them once, in an order of its own, so that no form goes
    with one position or kind.

    Raises:
        ValueError: there is no such form.
    """
    if asked is None:
        return [forms[0]] * num_items
    groups = {"trained": [f for f in forms if not f.reworded], "reworded": [f for f in forms if f.reworded]}
    check_choice(f"{task} form", asked, [*groups, *(form.name for form in forms)])
    chosen = groups.get(str(asked)) or [form for form in forms if form.name == asked]
    # the seed keeps the column's first name, so that every item is the one that earlier tables asked
    rng = random.Random(digest("form", task, "twin" if asked == "reworded" else asked))
    shuffled: list[F] = []
    while len(shuffled) < num_items:
        shuffled += rng.sample(chosen, len(chosen))
    return shuffled[:num_items]


def digest(*content: object) -> str:
    """Hexadecimal SHA-256 of the content, the same in every process."""
    return hashlib.sha256("\x1f".join(map(str, content)).encode()).hexdigest()


def split_of(*content: object) -> str:
    """The only split in which this content may appear: two fifths of all content is for training."""
    return "train" if int(digest(*content)[:8], 16) % 5 < 2 else "eval"


def words_in(split: str, kind: str, words: Iterable[str]) -> list[str]:
    """The words of a table that belong to the split."""
    return [word for word in words if split_of(kind, word) == split]


def build_item(
    task: str,
    context: str,
    *,
    gold: str,
    wrong: Sequence[str],
    position: int,
    question: str,
    params: dict[str, int | str],
) -> Item:
    """An Item with the right option at `position` modulo the number of options."""
    answer = position % (len(wrong) + 1)
    options = (*wrong[:answer], gold, *wrong[answer:])
    return Item(task, digest(task, context, *options)[:16], context, options, answer, question, params)


def generator(task: str, split: str, seed: int, **params: Value) -> random.Random:
    """The same for who wants no items."""
    return random.Random(digest(task, split, seed, sorted((name, str(value)) for name, value in params.items())))


def check_choice(name: str, value: Value, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in (choices := tuple(choices)):
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def check_range(name: str, value: Value, lowest: int, highest: int) -> int:
    """The value; anything but an integer between lowest and highest, both included, is refused."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {lowest} to {highest}")
    return value
