"""The lab: what a paper needs and a pruner does not. It may be deleted without a trace in the rest: no room, no module
of the ground and no verb imports it; `shoal lab NAME RUN_DIR` finds a part by its name.

A part is a module or a folder with `Settings`, a section of keys, and `work`, a function of a run and these settings
that returns what is to be printed. What it writes goes to lab/ in the run directory.

    command   `shoal lab`: the parts, and what runs one
    samples   drawn texts, pass@k, answers demoted or gone
"""
