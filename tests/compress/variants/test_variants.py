"""Every variant's scores, with all that variants share computed once, against the variant run alone.

Covers: shoal.compress.variants.layerwise.
"""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from architectures import tiny_model as tiny_family
from tiny import KINDS, NUM_LAYERS, tiny_model
from transformers import PreTrainedModel
from variant_cases import VARIANTS, requests

from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.variants.variant_generation import Limits, generate_variants
from shoal.compress.variants.variants import INTACT, Edited, Variant, layerwise_or_none, score_variants, without
from shoal.inference.decoder import Decoder
from shoal.inference.generation import write_after
from shoal.inference.prefix_sharing import Tokens
from shoal.inference.scoring import Score, score
from shoal.models.anatomy import decoder_layers

RUN_AS_A_WHOLE = ("dory", "gemma3n_text", "gemma4_text", "glm_moe_dsa", "hy_v4", "inkling2_loop_text", "zaya")
"""Families whose layers share more than the hidden state."""
FAMILIES = (
    *("gemma2", "gemma3_text", "gpt_neo", "llama4", "llama4_text", "mimo_v2_flash", "olmo3"),  # several kinds of masks
    *("bloom", "ctrl", "falcon_alibi", "gpt2", "mpt", "opt", "xglm"),  # positions of their own, caches by position
    *("aria_text", "dbrx", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe_step"),  # experts, latent attention
    *("cohere", "granite", "hyperclovax", "modernbert-decoder", "nanochat"),  # heads that do more than a product
    *("dots3_note_text", "gemma4", "gemma4_unified_text"),  # layers of several shapes
    *("cpmant", "falcon_mamba", "lfm2", "qwen3_next", "rwkv", "xlstm", "zamba2"),  # no cache that could branch
    *RUN_AS_A_WHOLE,
)
"""One of every kind; each row of architectures.py was tried once."""


def assert_equal_scores(found: list[Score], expected: list[Score], tolerance: float = 1e-4) -> None:
    assert [first for _, first in found] == [first for _, first in expected]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]),
        torch.tensor([value for value, _ in expected]),
        atol=tolerance,
        rtol=0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_variants_are_those_of_each_variant_alone(kind: str) -> None:
    model = tiny_model(kind)
    edited, decoder, asked = Edited(model), Decoder(model), requests()
    found = score_variants(edited, decoder, asked, VARIANTS, batch_size=3)
    for one, scores in zip(VARIANTS, found, strict=True):
        with edited.applied(one.edits):
            expected = score(decoder, asked, batch_size=3)
        assert_equal_scores(scores, expected)
        assert scores == expected, one.name  # the same kernels on the same shapes


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_without_layers_are_those_of_the_cut_model(kind: str) -> None:
    model = tiny_model(kind)
    asked = requests()
    drops = [(0,), (3,), (1, 4), (2, 3, 5)]
    found = score_variants(Edited(model), Decoder(model), asked, [without(drop) for drop in drops], batch_size=4)
    for drop, scores in zip(drops, found, strict=True):
        assert_equal_scores(scores, score(Decoder(cut_model(model, drop)), asked, batch_size=7, branch=False))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_variants_of_every_kind_of_family_score_and_write_what_each_alone_does(family: str) -> None:
    model = tiny_family(family)
    edited, decoder = Edited(model), Decoder(model)
    num_layers = len(decoder_layers(model))
    variants = [without([0]), without([2, num_layers - 1])]
    asked: list[tuple[Tokens, Tokens]] = [((7, *range(11, 22)), tail) for tail in ((3,), (4, 5), (40, 30, 20))]
    prompts = [[*range(30, 47), 5, 9, 2], [*range(30, 47), 8]]  # longer than the window, and read together
    limits = Limits(3, lambda tokens: tokens[-1] % 7 == 0)
    scores = score_variants(edited, decoder, asked, variants, batch_size=2)
    texts = generate_variants(edited, decoder, prompts, variants, limits, batch_size=2) if decoder.can_branch else []
    for number, one in enumerate(variants):
        with edited.applied(one.edits):
            assert scores[number] == score(decoder, asked, batch_size=2)
            if texts and not ARCHITECTURES[family].padding:
                assert texts[number] == write_after(
                    decoder, prompts, max_new_tokens=limits.max_new_tokens, is_finished=limits.is_finished
                )
    assert (layerwise_or_none(model) is None) == (family in RUN_AS_A_WHOLE)


def layer_calls(model: PreTrainedModel, variants: list[Variant]) -> int:
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1

    edited, decoder = Edited(model), Decoder(model)
    score_variants(edited, decoder, [((256,), (1, 2, 3))], [INTACT], batch_size=1)  # the proof's calls do not count
    handles = [layer.register_forward_hook(add) for layer in decoder_layers(model)]
    score_variants(edited, decoder, [((256,), (1, 2, 3))], variants, batch_size=1)
    for handle in handles:
        handle.remove()
    recorded = NUM_LAYERS  # the pass that asks how layers are called
    learned = NUM_LAYERS  # what layers return is found out for every sweep
    return count - recorded - learned


def test_what_variants_share_is_computed_once() -> None:
    model = tiny_model("llama")
    singles = [without([layer]) for layer in range(NUM_LAYERS)]
    assert layer_calls(model, [INTACT]) == NUM_LAYERS
    # below the removed layer every variant is the intact model, whose own last layer nobody asked for
    assert layer_calls(model, singles) == NUM_LAYERS - 1 + NUM_LAYERS * (NUM_LAYERS - 1) // 2
    nested = [without(range(count, NUM_LAYERS)) for count in range(1, NUM_LAYERS)]
    assert layer_calls(model, nested) == NUM_LAYERS - 1


@pytest.mark.slow
def test_an_architecture_whose_layers_share_more_is_scored_variant_by_variant(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_family("gemma3n_text")
    edited, decoder = Edited(model), Decoder(model)
    asked = [(tuple(t % 90 for t in context), tuple(t % 90 for t in tail)) for context, tail in requests()]
    caplog.set_level("INFO")
    variants = [INTACT, without([0])]
    found = score_variants(edited, decoder, asked, variants, batch_size=3)
    assert "gemma3n_text: " in caplog.text
    assert "runs through all layers" in caplog.text
    with edited.applied(variants[1].edits):
        assert found[1] == score(decoder, asked, batch_size=3)
