"""An arm of benchmarks/recovery.py: TRL's trainer, forward KL of whole distributions, on the rows of a recipe.

    python -m benchmarks.recovery_trl RECIPE

The student lies in the run directory, where shoal would train it; training goes on from the last checkpoint. TRL trains
all weights, and does not keep documents of a row apart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.distillation_config import DistillationConfig

from benchmarks.gpu_work import OnRows
from shoal.artifacts.artifact import Provenance
from shoal.artifacts.training import Training
from shoal.atomic_files import written_folder
from shoal.data.streams import pack
from shoal.machine import fast_dtype, peak_memory
from shoal.models.load import load_model, load_tokenizer
from shoal.models.resolve import resolve_model
from shoal.recipe.recipe import load_recipe


def main(file: str) -> None:
    recipe = load_recipe(file)
    run_dir, asked, folder = Path(recipe.run_dir), recipe.distill, resolve_model(recipe.model)
    tokenizer, sources = load_tokenizer(folder), [(source, None) for source in asked.data]
    rows = pack(sources, tokenizer, sequence_length=512, num_tokens=asked.budget, seed=recipe.seed)
    fast = fast_dtype(torch.device("cpu")).dtype  # of the teacher, and of the student's products
    student, teacher = load_model(run_dir / "student"), load_model(folder, dtype=fast).requires_grad_(False)
    (checkpoints := run_dir / "trl").mkdir(exist_ok=True)
    loss = {"beta": 0.0, "temperature": 1.0, "gradient_checkpointing": False}
    order = {"num_train_epochs": 1, "seed": recipe.seed, "shuffle_dataset": False}
    order |= {"train_sampling_strategy": "sequential", "use_cpu": True, "bf16": fast == "bfloat16"}
    told = {"output_dir": str(checkpoints), "logging_steps": 1, "report_to": [], "disable_tqdm": True}
    config = DistillationConfig(**asked.trainer, **loss, **order, **told)
    data = Dataset.from_dict({"prompt": rows.input_ids_NS.tolist()})
    trainer = OnRows(student, teacher, config, train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints))
    with written_folder(run_dir / "distilled") as unfinished:
        student.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    *history, end = [{key: float(value) for key, value in row.items()} for row in trainer.state.log_history]
    steps, tokens = trainer.state.global_step, rows.input_ids_NS.numel()
    rest = {"settings": {}, "data": {"sources": rows.counts}, "peak_memory_bytes": peak_memory()}
    made = Training(Provenance({}), steps, tokens, end["train_runtime"], tuple(history), **rest)
    made.save(run_dir / Training.FILE)


if __name__ == "__main__":
    main(sys.argv[1])
