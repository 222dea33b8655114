"""The verbs of the command, each in its run directory.

run       one recipe in its run directory: precision, done, stale, locked
memory    what a run directory remembers of recipe and overrides
measure   measure
prune     prune
distill   record, distill
overlap   evaluation items and wording of twins in text that a student learns from
search    search
evaluate   eval
depth     depth
report     report
export     quantize; GGUF files, the Hub
preflight  what is refused before a stage begins
pipeline   all in order
dry_run    what all in order would do, how long, how much disk
launch     distill under the DeepSpeed launcher
"""
