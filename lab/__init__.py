"""The lab: what a paper needs and a pruner does not. It may be deleted without a trace in the rest: no room, no module
of the ground and no verb imports it; `shoal lab NAME RUN_DIR` finds a part by its name.

A part is a module or a folder with `Settings`, a section of keys, and `work`, a function of a run and these settings
that returns what is to be printed. What it writes goes to lab/ in the run directory.

    samples     drawn texts, pass@k, answers demoted or gone
    command     `shoal lab`: the parts, and what runs one
    local_heal  gaps healed on hidden states before the student is trained
    relations   losses on attention, values and pooled states
    training    the recipe's training, but for what a part changes
"""
