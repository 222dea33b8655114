"""TRL's trainers on rows that are given: what shoal's steps are measured beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from shoal.data.packing import PackedRows


def gkd(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: PackedRows,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
) -> Trainer:
    """GKDTrainer with lmbda 0 and beta 0, which is forward KL on the data as it is. It hands no position_ids on and so
    knows no borders within a row."""

    def with_mask(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        planes = {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}
        return {**planes, "attention_mask": torch.ones_like(planes["input_ids"])}

    length = rows.input_ids_NS.shape[1]
    data = {"input_ids": rows.input_ids_NS.numpy(), "labels": rows.labels_NS.numpy()}
    return GKDTrainer(
        student,
        teacher,
        GKDConfig(**settings, lmbda=0.0, beta=0.0, temperature=1.0, max_length=length),
        data_collator=with_mask,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
    )


def distillation(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: PackedRows,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
) -> Trainer:
    """DistillationTrainer with beta 0, forward KL. It learns from what the student writes; here it is handed the rows
    as if the student had written all but their first token, so that no writing is in its time."""

    class OnRows(DistillationTrainer):
        def _generate(self, prompts: list[list[int]]) -> Any:
            return [row[:1] for row in prompts], [row[1:] for row in prompts], None, None, []

    return OnRows(
        student,
        teacher,
        DistillationConfig(**settings, beta=0.0, temperature=1.0, shuffle_dataset=False),
        train_dataset=Dataset.from_dict({"prompt": rows.input_ids_NS.tolist()}),
        processing_class=tokenizer,
    )
