"""On-policy steps: whose samples, which tokens are learnt, and what must not depend on how rows are dealt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model, tiny_tokenizer
from transformers.generation import utils
from trl.models.utils import unwrap_model_for_generation

from shoal.data.packing import IGNORED
from shoal.data.repetition import Loop
from shoal.inference.generation import draw, sample
from shoal.models.anatomy import decoder_layers
from shoal.recipe.distill import OnPolicy
from shoal.train.objective.host_batch import ON_HOST, on_host
from shoal.train.on_policy import (
    Sample,
    Sampler,
    checkpointing_kept,
    lay_out,
    own_forwards,
    samples_in,
    without_repeats,
)

END, PAD, ROW = 257, 258, 48


@pytest.fixture(scope="module")
def student():
    return tiny_model("llama", seed=1)


def sampler(**settings: Any) -> Sampler:
    chosen = OnPolicy(**{"share": 1.0, "start": 0.0, "prompt_tokens": 5, "max_new_tokens": 8} | settings)
    return Sampler(chosen, seed=3, sequence_length=ROW, end_ids=(END,), pad_id=PAD)


def text_rows(num_rows: int = 4, *lengths: int) -> dict[str, torch.Tensor]:
    """Rows of whole documents of running text with an end token each."""
    lengths = lengths or (30, 18)
    assert sum(lengths) == ROW
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (num_rows, ROW), generator=chance)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(num_rows, -1).clone()
    ids[:, torch.tensor(lengths).cumsum(0) - 1] = END
    labels = ids.masked_fill(positions == 0, IGNORED)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "row": torch.arange(num_rows) + 12}


def documents(batch: dict[str, torch.Tensor], row: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every document in a row."""
    starts = (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
    parts = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return [(batch["input_ids"][row, part].tolist(), batch["labels"][row, part].tolist()) for part in parts]


def fail(*_args, **_kwargs):
    raise AssertionError("the objective was called")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one if key != ON_HOST)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_token_is_drawn_from_the_models_own_distribution_without_cache_and_padding(kind):
    """Recomputed one prompt and one token at a time from the whole forward."""
    model = tiny_model(kind, seed=1)
    model.generation_config.repetition_penalty = 3.0  # of the checkpoint: must not reach the samples
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]
    uniforms = torch.from_numpy(np.random.default_rng(0).random((3, 12)))
    written = sample(model, prompts, uniforms, temperature=0.7, end_ids=(END,), pad_id=PAD)
    for prompt, text, numbers in zip(prompts, written, uniforms, strict=True):
        so_far = list(prompt)
        for token, number in zip(text, numbers, strict=False):
            logits = model(input_ids=torch.tensor([so_far])).logits[:, -1]
            assert draw(logits, number[None], temperature=0.7).item() == token
            so_far.append(token)
        assert END not in text[:-1]
        assert len(text) == 12 or text[-1] == END
    assert model.generation_config.repetition_penalty == 3.0


def test_a_text_ends_with_its_end_token(student):
    prompts = [[1, 2, 3], [4, 5]]
    uniforms = torch.from_numpy(np.random.default_rng(5).random((2, 10)))
    free = sample(student, prompts, uniforms, temperature=1.0, end_ids=(), pad_id=PAD)
    third = free[0][2]
    assert third not in free[0][:2]
    ended = sample(student, prompts, uniforms, temperature=1.0, end_ids=(END, third), pad_id=PAD)
    assert ended[0] == free[0][:3]
    stop = free[1].index(third) + 1 if third in free[1] else 10
    assert ended[1] == free[1][:stop]


def test_sampling_uses_the_own_forward_and_gives_the_objective_back(student):
    rows = text_rows(2)
    plain = sampler().batches(student, [rows], step=0)
    modules = [student, student.lm_head]
    for module in modules:
        module.forward = fail
    student.train()
    try:
        with own_forwards(student):
            assert equal(sampler().batches(student, [rows], step=0)[0], plain[0])
        assert student.training
        with pytest.raises(ZeroDivisionError), own_forwards(student):
            raise ZeroDivisionError
        assert [module.__dict__["forward"] for module in modules] == [fail, fail]
    finally:
        student.eval()
        for module in modules:
            del module.forward


def test_only_sampled_tokens_are_learnt_up_to_the_end_token(student):
    rows = text_rows(3)
    (batch,) = sampler().batches(student, [rows], step=0)
    originals = [document for row in range(3) for document, _ in documents(rows, row)]
    width = batch["input_ids"].shape[1]
    assert 0 < width <= ROW
    for row in range(3):
        found = documents(batch, row)
        samples = [(ids, labels) for ids, labels in found if any(label != IGNORED for label in labels)]
        assert 1 <= len(samples) <= 3
        for ids, labels in samples:
            assert labels[:5] == [IGNORED] * 5
            assert labels[5:] == ids[5:]
            assert len(ids) <= 13
            assert END not in ids[5:-1]
            # every prompt is a piece of a document of the rows
            assert any(ids[:5] == d[a : a + 5] for d in originals for a in range(len(d)))
        padding = found[len(samples) :]
        assert all(set(ids) == {PAD} for ids, _ in padding)
        assert len(padding) <= 1


@pytest.mark.slow
def test_of_a_conversation_the_prompt_is_all_before_an_assistants_turn(student):
    rows = text_rows(1, 40, 8)
    labels = torch.full((1, ROW), IGNORED)
    labels[0, 10:15] = rows["input_ids"][0, 10:15]
    labels[0, 25:30] = rows["input_ids"][0, 25:30]  # the second document, padding, teaches nothing
    rows["labels"] = labels
    ids = rows["input_ids"][0].tolist()
    found = set()
    for step in range(8):
        (batch,) = sampler().batches(student, [rows], step=step)
        learnt = batch["labels"][0] != IGNORED
        start = int(learnt.nonzero()[0])
        assert batch["input_ids"][0, :start].tolist() == ids[:start]
        found.add(start)
    assert found == {10, 25}


@pytest.mark.parametrize(("asked", "written", "prompt"), [(5, 8, 5), (30, ROW - 7, 7), (5, 2 * ROW, 1)])
def test_a_prompt_is_cut_where_it_leaves_a_row_no_room_for_its_sample(asked, written, prompt):
    openings = sampler(prompt_tokens=asked, max_new_tokens=written)._openings([*range(ROW)])
    assert {len(opening) for opening in openings} == {prompt}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lambda_is_the_share_of_steps_on_samples(share):
    chosen = sampler(share=share)
    wanted = [chosen.replaces(step, 2000) for step in range(2000)]
    assert sum(wanted) / 2000 == pytest.approx(share, abs=0.04 if 0 < share < 1 else 0)
    assert wanted == [sampler(share=share).replaces(step, 2000) for step in range(2000)]


def test_no_step_before_the_start_is_on_policy():
    late, always = sampler(share=0.5, start=0.25), sampler(share=0.5)
    wanted = [late.replaces(step, 100) for step in range(100)]
    assert wanted[:25] == [False] * 25
    assert wanted[25:] == [always.replaces(step, 100) for step in range(25, 100)]
    assert any(wanted)


def test_samples_follow_from_seed_step_and_weights(student):
    rows = text_rows(2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampler().batches(student, [rows], step=7)[0]
    assert torch.equal(torch.get_rng_state(), before)  # dropout and data of the run go on as without sampling
    torch.manual_seed(99)
    assert equal(sampler().batches(student, [rows], step=7)[0], first)
    assert not equal(sampler().batches(student, [rows], step=8)[0], first)


def test_ranks_do_not_wait_for_each_other_where_text_is_written_under_zero_3(monkeypatch):
    """As if on two ranks: without a process group any collective of transformers' loop fails."""
    from shoal.eval.harness.engine import CausalLM, Writing

    monkeypatch.setattr(utils, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(utils, "_get_torch_distributed_world_size", lambda: 2)
    model, uniforms = tiny_model("llama"), torch.rand(1, 3, generator=torch.Generator().manual_seed(0))
    assert len(sample(model, [[1, 2]], uniforms, temperature=1.0, end_ids=(), pad_id=PAD)[0]) == 3
    lm = CausalLM(model, tiny_tokenizer(), 2)
    assert len(lm._generate_with_transformers([[1, 2]], Writing(3, [], {}))[0]) == 3


def test_checkpointing_of_some_layers_stays_so_where_text_is_written() -> None:
    student: Any = tiny_model("llama")
    student.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2, offload=True)
    layers = decoder_layers(student)
    before = [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in layers]
    assert {on for on, _ in before} == {True, False}
    with checkpointing_kept(student), unwrap_model_for_generation(student, Accelerator(cpu=True)):
        assert not student.is_gradient_checkpointing
    assert [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in layers] == before


# --- loops --------------------------------------------------------------------------------------------------------

CLEAN = ([1, 2], [3, 4, 5, 257])
ONES = ([6, 7], [9, *[1] * 6])
PAIRS = ([8], [*[2, 3] * 3, 2])
THREES = ([5, 5], [7, 7, *[4, 5, 6] * 3])


def rows(*texts, length: int = 40):
    planes = lay_out(texts, sequence_length=length, pad_id=258)
    return {**planes, ON_HOST: on_host(planes)}


def test_texts_are_told_apart_and_their_loops_found():
    batch = rows([CLEAN, ONES], [PAIRS])
    assert samples_in(on_host(batch)) == [
        Sample(0, 2, CLEAN[1], None),
        Sample(0, 8, ONES[1], Loop(1, 1)),
        Sample(1, 1, PAIRS[1], Loop(0, 2)),
    ]
    (cut,) = samples_in(on_host(rows([THREES], length=9)))
    assert cut.tokens == THREES[1][:7], "what does not fit into the row does not count"
    assert cut.loop is None


def test_labels_behind_the_second_copy_are_not_learnt_and_all_others_are():
    batch = rows([CLEAN, ONES], [PAIRS])
    kept = without_repeats(batch, samples_in(on_host(batch)))
    expected = batch["labels"].clone()
    expected[0, 11:15] = IGNORED  # of 9, 1, 1, 1, 1, 1, 1 from place 8
    expected[1, 5:8] = IGNORED  # of 2, 3, 2, 3, 2, 3, 2 from place 1
    assert (batch["labels"] != expected).sum() == 4 + 3
    assert torch.equal(kept["labels"], expected)
    assert torch.equal(on_host(kept).labels_BS, expected)
    assert torch.equal(kept["input_ids"], batch["input_ids"]), "the student still reads them"
    assert not torch.equal(batch["labels"], expected), "the batch itself is left as it is"
