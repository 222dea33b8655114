"""The verbs of the command, each in its run directory.

run       one recipe in its run directory: precision, done, stale, locked
measure   measure
prune     prune
distill   record, distill
search    search
pipeline  eval, report, export, and all in order
"""
