"""Well-known facts: relations, their prompts, and subject-to-object pairs, as facts.yaml has them."""

from dataclasses import dataclass

from shoal.abilities.words import table


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is asked; "{}" stands for the subject."""

    prompt: str
    """Ends right before the object."""

    question: str
    """The same as a question, for lettered prompts."""

    pairs: tuple[tuple[str, str], ...]
    """(subject, object), each subject once."""

    answer: str = "{}"
    """How the object is written: words about words stand in quotation marks."""

    paraphrase: str = ""
    """The prompt in words that no training text has; empty where no other form is asked."""

    kinds: tuple[str, str] = ("", "")
    """What subject and object are, as the names of two fields."""


def _relation(prompt: str, question: str, pairs: str, kinds: tuple[str, str] = ("", ""), **words: str) -> Relation:
    """From the entry of facts.yaml, whose pairs are "subject: object; subject: object"."""
    subject, target = kinds
    entries = (pair.split(": ", 1) for pair in pairs.split("; "))
    return Relation(prompt, question, tuple((one, other) for one, other in entries), kinds=(subject, target), **words)


RELATIONS = {name: _relation(**entry) for name, entry in table("facts")["stated"].items()}
"""Of these training text states facts."""
UNTRAINED = {name: _relation(**entry) for name, entry in table("facts")["unstated"].items()}
"""Of these no text states any. A subject or object may stand in both, but the two together are asked once."""
