"""What a training's speed is measured against: this machine's fastest matrix product."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import PruningPlan
from shoal.machine import matmul_flops_per_second, ranks_on_this_node
from shoal.models.load import load_config
from shoal.recipe.distill import Distill
from shoal.runtime import device, is_main, world_size

from .run_size import job
from .throughput import flops_per_token

log = logging.getLogger(__name__)


def peak_rate(
    teacher_dir: Path,
    student_dir: Path,
    plan: PruningPlan,
    settings: Distill,
    *,
    dtype: str,
    load: dict[str, Any],
) -> float | None:
    """Tokens per second of all ranks if every operation were as fast as a large matrix product; rank 0 alone logs it.

    None elsewhere, and for a family whose operations cannot be counted without running it. Called before the training's
    arguments exist: under ZeRO-3 they shard every model that is built after them.
    """
    if not is_main():
        return None
    trusted = load["trust_remote_code"]
    ranks = ranks_on_this_node()
    try:
        found = job(
            load_config(teacher_dir, trust_remote_code=trusted),
            load_config(student_dir, trust_remote_code=trusted),
            plan,
            settings,
            dtype=dtype,
            attention=load["attention"],
            ranks=world_size(),
            ranks_per_node=ranks,
            device=device(),
        )
    except RuntimeError as error:
        log.info("the share of the machine's peak is not told: %s", str(error).split("\n")[0])
        return None
    setting = found.setting
    flops = flops_per_token(found.student, found.teacher, setting, shared=found.shared_layers > 0)
    # ranks on one CPU share its cores
    machines = world_size() if device().type != "cpu" else max(1, world_size() // ranks)
    return machines * matmul_flops_per_second(device(), found.product_dtype) / flops
