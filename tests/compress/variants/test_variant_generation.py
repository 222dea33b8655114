"""Texts of variants written as rows of one batch, against each variant writing alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from tiny import KINDS, NUM_LAYERS, tiny_model
from variant_cases import VARIED, prompts

from shoal.components import LayerEdit
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.variants.variant_generation import Limits, generate_variants
from shoal.compress.variants.variants import INTACT, Edited, Variant, variant, without
from shoal.inference.decoder import Decoder
from shoal.inference.generation import write_after

VARIANTS = [
    without([0]),
    INTACT,
    *(without([layer]) for layer in range(1, NUM_LAYERS)),
    without([1, 4]),
    variant("attention", [(2, LayerEdit("attention"))]),
    variant("mlp", [(4, LayerEdit("mlp")), (1, LayerEdit("attention"))]),
    variant("heads", [(5, LayerEdit("head", (1, 2))), (3, LayerEdit("head", (0,)))]),
]
LIMITS = Limits(12, lambda tokens: tokens[-1] % 17 == 0)


def alone(edited: Edited, asked: Sequence[list[int]], one: Variant) -> list[list[int]]:
    with edited.applied(one.edits):
        return write_after(
            Decoder(edited.model), asked, max_new_tokens=LIMITS.max_new_tokens, is_finished=LIMITS.is_finished
        )


@cache
def each_alone(kind: str, shared: int) -> list[list[list[int]]]:
    """What every one of VARIANTS writes."""
    edited = Edited(tiny_model(kind, **VARIED))
    return [alone(edited, prompts(shared=shared), one) for one in VARIANTS]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_variants_are_those_of_each_variant_alone(kind: str, shared: int) -> None:
    edited = Edited(tiny_model(kind, **VARIED))
    asked = prompts(shared=shared)
    found = generate_variants(edited, Decoder(edited.model), asked, VARIANTS, LIMITS, batch_size=3)
    assert [len(texts) for texts in found] == [len(asked)] * len(VARIANTS)
    for one, texts, expected in zip(VARIANTS, found, each_alone(kind, shared), strict=True):
        assert texts == expected, one.name
    assert len({str(texts) for texts in found}) > len(VARIANTS) // 2
    lengths = {len(text) for texts in found for text in texts}
    assert len(lengths) > 2  # rows leave the batch at different times


@pytest.mark.slow
def test_texts_without_layers_are_those_that_transformers_writes_with_the_cut_model() -> None:
    model = tiny_model("qwen3", **VARIED)
    asked = prompts(shared=20)
    drops = [(0,), (2,), (1, 4)]
    limits = Limits(10, lambda _: False)
    found = generate_variants(
        Edited(model), Decoder(model), asked, [without(drop) for drop in drops], limits, batch_size=4
    )
    for drop, texts in zip(drops, found, strict=True):
        cut = cut_model(model, drop)
        for prompt, text in zip(asked, texts, strict=True):
            written = cut.generate(  # pyright: ignore[reportCallIssue]
                torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=-1
            )
            assert written[0, len(prompt) :].tolist() == text
