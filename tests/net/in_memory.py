"""What `import shoal` gives for models in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import shoal

TEXTS = [f"The number {n} comes before {n + 1}, and twice {n} is {2 * n}. " * 4 for n in range(60)]
TASKS = ["retrieval_continuation", "knowledge_generation"]
CHANGES = (
    "task",
    "metric",
    "reference",
    "score",
    "change",
    "ci_low",
    "ci_high",
    "adjusted_p",
    "verdict",
    "won",
    "lost",
    "n",
)


def entries(checkpoint: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    importance = shoal.measure_importance(model, tokenizer, TEXTS, num_tokens=1024, sequence_length=64)
    plan = shoal.choose_layers(importance, num_drop=2)
    student = shoal.cut_model(model, plan)
    teacher, pruned = (shoal.evaluate(one, tokenizer, TASKS, limit=8) for one in (model, student))
    training = shoal.distill(
        student,
        model,
        TEXTS,
        tokenizer=tokenizer,
        num_tokens=1024,
        sequence_length=64,
        trainable="from_first_cut",
        precision="float32",
        losses=["forward_kl", "cross_entropy"],
    )
    healed = shoal.evaluate(student, tokenizer, TASKS, limit=8)
    named = {"teacher": teacher, "pruned": pruned, "healed": healed}
    return {
        "block_influence": list(importance.layers["block_influence"]),
        "drop": list(plan.drop),
        "losses": [row["loss"] for row in training.history if "loss" in row],
        "norm": sum(weight.double().square().sum().item() for weight in student.parameters()) ** 0.5,
        **{f"scores.{name}": [task.score for task in one.tasks] for name, one in named.items()},
        "changes.bits": [[str(row[name]) for name in CHANGES] for row in shoal.compare(teacher, healed).rows()],
    }
