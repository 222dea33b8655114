"""What a live teacher is asked, and what it is not."""

from typing import Any

import pytest
import torch
from architectures import tiny_model
from torch import nn

from shoal.data.packing import IGNORED, ROW, SOURCES
from shoal.models.anatomy import decoder_layers
from shoal.recipe.losses import CrossEntropy, ForwardKL
from shoal.train.objective.host_batch import ON_HOST, on_host
from shoal.train.objective.objective import Objective, SharedPrefix, to_logits
from shoal.train.teacher.signals import LiveTeacher

VOCAB_SIZE = 272
CUT = 1
TERMS = (ForwardKL(weight=0.7), CrossEntropy(weight=0.3))
BY_SOURCE = (frozenset({1}), frozenset({0, 2}))
"""Of three sources the second has the first term, which asks the teacher."""
ASKED = frozenset({1})
FAMILIES = ["llama", "gemma3_text", "bloom", "gpt_oss", "qwen3_moe", "deepseek_v32", "glm_moe_dsa", "mamba2"]


def batch(*sources: int) -> dict[str, Any]:
    """A row of two documents for every source, with what the host knows of it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE, (len(sources), 12), generator=generator)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).repeat(len(sources), 1)
    planes = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORED)}
    sources_BS = torch.tensor(sources)[:, None].expand_as(ids)
    return {**planes, ON_HOST: on_host({**planes, SOURCES: sources_BS, ROW: torch.arange(len(sources))})}


def rows_read(layer: nn.Module, seen: list[int]) -> None:
    """Have the numbers of rows that ``layer`` is called on put into ``seen``."""

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    layer.register_forward_pre_hook(keep, with_kwargs=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_ask_nothing_end_at_the_cut_and_loss_and_gradients_stay(family: str) -> None:
    teacher = tiny_model(family, vocab_size=VOCAB_SIZE)
    below, above = list[int](), list[int]()
    rows_read(decoder_layers(teacher)[0], below)
    rows_read(decoder_layers(teacher)[CUT], above)
    results = []
    for asked in (None, ASKED):
        student = tiny_model(family, vocab_size=VOCAB_SIZE)
        with torch.no_grad():
            for parameter in (p for layer in decoder_layers(student)[CUT:] for p in layer.parameters()):
                parameter.add_(0.05)
        student.requires_grad_(False)
        for layer in decoder_layers(student)[CUT:]:
            layer.requires_grad_(True)
        objective = Objective(student, to_logits(teacher), terms=TERMS, chunk=5, sources=BY_SOURCE)
        prefix = SharedPrefix(student, teacher, first_change=CUT)
        live = LiveTeacher(teacher, reads_logits=True, states=None, prefix=prefix, asked=asked)
        live(batch(1, 1))  # of a micro-batch that no student has gone on from
        below.clear()
        above.clear()
        rows = batch(0, 1, 2, 1)
        signals = live(rows)
        objective.install()
        with prefix.replaying(torch.float32):
            loss, sums = student(**rows, signals=signals)
        loss.backward()
        objective.uninstall()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        results.append((loss.detach(), sums, gradients))
        assert (below, above) == (([4], [4]) if asked is None else ([2, 2], [2]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert any(gradient.any() for gradient in results[0][2].values())


def test_the_teachers_head_gives_logits_of_the_tokens_that_a_term_asks_for_alone() -> None:
    student, teacher = (tiny_model("llama", seed=seed, vocab_size=VOCAB_SIZE) for seed in (1, 2))
    seen = list[int]()
    logits = to_logits(teacher)

    def counted(hidden_ND: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_ND))
        return logits(hidden_ND)

    rows = batch(0, 1, 2)
    signals = LiveTeacher(teacher, reads_logits=True, states=None, prefix=None)(rows)
    objective = Objective(student, counted, terms=TERMS, chunk=4, sources=BY_SOURCE)
    objective.install()
    student(**rows, signals=signals)
    objective.uninstall()
    assert sum(seen) == 10, "a row has ten learnt tokens"
