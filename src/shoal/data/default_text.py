"""The text that a model reads where nobody names any: broad public text from the Hub, or what every machine has."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the client that this version stands on
)
from torch import nn

from shoal.errors import NO_ANSWER
from shoal.formatting import count_text
from shoal.recipe.distill import NUM_TOKENS, SMALL, TrainingSource
from shoal.recipe.losses import CrossEntropy
from shoal.recipe.section import AUTO, DataSource, TextSource
from shoal.runtime import agreed

log = logging.getLogger(__name__)
Source = TypeVar("Source", bound=DataSource)
HUB_WAIT_S = 5
"""Seconds that the Hub has to answer."""
HOUR_S = 3600
PASSES = 8
"""Operations per weight and token of training: two of the teacher, two of the student and four of its gradients."""
MOST_TOKENS = {"public": 1_000_000_000, "bundled": NUM_TOKENS}
"""Tokens of each text that nobody wants more of by default. At a million tokens of bundled text a model answers fewer
questions of public benchmarks than at 82 thousand (docs/explanation/findings.md)."""
PUBLIC_TASKS = (
    *("retrieval_reworded_generation", "knowledge_reworded_generation", "reasoning_reworded_worked"),
    *("arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa", "lambada_openai", "gsm8k"),
)
"""What a model of public text is asked: abilities in wordings that no text trains, and lm-eval's names of public
benchmarks that any machine with a network can read."""


@dataclass(frozen=True)
class DefaultText:
    """Which text stands for `auto`."""

    kind: Literal["public", "bundled"]
    reason: str
    """Reason for it, in a sentence."""
    FEWEST: ClassVar[int] = 50_000
    """Tokens below which hardly anything comes back."""

    def num_tokens(self, parameters: int, flops: float, *, control: bool = False) -> int:
        """Tokens that train a model, and its ``control``, in about an hour at ``flops`` per second, to two digits."""
        hour = float(f"{HOUR_S * flops / (PASSES * parameters * (1 + control)):.1e}")
        return int(min(MOST_TOKENS[self.kind], max(self.FEWEST, hour)))

    def of(self, sources: Iterable[Source]) -> tuple[Source, ...]:
        """``sources`` with those of this text in place of `auto`, sharing its weight; its losses are theirs where it
        has some."""
        named: list[Source] = []
        for source in sources:
            if source.path != AUTO:
                named.append(source)
                continue
            chosen = (TRAINING if isinstance(source, TrainingSource) else CALIBRATION)[self.kind]
            for each in chosen:
                own = {"losses": source.losses or each.losses} if isinstance(source, TrainingSource) else {}
                weight = source.weight * each.weight / sum(other.weight for other in chosen)
                named.append(replace(source, path=each.path, name=each.name, weight=round(weight, 6), **own))
        return tuple(named)

    def sources(self, source: DataSource) -> tuple[TextSource, ...]:
        """Those in place of ``source``, which is `auto`, for models in memory."""
        return tuple(TextSource(each.path, name=each.name, weight=each.weight) for each in self.of([source]))


TRAINING: dict[str, tuple[TrainingSource, ...]] = {
    "public": (
        TrainingSource("HuggingFaceFW/fineweb-edu", name="sample-10BT", weight=0.6),
        TrainingSource("HuggingFaceTB/finemath", name="finemath-4plus", weight=0.2),
        TrainingSource("HuggingFaceTB/smoltalk", name="all", weight=0.2),
    ),
    "bundled": (
        TrainingSource("docstrings", weight=0.7),
        TrainingSource("ability_texts", weight=0.3, losses=(CrossEntropy(),)),
    ),
}
"""What students are trained on."""
CALIBRATION = {"public": TRAINING["public"][:1], "bundled": (TrainingSource("python_docs"),)}
"""What layers are measured on: text of the kind that the student will read."""
LICENCES = {
    "HuggingFaceFW/fineweb-edu": "web pages that teach, ODC-By 1.0",
    "HuggingFaceTB/finemath": "mathematics from the web, ODC-By 1.0",
    "HuggingFaceTB/smoltalk": "conversations, only the assistant's turns are learnt, Apache-2.0",
}
"""What a public source holds, and its licence, which was not read from its page; read it before you publish."""


def default_text(num_parameters: int) -> DefaultText:
    """Which text stands for `auto` with a model of so many parameters; the Hub is asked, unless it is a small one."""
    if num_parameters < SMALL:
        return DefaultText("bundled", f"a model of {count_text(num_parameters)} parameters is only for trials")
    name = TRAINING["public"][0].path
    if constants.HF_HUB_OFFLINE:
        return DefaultText("bundled", "HF_HUB_OFFLINE is set; it is only about software, and broad text recovers more")
    try:
        HfApi().dataset_info(name, timeout=HUB_WAIT_S)
    except (HfHubHTTPError, HTTPError, OSError, *NO_ANSWER) as error:
        reason = f"the Hub does not provide {name} ({type(error).__name__})"
        return DefaultText("bundled", f"{reason}; it is only about software, and broad text recovers more")
    return DefaultText("public", f"the Hub has it, and a model of {count_text(num_parameters)} parameters is not small")


def with_default_text(data: Any, model: nn.Module, source: DataSource) -> Any:
    """``data`` that a caller has given for ``model``; in place of `auto`, which ``source`` is, the sources of it."""
    return text_of(model).sources(source) if is_auto(data) else data


def is_auto(data: Any) -> bool:
    """Whether a caller leaves the text to shoal."""
    return isinstance(data, str) and data == AUTO


def text_of(model: nn.Module) -> DefaultText:
    """Which text stands for `auto` with ``model``, the same on every rank, which may hear otherwise of the Hub."""
    text = agreed(lambda: default_text(sum(parameter.numel() for parameter in model.parameters())))
    log.info("text, %s: %s", text.kind, text.reason)
    return text
