"""What an answer shows beside being right. Of written text: no answer can be read out of it, it ends in a loop, the
limit cut it off, its length. Of a choice among options: how sure the model was.

N texts or items. A damaged model often loses the habit of answering, and the sense of what it does not know, before it
loses what it knows, so these stand beside scores.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from shoal.abilities.matching import letter_pattern
from shoal.artifacts.evaluation import Interval, TaskScore
from shoal.data.repetition import ends_in_loop
from shoal.stats.intervals import Array, wilson
from shoal.stats.paired import PairedDifference, mean_limits, paired_values

UNREADABLE = "[invalid]"
"""What lm-eval's filters hand on where they find no answer."""
RATES = ("malformed", "repetition", "cut_off", "refused")
"""Shares of the texts, each a defect but refusals, which only harmful and harmless requests count."""
LENGTH = "mean_tokens"
OVERCONFIDENCE = "overconfidence"
"""Mean probability of the likeliest option less the share of items in which it is the right one."""
NAMES = (*RATES, LENGTH, OVERCONFIDENCE)
CALIBRATION_ERROR = "calibration_error"
CALIBRATION_LUCK = "calibration_luck"
BINS = 10
"""Bins of a calibration error, of equal width from 0 to 1."""
LUCKY_DRAWS = 200


def text_rates(
    texts: Sequence[str], readable: Sequence[bool], lengths: Sequence[int], cut: Sequence[bool]
) -> list[dict[str, float]]:
    """What artifact.ItemScore.rates holds, for every text.

    ``readable`` says out of which texts an answer can be read, ``lengths`` are in new tokens, ``cut`` says which texts
    ended by the limit of new tokens.
    """
    return [
        {
            "malformed": float(not can_be_read),
            "repetition": float(ends_in_loop(text)),
            "cut_off": float(was_cut),
            "tokens": float(length),
        }
        for text, can_be_read, length, was_cut in zip(texts, readable, lengths, cut, strict=True)
    ]


def option_rates(log_probs: Sequence[float], golds: Collection[int]) -> dict[str, float]:
    """The same for a choice, from the log-likelihoods of the options, of which ``golds`` are right.

    The options' probabilities sum to 1, and lengths do not enter: `confidence` is the likeliest option's, also where
    the score compares likelihoods per character.
    """
    likelihoods = np.exp(np.array(log_probs) - max(log_probs))
    likeliest = int(likelihoods.argmax())
    confidence = round(float(likelihoods[likeliest] / likelihoods.sum()), 6)
    return {"confidence": confidence, OVERCONFIDENCE: confidence - (likeliest in golds)}


def calibration(confidence_N: Array, overconfidence_N: Array) -> dict[str, float]:
    """The calibration error (ECE) of N choices, and the one that luck alone would give a model without any.

    Sum over BINS of |sum of overconfidence in the bin| / N. It is above zero for every model of few items, so it has no
    interval; luck is the mean error where items are right as often as the model says.
    """
    bins_NB = np.eye(BINS)[np.minimum((confidence_N * BINS).astype(int), BINS - 1)]
    right_RN = np.random.default_rng(0).random((LUCKY_DRAWS, len(confidence_N))) < confidence_N
    error, luck = (np.abs(over @ bins_NB).sum(-1).mean() for over in (overconfidence_N, confidence_N - right_RN))
    return {name: float(own) / len(bins_NB) for name, own in ((CALIBRATION_ERROR, error), (CALIBRATION_LUCK, luck))}


def hold_answers(texts: Sequence[str], filtered: Sequence[str], targets: Sequence[str]) -> list[bool]:
    """Whether every text holds something of the kind of the ``targets``, and its task's filter found something in it.

    ``filtered`` is what the filter read out of the text.
    """
    pattern = answer_pattern(targets)
    return [read != UNREADABLE and pattern.search(text) is not None for text, read in zip(texts, filtered, strict=True)]


def with_rates(score: TaskScore) -> TaskScore:
    """The same score with the means over its items, where these have rates."""
    if not score.items or not all(item.rates for item in score.items):
        return score
    own = score.items[0].rates
    rates = {name: float(np.mean(values_of(score, name))) for name in NAMES if _key(name) in own}
    if OVERCONFIDENCE in own:
        rates |= calibration(values_of(score, "confidence"), values_of(score, OVERCONFIDENCE))
    return replace(score, rates=rates)


def _key(name: str) -> str:
    return "tokens" if name == LENGTH else name


def values_of(score: TaskScore, name: str) -> Array:
    """(N,): one of NAMES by item, in the order of the items."""
    return np.array([item.rates[_key(name)] for item in score.items], dtype=np.float64)


def rate(score: TaskScore, name: str) -> Interval:
    """One of NAMES over the items of ``score``, which has it; Wilson's interval of a share, else that of a mean."""
    values_N = values_of(score, name)
    low, high = wilson(float(values_N.sum()), len(values_N)) if name in RATES else mean_limits(values_N.tolist())
    # no text is shorter than nothing
    return Interval(float(values_N.mean()), max(low, 0.0) if name == LENGTH else low, high)


def rate_difference(before: TaskScore, after: TaskScore, name: str) -> PairedDifference:
    """The change of one of NAMES from ``before`` to ``after``, item by item; an item is won where the value falls.

    Exact McNemar test and Newcombe's interval for shares, the paired t-test for length and overconfidence.
    """
    later = dict(zip((item.id for item in after.items), values_of(after, name), strict=True))
    before_N, after_N = values_of(before, name), np.array([later[item.id] for item in before.items])
    return paired_values(before_N, after_N, np.ones_like(before_N), binary=name in RATES, higher_is_better=False)


def answer_pattern(targets: Sequence[str]) -> re.Pattern[str]:
    """What a text must hold to hold an answer at all, whatever the task's own rule of matching is.

    INFERRED: something of the kind that every target of the task holds. Where all targets are one letter, one of these
    letters as a word of its own that is no article; where all hold a digit, a digit; where none holds a letter or
    digit (brackets), one of their characters; else a letter or digit.
    """
    targets = [target.strip() for target in targets]
    if targets and all(len(target) == 1 and target.isalpha() for target in targets):
        return letter_pattern(targets)
    if targets and all(any(character.isdigit() for character in target) for target in targets):
        return re.compile(r"\d")
    signs = "".join(sorted({character for target in targets for character in target if not character.isspace()}))
    if signs and not any(character.isalnum() for character in signs):
        return re.compile(f"[{re.escape(signs)}]")
    return re.compile(r"[^\W_]")
