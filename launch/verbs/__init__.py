"""The verbs of the command, each in its run directory. shoal.launch.workflows has what takes several of them.

run             one recipe in its run directory: precision, done, stale, locked
memory          what a run directory remembers of recipe and overrides
measure         measure
measure_checks  what measuring refuses before a weight is loaded
prune           prune
plan            which layers go, and what that follows from
plan_checks     what pruning refuses before a model is loaded
distill         record, distill
overlap         evaluation items in text that a student learns from
launch          distill under the DeepSpeed launcher
evaluate        eval
report          report
export          GGUF files, the Hub
"""
