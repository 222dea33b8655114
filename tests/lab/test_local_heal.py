"""Healing gap by gap on hidden states: which layers learn what, by how much, and a training that starts from there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment, run_ranks
from tiny import NUM_LAYERS, tiny_model
from torch import Tensor, nn
from training_runs import Trial, finished, prepare
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.lab.local_heal import Gap, Settings, gaps, heal_gaps, warmup_cosine
from shoal.models.anatomy import decoder_layers


def plan(keep: tuple[int, ...]) -> Plan:
    drop = tuple(layer for layer in range(NUM_LAYERS) if layer not in keep)
    return Plan(Provenance({}), num_layers=NUM_LAYERS, drop=drop, reason="")


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ((0, 1, 4, 5), [Gap(1, 3)]),
        ((0, 2, 4), [Gap(0, 1), Gap(1, 3), Gap(2, 5)]),
        ((0, 1, 2, 3), [Gap(3, 5)]),
        ((2, 3, 5), [Gap(0, 2), Gap(1, 4)]),
        ((2, 5), [Gap(0, 4)]),  # one layer on both sides of a gap learns what is asked of it last
        ((5,), [Gap(0, 5)]),
        ((0, 1, 2, 3, 4, 5), []),
    ],
)
def test_the_layer_before_every_gap_learns_the_state_behind_it(keep, expected):
    assert gaps(plan(keep)) == tuple(expected)


def models(keep: tuple[int, ...]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student without some of the teacher's layers, and the teacher."""
    teacher = tiny_model("llama").requires_grad_(False)
    student: Any = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(student.model.layers[layer] for layer in keep)
    student.config.num_hidden_layers = len(keep)
    return student, teacher


def text(num_rows: int = 64, length: int = 24) -> PackedRows:
    """Rows of two documents each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (num_rows, length), generator=generator, dtype=torch.int32)
    positions = torch.cat([torch.arange(10), torch.arange(length - 10)]).int().expand(num_rows, -1)
    return PackedRows(ids, positions.contiguous())


def settings(**changes: Any) -> Settings:
    return Settings(**{"num_tokens": 16 * 4 * 24, "batch_size": 4, "rows_at_once": 2, "learning_rate": 3e-3, **changes})


@pytest.mark.prove
@pytest.mark.parametrize("scale", [1.0, 1.25], ids=["plain", "compensated"])
def test_the_error_is_that_of_the_definition_and_falls_and_nothing_but_the_layers_before_gaps_moves(scale):
    student, teacher = models((0, 2, 3))
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    expected = error_of_the_first_step(student, teacher, {0: 1, 2: 5}, scale)
    places = [Gap(0, 1, scale), Gap(2, 5, scale)]
    errors = heal_gaps(student, teacher, text(), settings(), places, autocast=False)
    assert [first for first, _ in errors] == pytest.approx([expected[layer] for layer in (0, 2)], rel=1e-5)
    assert all(last < 0.9 * first for first, last in errors)
    moved = {name for name, weight in student.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[2] for name in moved} == {"0", "2"}
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(student))


def error_of_the_first_step(
    student: PreTrainedModel, teacher: PreTrainedModel, targets: dict[int, int], scale: float
) -> dict[int, float]:
    """In float64: the mean over all tokens but those whose next one is not learnt and every document's first."""
    rows = text()
    counted = torch.ones(4, 24, dtype=torch.bool)
    counted[:, [0, 9, 10, 23]] = False

    def states(model: PreTrainedModel, layer: int) -> Tensor:
        kept = []
        exact = copy.deepcopy(model).double()
        decoder_layers(exact)[layer].register_forward_hook(lambda *seen: kept.append(seen[-1]))
        with torch.no_grad():
            ids, positions = rows.input_ids_NS[:4].long(), rows.position_ids_NS[:4].long()
            exact(input_ids=ids, position_ids=positions, use_cache=False)
        return kept[0][counted]

    pairs = {layer: (states(student, layer), states(teacher, target)) for layer, target in targets.items()}
    return {
        layer: ((scale * ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().mean().item()
        for layer, (ours, theirs) in pairs.items()
    }


def test_what_cannot_be_healed_is_refused():
    student, teacher = models((0, 1, 4, 5))
    with pytest.raises(UserError, match="this plan leaves no gap between layers"):
        heal_gaps(student, teacher, text(), settings(), [], autocast=False)
    with pytest.raises(UserError, match=r"batch_size: 65 rows are more than the 64 that there are; lower it"):
        heal_gaps(student, teacher, text(), settings(batch_size=65), [Gap(1, 3)], autocast=False)
    decoder_layers(teacher)[3].get_parameter("mlp.down_proj.weight").fill_(torch.nan)
    with pytest.raises(UserError, match=r"step 1: the states are not finite any more; lower learning_rate"):
        heal_gaps(student, teacher, text(), settings(), [Gap(1, 3)], autocast=False)


@pytest.mark.prove
def test_training_starts_from_the_healed_student(tmp_path: Path, teacher: Path) -> None:
    prepare(tmp_path, teacher)
    words = ["lab", "local_heal", str(tmp_path / "recipe.yaml"), "batch_size=4", "num_tokens=2000"]
    finished(Trial(tmp_path, run_ranks(words, ranks=1, env=environment(), cwd=tmp_path)))
    training = Training.load(tmp_path / "run" / "lab" / "local_heal" / Training.FILE)
    assert training.provenance.inputs["lab.local_heal"]["num_tokens"] == 2000
    healed, cut = (Trial(tmp_path / "recipe.yaml").weights(name) for name in ("lab/local_heal/student", "student"))
    moved = {name.split(".")[2] for name, weight in healed.items() if not torch.equal(weight, cut[name])}
    assert moved == {"1"}, "the layer before the gap"


def test_the_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    rates = [warmup_cosine(step, 100, final=0.25) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[52] == pytest.approx(0.625, abs=0.01)
    assert rates[99] == pytest.approx(0.25, abs=1e-3)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert warmup_cosine(0, 1, final=0.25) == 1
