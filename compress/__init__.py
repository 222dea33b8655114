"""Measure what layers are worth, choose which go, and write the student that is proven to be the teacher without them.

Measuring and choosing: measure, metrics, plan; dry_run tells what a plan would do, by cost and targets (vllm_rules,
llama_cpp_rules). shoal delta: delta.

Judging by tasks: sweep_table turns scores per item into tables with intervals (resampling, written_text), atlas draws
together what follows for layers (agreement), columns finds scores by name, sacrifice tells what a plan costs.

Cutting: apply writes the student of a plan. In memory: surgery, whose configuration comes from config_cut and
special_cuts. By copying stored bytes: stored_names (which tensors), quantised (settings that name layers), shards (the
copy), staging (a folder that is complete or absent). Either way: proof.

Editing: edit carries out a plan's edits. Reversible: operators, swapping. For good: zeroing, merging, replacement.
sublayers knows where a layer keeps its attention, MLP and heads.

Export: gguf_export.
"""
