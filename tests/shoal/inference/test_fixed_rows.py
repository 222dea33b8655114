"""Texts written in room that does not grow, by recorded steps, against those of the loop whose rows grow.

A CPU has no graphs of kernels. Here a step is recorded as they are, as the list of operations that it ran on tensors,
and played back from that alone: what came from the host at the time of recording comes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import tiny_model as tiny_family
from tiny import KINDS, NUM_LAYERS, VOCAB_SIZE, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from variant_cases import VARIANTS, VARIED, prompts

from shoal.compress.variants import variant_generation
from shoal.compress.variants.variant_generation import Limits, generate_variants
from shoal.compress.variants.variants import Edited, without
from shoal.inference import fixed_rows
from shoal.inference.decoder import Decoder, plain_cache
from shoal.inference.drawing import Drawn
from shoal.inference.fixed_rows import Step, can_be_recorded, serves
from shoal.inference.generation import Texts, write, write_after
from shoal.models.anatomy import decoder_layers

SHORT = Limits(12, lambda tokens: tokens[-1] % 17 == 0)
FAMILIES = (
    *(
        "afmoe",
        "cohere2",
        "exaone4",
        "gemma3",
        "gemma4_unified",
        "ministral",
        "olmo3",
    ),  # kinds of layers with masks of their own
    *("biogpt", "codegen", "gpt2", "gptj", "opt", "persimmon"),  # learnt and interleaved positions
    *("deepseek_v3", "dots3_note_text", "minicpm3", "youtu"),  # keys and values of unequal sizes
    *("gpt_bigcode", "mixtral", "phi4_multimodal", "qwen2_vl", "qwen3_vl"),  # one key for all heads, experts, images
)
"""One of every kind; each row of architectures.py that is served was tried once."""
LONG = Limits(40, lambda tokens: sum(tokens) % 11 == 0)


class Recording(TorchDispatchMode):
    """Notes every operation, with its tensors, and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number was asked for while recording")
        found = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, found))
        return found

    def play(self) -> None:
        """Every operation again, its results in the tensors that the next ones read."""
        for func, args, kwargs, found in self.operations:
            again = func(*args, **kwargs)
            tree_map(_into, found, again)


def _into(kept: Any, again: Any) -> None:
    if isinstance(kept, Tensor) and kept is not again and kept.data_ptr() != again.data_ptr():
        kept.copy_(again)


def recorded(step: Step) -> Step:
    recording = Recording()
    with torch.no_grad(), recording:
        found = step()

    def replay() -> Tensor:
        with torch.no_grad():
            recording.play()
        return found

    return replay


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every model is served here, and what was recorded is listed."""
    made: list[Step] = []
    monkeypatch.setattr("shoal.inference.decoder.serves", lambda model: True)
    monkeypatch.setattr(fixed_rows, "recorded", lambda step, _device: made.append(step) or recorded(step))
    return made


def written(
    model: Any, limits: Limits, *, choose: Any = None, fixed: bool, vocabulary: int = VOCAB_SIZE
) -> list[list[int]]:
    decoder = Decoder(model)
    decoder.has_fixed_rows = fixed
    settings = {} if choose is None else {"choose": choose}
    return write_after(
        decoder,
        [[token % vocabulary for token in prompt] for prompt in prompts(shared=3, count=7)],
        max_new_tokens=limits.max_new_tokens,
        is_finished=limits.is_finished,
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_rows_that_grow(kind: str, recordings: list[Step]) -> None:
    model = tiny_model(kind, **VARIED)
    found = written(model, LONG, fixed=True)
    assert found == written(model, LONG, fixed=False)
    assert len({len(text) for text in found}) > 2, "rows end at different times"
    assert len(recordings) > 1, "half of the rows have left, and the others were recorded again"


@pytest.mark.slow
@pytest.mark.usefixtures("recordings")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_family_writes_the_same(family: str) -> None:
    model = tiny_family(family)
    assert Decoder(model).has_fixed_rows
    assert written(model, LONG, fixed=True, vocabulary=88) == written(model, LONG, fixed=False, vocabulary=88)


@pytest.mark.slow
def test_drawn_texts_are_those_of_rows_that_grow(recordings: list[Step]) -> None:
    model = tiny_model("qwen3")
    uniforms = torch.rand(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    choose = Drawn(uniforms, 1.0, 0.9)
    assert written(model, LONG, choose=choose, fixed=True) == written(model, LONG, choose=choose, fixed=False)
    assert recordings


@pytest.mark.slow
@pytest.mark.parametrize("drafted", [1, None])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_variants_are_rows_of_one_recording(
    kind: str, drafted: int | None, recordings: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as drafts, texts of several lengths go on as rows of one batch."""
    monkeypatch.setattr(variant_generation, "DRAFT_TOKENS", {"cpu": drafted})
    edited = Edited(tiny_model(kind, **VARIED))
    fixed, growing = Decoder(edited.model), Decoder(edited.model)
    growing.has_fixed_rows = False
    asked = prompts(shared=20)
    found, expected = (
        generate_variants(edited, decoder, asked, VARIANTS, LONG, batch_size=3) for decoder in (fixed, growing)
    )
    for one, texts, others in zip(VARIANTS, found, expected, strict=True):
        assert texts == others, one.name
    assert recordings
    assert can_be_recorded(edited.model)


@pytest.mark.slow
def test_room_is_for_the_text_that_has_least_so_far(recordings: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first variant goes with the draft for long, the other leaves it at once."""
    monkeypatch.setattr(variant_generation, "DRAFT_TOKENS", {"cpu": None})
    model = tiny_model("llama", **VARIED)
    with torch.no_grad():
        for parameter in decoder_layers(model)[0].parameters():
            parameter.mul_(0.1)
    asked, limits = prompts(shared=0), Limits(40, lambda _: False)
    arguments = (Edited(model), Decoder(model), asked, [without([0]), without([3])], limits)
    growing = Decoder(model)
    growing.has_fixed_rows = False
    found = generate_variants(*arguments, batch_size=4)
    assert found == generate_variants(arguments[0], growing, *arguments[2:], batch_size=4)
    assert recordings


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_room_that_is_full_is_made_anew(kind: str, recordings: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than what is left, so that a long limit takes no memory before it is needed."""
    monkeypatch.setattr(fixed_rows, "ROOM", 16)
    model, endless = tiny_model(kind, **VARIED), Limits(45, lambda tokens: len(tokens) > 20 and sum(tokens) % 29 == 0)
    found = written(model, endless, fixed=True)
    assert found == written(model, endless, fixed=False)
    assert len(recordings) > 2
    assert max(map(len, found)) > 33


@pytest.mark.slow
@pytest.mark.usefixtures("recordings")
def test_rows_that_are_done_come_to_no_position_that_the_model_lacks() -> None:
    """A row that was given a draft is done long before the others."""
    model, prompt = tiny_family("gpt2", max_position_embeddings=40), [5, 6, 7, 8, 9, 10, 11, 12]
    found = []
    for fixed in (True, False):
        decoder = Decoder(model)
        decoder.has_fixed_rows = fixed
        (draft,) = write_after(decoder, [prompt], max_new_tokens=14, is_finished=lambda _: False)
        ids_BS, mask_BS, positions_BS = decoder.left_padded([[*prompt, *draft], prompt])
        texts = Texts(plain_cache(NUM_LAYERS), mask_BS, ids_BS, positions_BS, [0, 1], [[*draft], []])
        write(decoder, texts, max_new_tokens=32, is_finished=lambda _: False)
        found.append(texts.written)
    assert found[0] == found[1]


@pytest.mark.slow
def test_short_texts_are_not_worth_a_recording(recordings: list[Step]) -> None:
    assert written(tiny_model("llama"), SHORT, fixed=True) == written(tiny_model("llama"), SHORT, fixed=False)
    assert not recordings


def hooked(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    def of_output(_module: Any, _args: Any, output: Any) -> Tensor:
        return change(output)

    return decoder_layers(model)[NUM_LAYERS - 1].register_forward_hook(of_output)


@pytest.mark.slow
@pytest.mark.usefixtures("recordings")
def test_a_number_of_the_host_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """What changes from step to step on the host alone stands still in a recording."""
    model = tiny_model("llama", **VARIED)
    count = [0]

    def change(states: Tensor) -> Tensor:
        count[0] += 1
        return states.roll(count[0], -1)

    decoder = Decoder(model)
    hooked(model, change)
    with caplog.at_level(logging.WARNING):
        write_after(decoder, prompts(shared=3), max_new_tokens=40, is_finished=lambda _: False)
    assert [record.message for record in caplog.records] == [
        "steps of llama are not recorded and take longer: a recorded step gives other logits than the step itself"
    ]


@pytest.mark.slow
def test_what_waits_for_the_device_is_written_by_steps_as_they_are(
    recordings: list[Step], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", **VARIED)
    hooked(model, lambda states: states * (2.0 if float(states.sum()) > 0 else 0.5))
    with caplog.at_level(logging.WARNING):
        found = written(model, LONG, fixed=True)
    assert found == written(model, LONG, fixed=False)
    assert len(recordings) == 1, "it is tried once"
    assert [record.message for record in caplog.records] == [
        "steps of llama are not recorded and take longer: a number was asked for while recording"
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("recordings")
def test_other_kernels_read_prompts_and_sdpa_writes() -> None:
    model = tiny_model("llama", **VARIED)
    model.config._attn_implementation = "eager"  # stands for kernels without masks of a fixed size
    seen: list[str] = []
    hooked(model, lambda states: seen.append(str(model.config._attn_implementation)) or states)
    decoder = Decoder(model)
    seen.clear()
    write_after(decoder, prompts(shared=3), max_new_tokens=20, is_finished=lambda _: False)
    assert seen[0] == "eager"
    assert {*seen[1:]} == {"sdpa"}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("device", "attention", "changed", "expected"),
    [
        ("cuda", "sdpa", {}, True),
        ("cuda", "flash_attention_2", {}, True),
        ("cpu", "sdpa", {}, False),  # starts its kernels fast enough
        ("cuda", "eager", {}, False),
        ("cuda", "sdpa", {"layer_types": ["chunked_attention"] * NUM_LAYERS}, False),
        ("cuda", "sdpa", {"alibi": True}, False),
    ],
)
def test_models_whose_steps_can_be_recorded(
    device: str, attention: str, changed: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen2")
    monkeypatch.setattr(type(model), "device", torch.device(device))
    model.config._attn_implementation = attention
    vars(model.config).update(changed)
    assert serves(model) == expected


def test_kinds_of_layers_that_a_family_does_not_know_are_not_made_masks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert serves(model)
    model.config.layer_types = ["full_attention"] * NUM_LAYERS
    assert not serves(model)


def test_layers_on_several_devices_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert not serves(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_kernels_write_the_same(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_model(kind, **VARIED)
    model.to("cuda")
    assert serves(model)
    with caplog.at_level(logging.WARNING):
        found = written(model, LONG, fixed=True)
    assert not caplog.records
    assert found == written(model, LONG, fixed=False)
