"""A recipe of before is written in the words of now, and what cannot be is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from yaml import safe_load

from shoal.launch.upgrade import main
from shoal.recipe.recipe import parse_recipe

OLD = """
model: demo:smollm2-135m
dtype: auto
attention: sdpa
prune: {weights: {taylor: 1, sleb: 2}, num_drop: 3, rounds: 2}
distill:
  lora: {rank: 8, quantization: nf4}
  packing: best_fit
  weights: bfloat16
  deepspeed: deepspeed/zero3.json
  compile: true
  watch: {every: 50}
  trainer: {learning_rate: 1e-3}
eval: {suite: quick, limits: {gsm8k: 10}}
"""
NEW = {
    "model": "demo:smollm2-135m",
    "dtype": "fast",
    "attn_implementation": "sdpa",
    "prune": {"metric": {"taylor": 1, "sleb": 2}, "num_drop": 3},
    "distill": {
        "lora": {"r": 8, "load_in_4bit": True},
        "packing": "bfd",
        "precision": "bf16-true",
        "deepspeed": "zero3",
        "trainer": {"torch_compile": True, "learning_rate": 1e-3},
        "watch": {"eval_steps": 50},
    },
    "eval": {"tasks": "quick"},
}


def test_words_are_replaced_and_what_is_more_than_a_word_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(OLD)
    assert main([str(file)]) == 1
    out, err = capsys.readouterr()
    assert safe_load(out) == NEW
    told = [line.partition(": removed in 0.1; ")[0] for line in err.splitlines()]
    assert told == ["prune.rounds", "eval.limits"]
    parse_recipe(safe_load(out))


def test_a_recipe_of_now_stays_and_no_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new.yaml"
    file.write_text("model: demo:smollm2-135m\nprune: {num_drop: 3}\n")
    assert main([str(file)]) == 0
    assert safe_load(capsys.readouterr().out) == {"model": "demo:smollm2-135m", "prune": {"num_drop": 3}}
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "name one recipe file" in capsys.readouterr().err
