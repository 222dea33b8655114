"""Recipes with published settings: what they say, and a rehearsal of each with a small model of the same family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM

from shoal.artifacts.evaluation import Scores
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.recipe.prune import CutThese
from shoal.recipe.recipe import load_recipe

ANCHORS = {"anchor_qwen3_8b_drop4": ("qwen3", 36, 4), "anchor_qwen3_8b_drop8": ("qwen3", 36, 8)}
ANCHORS["anchor_llama3_1_8b_drop5"] = ("llama", 32, 5)


@pytest.mark.parametrize("name", ANCHORS)
def test_the_budget_is_the_published_one(name: str) -> None:
    recipe = load_recipe(name)
    heal, trainer = recipe.distill, recipe.distill.trainer
    assert heal.num_tokens == 100 * 4 * 4096 == 100 * (heal.batch_size or 0) * heal.sequence_length
    assert (trainer["learning_rate"], trainer["lr_scheduler_kwargs"]["min_lr"], trainer["warmup_steps"]) == (
        *(1e-4, 1e-5),
        10,
    )
    assert (heal.trainable, [loss.kind for loss in heal.losses]) == ("all", ["forward_kl"])
    prune = recipe.prune
    assert (len(prune.drop) if isinstance(prune, CutThese) else prune.num_drop) == ANCHORS[name][2]
    assert (recipe.eval.limit, recipe.eval.num_fewshot) == (None, 5), "200 items leave six points to chance"


@pytest.mark.prove
@pytest.mark.parametrize("name", ["anchor_qwen3_8b_drop8", "anchor_llama3_1_8b_drop5"])
def test_a_rehearsal_runs_from_the_cut_to_the_scores(name: str, tmp_path: Path) -> None:
    family, layers, num_drop = ANCHORS[name]
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "max_position_embeddings": 4096}
    if family == "qwen3":
        sizes |= {"layer_types": ["full_attention"] * layers}
    model = tiny_checkpoint(tmp_path, family, **sizes)
    run_dir, small = tmp_path / "run", ["num_tokens=512", "sequence_length=64", "batch_size=4"]
    here = [
        f"model={model}",
        f"run_dir={run_dir}",
        *(f"measure.{setting}" for setting in ("data=python_docs", *small)),
        *(f"distill.{setting}" for setting in ("data=python_docs", *small)),
        *("distill.deepspeed=zero0", "distill.trainer.warmup_steps=1", "track.wandb=off"),
        *("eval.tasks=[knowledge_continuation]", "eval.num_fewshot=null", "eval.limit=2", "eval.speed=false"),
        *("eval.perplexity_data=python_docs_heldout", "eval.perplexity_tokens=100"),
    ]
    for verb in ("run", "distill --dry-run"):
        words = [sys.executable, "-m", "shoal.launch.cli", *verb.split(), "--config", name, *here]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "ZeRO 3" in done.stdout
    plan, training = Plan.load(run_dir / "plan.json"), Training.load(run_dir / "distill.json")
    assert len(plan.drop) == num_drop
    rates = [row["learning_rate"] for row in training.history if "learning_rate" in row]
    assert min(rates[1:]) >= 1e-5, "no lower than the published end"
    roles = {Scores.load(run_dir / f"eval/{role}.json").role for role in ("teacher", "pruned", "distilled")}
    assert len(roles) == 3
    healed = AutoModelForCausalLM.from_pretrained(run_dir / "distilled")
    assert healed.config.num_hidden_layers == layers - num_drop
