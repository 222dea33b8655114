"""Items that two models answered differently: which of them a report shows, and how much of their text."""

from __future__ import annotations

from shoal.artifacts.evaluation import ItemScore

from .document import Flip, Flips, Section
from .findings import Comparison, flipped
from .wording import task_name

CHANGES = (
    ("pruned", "distilled", "won back by distilling", "lost by distilling"),
    ("teacher", "pruned", "right only after the cut", "lost by the cut"),
)
"""Role before, role after, name of the items won, name of the items lost."""
MAX_ITEMS = 12
"""Items shown per task and direction."""
MAX_CHARACTERS = 400
"""Characters shown of one text."""


def flips_section(comparison: Comparison) -> Section | None:
    """Changed items with both texts; None where no task has right-or-wrong items that changed."""
    groups = [group for change in CHANGES for group in _groups(comparison, *change)]
    if not groups:
        return None
    text = "Single answers behind the scores: items that one model has right and the other wrong."
    changed, told = (sum(counts) for counts in ((own.count for own in groups), (len(own.items) for own in groups)))
    if told < changed:
        text += (
            f" {told:,} of {changed:,} are shown, the first of every task and direction, of long texts the beginning "
            "and the end; all of them are in eval/*.json."
        )
    return Section("Items that changed sides", (text, *groups))


def _groups(comparison: Comparison, before: str, after: str, won_word: str, lost_word: str) -> list[Flips]:
    groups = []
    for row in comparison.rows:
        if before in row.scores and after in row.scores:
            sides = zip(flipped(row.scores[before], row.scores[after]), (won_word, lost_word), strict=True)
            for index, (pairs, word) in enumerate(sides):
                if pairs:
                    items = tuple(_flip(*pair) for pair in pairs[:MAX_ITEMS])
                    groups.append(Flips(task_name(row), word, index == 0, before, after, len(pairs), items))
    return groups


def _flip(before: ItemScore, after: ItemScore) -> Flip:
    return Flip(
        item=_clipped(before.id),
        question=_clipped(before.question),
        expected=_clipped(before.target),
        before=_clipped(before.prediction),
        after=_clipped(after.prediction),
    )


def _clipped(text: str) -> str:
    """The text, of a long one its beginning and end: a question stands at the end, a loop shows in both."""
    text, half = text.strip(), MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]} … {text[-half:]}"
