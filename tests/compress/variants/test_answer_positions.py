"""Layers that write nothing before the answer, or nothing from there on, against whole sequences run with plain hooks.

The reference knows no cache, no padding, no batch and none of shoal's edits: it runs every sequence alone in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from architectures import tiny_model as tiny_family
from tiny import NUM_LAYERS, tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from variant_cases import requests

from shoal.components import REMOVED, LayerEdit
from shoal.compress.edits.layer_edits import AtPositions, components_of, in_force
from shoal.compress.surgery.cut_model import skipped
from shoal.compress.variants.variant_generation import Limits, generate_variants
from shoal.compress.variants.variants import INTACT, Edited, Variant, score_variants, variant, without
from shoal.errors import UserError
from shoal.inference.decoder import Decoder, answers_at
from shoal.inference.prefix_sharing import Tokens
from shoal.models.anatomy import decoder_layers

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "full attention, grouped queries": lambda: tiny_model("llama", initializer_range=0.3),
    "sliding and full attention": lambda: tiny_model("gemma3", initializer_range=0.3),
    "experts": lambda: tiny_family("mixtral", initializer_range=0.3),
    "parallel attention": lambda: tiny_family("cohere", initializer_range=0.3),
    "parallel attention, positions partly rotated": lambda: tiny_family("gptj", initializer_range=0.3),
}
PARTS: tuple[AtPositions, ...] = ("skip_prompt", "skip_written")


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """``model``, whose experts run in a plain loop: torch multiplies groups of matrices in single precision only."""
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def variants_of(num_layers: int) -> list[Variant]:
    singles = [variant(f"{part} {layer}", [(layer, LayerEdit(part))]) for part in PARTS for layer in range(num_layers)]
    last = num_layers - 1
    return [
        *singles,
        INTACT,
        variant("both", [(1, LayerEdit("skip_prompt")), (1, LayerEdit("skip_written"))]),
        variant("two layers", [(0, LayerEdit("skip_prompt")), (last, LayerEdit("skip_written"))]),
        variant("one removed", [(0, REMOVED), (1, LayerEdit("skip_prompt")), (last, LayerEdit("skip_written"))]),
    ]


@contextmanager
def plainly(model: PreTrainedModel, one: Variant, first: int) -> Iterator[None]:
    """The layers of ``one`` pass their input on before position ``first``, from it on, or everywhere."""
    spans = {"skip_prompt": slice(0, first), "skip_written": slice(first, None), "layer": slice(None)}
    given: dict[int, Tensor] = {}

    def before(layer: int, args: Any, kwargs: Any) -> None:
        given[layer] = (args[0] if args else kwargs["hidden_states"]).clone()

    def after(layer: int, span: slice, output: Any) -> Any:
        state = (output if isinstance(output, Tensor) else output[0]).clone()
        state[:, span] = given[layer][:, span]
        return state if isinstance(output, Tensor) else (state, *output[1:])

    with ExitStack() as stack:
        for layer, edit in one.edits:
            module = decoder_layers(model)[layer]
            stack.enter_context(
                module.register_forward_pre_hook(lambda _, a, k, layer=layer: before(layer, a, k), with_kwargs=True)
            )
            stack.enter_context(
                module.register_forward_hook(lambda _, __, o, at=layer, part=edit.part: after(at, spans[part], o))
            )
        yield


@torch.no_grad()
def plain_score(model: PreTrainedModel, one: Variant, context: Tokens, continuation: Tokens) -> float:
    with plainly(model, one, len(context) - 1):
        logits = model(input_ids=torch.tensor([[*context, *continuation[:-1]]]), use_cache=False).logits.double()
    log_probs = logits[0, len(context) - 1 :].log_softmax(dim=-1)
    return float(log_probs.gather(1, torch.tensor(continuation).unsqueeze(1)).sum())


@torch.no_grad()
def plain_text(model: PreTrainedModel, one: Variant, prompt: Sequence[int], count: int) -> list[int]:
    text: list[int] = []
    with plainly(model, one, len(prompt) - 1):
        for _ in range(count):
            logits = model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
    return text


def asked(vocabulary: int = 90) -> list[tuple[Tokens, Tokens]]:
    """Contexts within and beyond the window, with options of several lengths, one token too; and running text."""
    some = [*requests(num_questions=4)[4:], ((7,), (3, 4, 5))]
    return [(tuple(t % vocabulary for t in context), tuple(t % vocabulary for t in tail)) for context, tail in some]


def prompts(shared: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    beginning, *ends = (torch.randint(0, 90, (n,), generator=generator).tolist() for n in (shared, 2, 11, 5))
    return [[*beginning, *end] for end in ends]


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_whole_sequences_run_with_plain_hooks(name: str) -> None:
    model = in_float64(FAMILIES[name]())
    variants = variants_of(len(decoder_layers(model)))
    found = score_variants(Edited(model), Decoder(model), asked(), variants, batch_size=3)
    for one, scores in zip(variants, found, strict=True):
        expected = [plain_score(model, one, *pair) for pair in asked()]
        # logits become float32 before the softmax
        assert [value for value, _ in scores] == pytest.approx(expected, abs=3e-5), one.name
    # what the last layer writes at prompt positions is read by nobody
    assert found[len(decoder_layers(model)) - 1] == found[variants.index(INTACT)]
    assert len({tuple(scores) for scores in found}) == len(variants) - 1


@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_those_of_whole_sequences_run_with_plain_hooks(name: str, shared: int) -> None:
    model = in_float64(FAMILIES[name]())
    variants, limits = variants_of(len(decoder_layers(model))), Limits(6, lambda _: False)
    edited, decoder = Edited(model), Decoder(model)
    found = generate_variants(edited, decoder, prompts(shared), variants, limits, batch_size=3)
    for one, texts in zip(variants, found, strict=True):
        assert texts == [plain_text(model, one, prompt, 6) for prompt in prompts(shared)], one.name
    assert len({str(texts) for texts in found}) > len(variants) // 2


def test_both_parts_at_once_are_the_layer_left_out_bit_for_bit() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    edited, decoder = Edited(model), Decoder(model)
    both = [variant(str(layer), [(layer, LayerEdit(part)) for part in PARTS]) for layer in range(NUM_LAYERS)]
    gone = [without([layer]) for layer in range(NUM_LAYERS)]
    limits = Limits(5, lambda _: False)
    for answers in (
        lambda variants: score_variants(edited, decoder, asked(), variants, batch_size=3),
        lambda variants: generate_variants(edited, decoder, prompts(12), variants, limits, batch_size=3),
    ):
        assert answers(both) == answers(gone)


@torch.no_grad()
def test_a_prompt_of_all_positions_leaves_the_layer_out_and_one_of_none_leaves_it_as_it_is() -> None:
    model = tiny_model("llama")
    ids = torch.arange(20).unsqueeze(0)
    with skipped(model, [2]):
        gone = model(input_ids=ids).logits
    intact = model(input_ids=ids).logits
    for part in PARTS:
        with in_force(model, [(2, LayerEdit(part))]):
            for is_skipped, expected in ((True, gone), (False, intact)):
                with answers_at(model, torch.full((1, 20), is_skipped == (part == "skip_written"))):
                    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("part", PARTS)
def test_a_family_whose_states_hold_more_than_one_position_each_is_refused_by_name(part: str) -> None:
    with pytest.raises(UserError, match=r"gemma3n_text: its layers pass on a state of shape .* skip_prompt"):
        components_of(part, tiny_family("gemma3n_text"))
