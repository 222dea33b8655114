"""The verbs of the command, each in its run directory.

run       one recipe in its run directory: precision, done, stale, locked
measure   measure
prune     which layers go, prune, what no measurement could make possible
distill   record, distill
overlap   evaluation items in text that a student learns from
launch    a stage in ranks, under the DeepSpeed launcher or forked
evaluate  eval
report    report, and what the recipe exports: GGUF files, the Hub
pipeline  run: all in order
pace      how long the stages of a run take
dry_run   what a verb would do, how long, how much disk
results   what a verb has made, to be printed
doctor    what machines have for a training
several   compare, and a run for every combination of values
"""
