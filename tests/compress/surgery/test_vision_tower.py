"""Blocks of a vision tower that nothing reads: the student without them answers as before, bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CLIP, PIXTRAL, SIGLIP, tiny_config, tiny_model
from exactness import outputs
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.compress.apply import apply_plan
from shoal.compress.dry_run import estimate
from shoal.compress.layer_sizes import layer_sizes
from shoal.compress.surgery.cut_model import skipped
from shoal.compress.surgery.proof import behaviour, prove_by_run
from shoal.compress.surgery.vision_tower import blocks_read, without_unread_blocks
from shoal.errors import UserError
from shoal.models.checkpoint_files import read_shards
from shoal.models.load import align_weights, load_model, num_parameters

BLOCKS = 4


def tower(kind: dict[str, Any]) -> dict[str, Any]:
    return {**kind, "num_hidden_layers": BLOCKS}


def teacher_in(folder: Path, name: str, **settings: Any) -> PreTrainedModel:
    teacher = tiny_model(name, **settings)
    teacher.save_pretrained(folder, max_shard_size="40KB")
    return teacher


def plan_of(model: PreTrainedModel, drop: tuple[int, ...] = ()) -> PruningPlan:
    blocks = blocks_read(model.config)
    return PruningPlan(Provenance({}), 6, drop, "as the test wants", vision_blocks=blocks)


@pytest.mark.parametrize(
    ("name", "kind", "entries", "blocks", "rewritten"),
    [
        ("llava", CLIP, -2, 3, 3),
        ("llava", SIGLIP, [-3, 1], 2, [2, 1]),
        ("llava_next", CLIP, -2, 3, 3),
        ("llava_onevision", SIGLIP, 1, 1, 1),
        ("vipllava", CLIP, [-2, 0, 2], 3, [3, 0, 2]),
    ],
)
def test_blocks_above_the_deepest_state_that_is_read_go_without_a_trace(
    name: str, kind: dict[str, Any], entries: Any, blocks: int, rewritten: Any, tmp_path: Path
) -> None:
    teacher = teacher_in(tmp_path / "teacher", name, vision_feature_layer=entries, vision_config=tower(kind))
    plan, drop = plan_of(teacher, (3,)), (3,)
    assert plan.vision_blocks == blocks
    apply_plan(tmp_path / "teacher", plan, tmp_path / "student", proof="files")
    settings = json.loads((tmp_path / "student/config.json").read_text())
    assert settings["vision_config"]["num_hidden_layers"] == blocks
    assert settings["vision_feature_layer"] == rewritten
    student = load_model(tmp_path / "student")
    align_weights(student)
    with skipped(teacher, drop):
        outputs(name, student).assert_equal(outputs(name, teacher))
    names = [name for shard in read_shards(tmp_path / "student") for name in shard.tensors if "vision" in name]
    assert {int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))} == {*range(blocks)}
    estimated = estimate(tmp_path / "teacher", plan, tmp_path / "out")[1]
    assert estimated == sum(
        place.end - place.start for shard in read_shards(tmp_path / "student") for place in shard.tensors.values()
    )
    sizes = layer_sizes(tmp_path / "teacher", vision_blocks=blocks)
    assert sizes.stored.of(plan.keep) == estimated
    assert sizes.cost.num_parameters - sizes.layer_parameters[3] == num_parameters(student)


def test_the_tower_alone_can_go(tmp_path: Path) -> None:
    teacher = teacher_in(tmp_path / "teacher", "llava", vision_config=tower(CLIP))
    plan = plan_of(teacher)
    assert plan.in_words() == "ending the vision tower with block 2"
    assert plan.sealed("") != PruningPlan(Provenance({}), 6, (), "").sealed("")
    apply_plan(tmp_path / "teacher", plan, tmp_path / "student", proof="run")
    outputs("llava", load_model(tmp_path / "student")).assert_equal(outputs("llava", teacher))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llava", {"vision_feature_layer": -1}),
        ("llava", {"vision_feature_layer": [0, BLOCKS]}),
        ("llava", {"vision_config": tower(PIXTRAL)}),
        ("qwen2_vl", {"vision_config": {"depth": BLOCKS}}),
    ],
)
def test_nothing_goes_where_the_last_state_is_read_or_the_tower_is_not_known(
    name: str, settings: dict[str, Any]
) -> None:
    config = tiny_config(name, **{"vision_config": tower(CLIP), **settings})
    assert blocks_read(config) is None
    assert without_unread_blocks(config).to_dict() == config.to_dict()


def test_a_state_that_is_not_there_is_refused() -> None:
    config = tiny_config("llava", vision_feature_layer=[2, -BLOCKS - 2], vision_config=tower(CLIP))
    with pytest.raises(UserError, match=rf"vision_feature_layer: {-BLOCKS - 2} is no state of a vision tower of 4"):
        blocks_read(config)


def test_a_block_too_many_is_seen_in_the_saved_student(tmp_path: Path) -> None:
    teacher = teacher_in(tmp_path, "llava", vision_config=tower(CLIP))
    expected = behaviour(teacher)
    prove_by_run(tmp_path, expected, reference="the teacher")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "vision_feature_layer": 2}))
    with pytest.raises(UserError, match="vision tower gives other states of an image"):
        prove_by_run(tmp_path, expected, reference="the teacher")
    assert torch.isfinite(expected.image[0]).all()
