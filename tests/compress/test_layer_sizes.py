"""What layers are said to take is what the student written without them takes, by its files and by its modules."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import torch
from tiny import tiny_checkpoint

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.compress.apply import apply_plan
from shoal.compress.layer_sizes import LayerSizes, layer_sizes
from shoal.models.checkpoint_files import read_shards
from shoal.models.load import load_model

DROP = (1, 3)
UNLIKE = ("deepseek_v3", "qwen3_next", "nemotron_h", "jamba", "lfm2_moe")
"""Families whose layers differ: a dense first layer, experts, linear attention, state spaces, layers without cache."""


def written(teacher: Path, out: Path, num_layers: int, drop: tuple[int, ...] = DROP) -> int:
    """Bytes of the tensors in the files of a student without these layers."""
    apply_plan(teacher, PruningPlan(Provenance({}), num_layers, drop, "named by the test"), out)
    return sum(tensor.end - tensor.start for shard in read_shards(out) for tensor in shard.tensors.values())


def left(sizes: LayerSizes, layers: tuple[int, ...], whole: int) -> int:
    return whole - sum(layers[layer] for layer in DROP)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNLIKE)
def test_sizes_of_unlike_layers_are_those_of_the_students_files(family: str, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    architectures.tiny_model(family).save_pretrained(teacher)
    sizes = layer_sizes(teacher)
    num_bytes = written(teacher, tmp_path / "student", sizes.num_layers)
    student = layer_sizes(tmp_path / "student")
    assert len(set(sizes.layer_parameters)) > 1
    keep = [layer for layer in range(sizes.num_layers) if layer not in DROP]
    assert sizes.stored.of(keep) == num_bytes
    assert left(sizes, sizes.layer_parameters, sizes.cost.num_parameters) == student.cost.num_parameters
    for batch_size, num_tokens in ((1, 20), (3, 60)):
        read = tuple(sizes.layer_read(layer, batch_size, num_tokens) for layer in range(sizes.num_layers))
        assert left(sizes, read, sizes.read(batch_size, num_tokens)) == student.read(batch_size, num_tokens)
        cache = tuple(batch_size * sizes.layer_cache(layer, num_tokens) for layer in range(sizes.num_layers))
        assert left(sizes, cache, sizes.cache(batch_size, num_tokens)) == student.cache(batch_size, num_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
def test_sizes_are_those_of_the_loaded_student(family: str, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    sizes = layer_sizes(teacher)
    num_bytes = written(teacher, tmp_path / "student", sizes.num_layers)
    parameters = sum(parameter.numel() for parameter in load_model(tmp_path / "student").parameters())
    assert left(sizes, sizes.layer_parameters, sizes.cost.num_parameters) == parameters
    keep = [layer for layer in range(sizes.num_layers) if layer not in DROP]
    assert (sizes.stored.of(keep), num_bytes) == (2 * parameters, 2 * parameters)
