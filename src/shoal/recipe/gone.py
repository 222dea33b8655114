"""Keys, kinds and values that recipes once knew: since when they are gone, and what to write instead."""

from __future__ import annotations

import re

GONE: dict[str, str] = {
    "attention.flex": "flash makes no masks either, and sdpa runs everywhere; leave it out",
    "distill.data.teacher": "a student has one teacher; train it in turn on runs of each",
    "distill.data_pilot": "sources share the tokens by their weights; set weight of each in distill.data",
    "distill.data_policy": "sources share the tokens by their weights; set weight of each in distill.data",
    "distill.local": "the lab has it: `shoal lab local_heal RUN_DIR`",
    "distill.lora.alpha": "say lora_alpha",
    "distill.lora.dropout": "say lora_dropout",
    "distill.lora.quantization": "say load_in_4bit: true or false",
    "distill.lora.rank": "say r",
    "distill.losses.attention_relation": "the lab has it: `shoal lab relations RUN_DIR`",
    "distill.losses.multi_scale": "the lab has it: `shoal lab relations RUN_DIR`",
    "distill.losses.value_relation": "the lab has it: `shoal lab relations RUN_DIR`",
    "distill.on_policy.horizon": "samples have at most on_policy.new_tokens tokens; set those",
    "distill.on_policy.loops": "what repeats itself is never learnt; leave it out",
    "distill.overlap": "training text is always searched for evaluation items; leave it out",
    "distill.packing.best_fit": "say bfd",
    "distill.packing.split": "say wrapped",
    "distill.teacher.server": "record by vLLM, record.backend: vllm, and set distill.teacher.recorded",
    "distill.trainable.replacement": "choose near_gaps",
    "distill.watch.best": "say metric_for_best_model",
    "distill.watch.every": "say eval_steps",
    "eval.draft": "the library that serves both models tells what its drafts are worth; leave it out",
    "eval.images": "`shoal lab vision RUN path=FILE` scores the answers of every model of a run",
    "eval.limits": "eval.limit takes single tasks too: {default: 200, gsm8k: 100}",
    "eval.samples": "lm-eval draws several texts of a prompt where a task file says `repeats`; leave it out",
    "eval.speed_batch_sizes": "name the sequences at once in eval.speed: [1, 8, 32]",
    "eval.suite": "a suite is a name in eval.tasks: [quick, hellaswag]",
    "measure.beside": "`shoal lab depth_use RUN beside=MODEL`",
    "measure.diagnostics": "`shoal lab diagnostics RUN`",
    "measure.gradient_prompts": "`shoal lab diagnostics RUN gradient_prompts=10`",
    "measure.heads": "`shoal lab heads RUN`, and `shoal lab patching RUN` for its twins",
    "measure.images": "`shoal lab vision RUN path=FILE`",
    "measure.memory_gb": "weights that memory has no room for wait on disk by themselves; leave it out",
    "measure.probes": "`shoal lab probes RUN sets='[{path: FILE}]'`",
    "measure.scale_removals": "a layer that an order has removed just hands on its input; leave it out",
    "measure.sweep.donor": "`shoal lab sweeps RUN operators=[donor] donor=MODEL`",
    "measure.sweep.donor_revision": "`shoal lab sweeps RUN operators=[donor] donor=MODEL donor_revision=...`",
    "measure.sweep.greedy_weights": "all tasks of the order count the same; leave it out",
    "measure.sweep.limits": "measure.sweep.limit takes single tasks too: {default: 100, gsm8k: 50}",
    "measure.sweep.max_removed": "`shoal lab sweeps RUN operators=[cumulative] max_removed=...`",
    "measure.sweep.operators.cumulative": "`shoal lab sweeps RUN operators=[cumulative]`",
    "measure.sweep.operators.donor": "`shoal lab sweeps RUN operators=[donor] donor=MODEL`",
    "measure.sweep.operators.head": "`shoal lab sweeps RUN operators=[head]`",
    "measure.sweep.operators.kv_group": "`shoal lab sweeps RUN operators=[kv_group]`",
    "measure.sweep.operators.skip_prompt": "`shoal lab reading RUN`",
    "measure.sweep.operators.skip_written": "`shoal lab reading RUN`",
    "measure.sweep.order": "`shoal lab sweeps RUN operators=[cumulative] order=...`",
    "measure.sweep.spare_heads": "sweeps of heads are `shoal lab sweeps RUN operators=[head]`",
    "measure.vision_states": "`shoal lab vision RUN path=FILE`",
    "prune.compensate.memory_gb": "what makes up for layers is fitted with the model in memory; leave it out",
    "prune.edits": "`shoal lab merge RUN_DIR layers=[4,5,6]` writes plan.json and student/; `shoal distill` heals it",
    "prune.mtp": "modules that guess further tokens are always left out; leave it out",
    "prune.proof": "a student is run wherever it fits and can run, else proven by its files; leave it out",
    "prune.protect_heads": "`shoal lab heads RUN` prints the layers to name in prune.protect",
    "prune.rounds": "cut once; to cut again, start a run from RUN_DIR/distilled (model: RUN_DIR/distilled)",
    "prune.target.ms_per_token": "set prune.target.speedup, a factor over the teacher",
    "prune.targets": "what llama.cpp would misread is always told, and refused with export.gguf; leave it out",
    "prune.vision_tower": "the tower stays whole; leave it out",
    "prune.width.memory_gb": "width is chosen with the model in memory; leave it out",
    "quantize": "make a copy with its own library, and score it: `shoal compare RUN COPY` (docs/quantize.md)",
    "record.check": "what vLLM says is always compared with transformers; leave it out",
    "record.server": "set record.backend: vllm, which runs the teacher in this process",
    "record.teacher": "a student has one teacher; leave it out",
    "search": "several runs and their comparison: `shoal run RECIPE --each prune.metric=a,b --each seed=0,1`",
    "track.name": "a W&B run has the name of its run directory, or WANDB_NAME",
    "track.upload_weights": "push the checkpoint to the Hub by export.hub_repo",
}
"""Key without positions in lists (`distill.data.teacher`), kind (`distill.losses.value_relation`) or value
(`distill.trainable.replacement`) -> the end of the sentence `KEY: gone since 0.1; ...`, one line each, sorted."""


def gone(place: str) -> str | None:
    """What is said of ``place``, a key, kind or value of an older recipe; None = it never was one."""
    words = GONE.get(re.sub(r"\.\d+(?=\.|$)", "", place))
    return None if words is None else f"gone since 0.1; {words}"
