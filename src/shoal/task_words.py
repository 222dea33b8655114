"""Words instead of task identifiers: the same in figures, tables and sentences."""

from __future__ import annotations

import re
from typing import Literal

from shoal.yaml_text import own_yaml

Column = Literal["in", "reworded", "out", "public"]
"""How items relate to training text: `in` = in a wording that it may have, `reworded` = the same items in a
wording that it never has, `out` = an ability that it never shows, `public` = a public benchmark."""
_WORDS = own_yaml(__file__)
PROTOCOLS: dict[str, str] = _WORDS["protocols"]
"""Protocol -> its words for a reader."""
COLUMNS: dict[str, str] = _WORDS["columns"]
"""Column -> its words, in the order in which they stand beside each other; see TaskScore.column."""
OUTSIDE = ("reworded", "out", "public")
"""Columns outside the trained wording."""
ABILITIES = ("retrieval", "knowledge", "reasoning")
"""Abilities that task names begin with."""
USUAL_METRICS = ("acc", "match", "exact_match", "nats_per_token")
"""Metrics that are not named, one for each way of asking; others are."""
ACRONYMS = ("arc", "bbh", "gsm8k", "mmlu", "nq", "piqa", "svamp", "uuid")
_COUNTED = re.compile(r"(at|k)?(\d+)([a-z]{2,}?)?(\d+)?")


def task_words(task: str, *, ability: str = "", protocol: str = "", metric: str = "") -> tuple[str, ...]:
    """`("reasoning", "one step", "option text")`: what is asked, first its ability where the name says it.

    ``protocol`` is read off the name's ending where it is not given.
    """
    base, _, ending = task.rpartition("_")
    named = bool(base) and ending in PROTOCOLS and protocol in ("", ending)
    protocol, base = (ending, base) if named else (protocol, task)
    own = next((name for name in (ability, *ABILITIES) if name and (base == name or base.startswith(f"{name}_"))), "")
    rest = base.removeprefix(own).strip("_") if own else base
    words = [_plain(part) for part in (own, rest) if part]
    if protocol:
        words.append(PROTOCOLS.get(protocol, _plain(protocol)))
    if metric and metric not in USUAL_METRICS:
        words.append(_plain(metric))
    return tuple(words) or (task,)


def _plain(name: str) -> str:
    return " ".join(_word(word) for word in name.split("_") if word) or name


def _word(word: str) -> str:
    """`20pairs` as `20 pairs`, `k1` as `one step`, `at25` as `at 25`, `mmlu` as `MMLU`; anything else as it is."""
    match = _COUNTED.fullmatch(word)
    if word in ACRONYMS:
        return word.upper()
    if not match or not (match[1] or match[3]):
        return word
    before, count, noun, last = match.groups()
    if before == "k":
        before, noun = None, "step" if count == "1" else "steps"
    count = "one" if count == "1" and noun == "step" else count
    return " ".join(part for part in (before, count, noun, last) if part)
