"""What users of lm_eval, trl and axolotl type by habit is understood, or answered with the word that it is here."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.launch.arguments import parse
from shoal.recipe.recipe import apply_override, parse_recipe

LM_EVAL = {
    "eval Qwen/Qwen3-0.6B --tasks hellaswag,arc_easy --limit 200": "",
    "eval Qwen/Qwen3-0.6B --tasks gsm8k --num_fewshot 5 --seed 1": "",
    "eval --model Qwen/Qwen3-0.6B --tasks hellaswag --include_path tasks": "",
    "eval --model hf --model_args pretrained=Qwen/Qwen3-0.6B --tasks hellaswag": "here it is model",
    "eval Qwen/Qwen3-0.6B --tasks hellaswag -L 200": "`shoal eval --limit VALUE`",
    "eval Qwen/Qwen3-0.6B -t hellaswag": "`shoal eval --tasks VALUE`",
    "eval Qwen/Qwen3-0.6B --tasks gsm8k -f 5": "`shoal eval --num_fewshot VALUE`",
    "eval Qwen/Qwen3-0.6B --tasks hellaswag --output_path out": "here it is run_dir",
    "evaluate Qwen/Qwen3-0.6B --tasks hellaswag": "did you mean `shoal eval`?",
    "ls tasks": "did you mean 'list'?",
}
TRL = {
    "distill Qwen/Qwen3-0.6B --num-drop 4 --trainer.learning_rate 1e-4": "",
    "distill Qwen/Qwen3-0.6B --learning_rate 1e-4": "here it is distill.trainer.learning_rate",
    "distill --model_name_or_path Qwen/Qwen3-0.6B": "here it is model",
    "distill Qwen/Qwen3-0.6B --dataset_name me/chat": "here it is distill.data",
    "distill Qwen/Qwen3-0.6B --max_length 1024": "here it is distill.sequence_length",
    "distill Qwen/Qwen3-0.6B --use_peft --lora_r 16": "here it is distill.lora",
    "distill Qwen/Qwen3-0.6B --lmbda 0.5": "here it is distill.on_policy.share",
    "distill Qwen/Qwen3-0.6B --per_device_train_batch_size 4": "here it is distill.trainer.per_device_train_batch_size",
    "distill Qwen/Qwen3-0.6B --report_to wandb": "here it is track.wandb",
    "gkd --model_name_or_path Qwen/Qwen3-0.6B": "did you mean `shoal distill`?",
}
AXOLOTL = {
    "distill quickstart --trainer.learning-rate 1e-4 --lora.r 8": "",
    "run quickstart --num-processes 8": "",
    "train config.yml": "did you mean `shoal distill`?",
    "distill config.yml --learning-rate 1e-4": "here it is distill.trainer.learning_rate",
    "distill --base-model Qwen/Qwen3-0.6B": "here it is model",
    "distill config.yml --sequence-len 2048": "did you mean 'sequence_length'?",
    "distill config.yml --micro-batch-size 2": "here it is distill.trainer.per_device_train_batch_size",
    "distill config.yml --num-epochs 3": "here it is distill.num_tokens",
    "distill config.yml --adapter lora": "here it is distill.lora",
    "distill config.yml --wandb-project mine": "here it is track.project",
}


@pytest.mark.parametrize(("line", "answer"), [*LM_EVAL.items(), *TRL.items(), *AXOLOTL.items()])
def test_a_line_of_another_tool_is_run_or_answered(capsys: pytest.CaptureFixture[str], line: str, answer: str) -> None:
    if answer:
        with pytest.raises(SystemExit) as ended:
            parse(line.split())
        assert ended.value.code == 2
        assert answer in capsys.readouterr().err
        return
    raw: dict[str, Any] = {"model": "m"}
    known = parse(line.split())
    for override in known.words:
        apply_override(raw, override)
    parse_recipe(raw)
    assert known.config in line
