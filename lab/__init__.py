"""The lab: what a paper needs and a pruner does not. It may be deleted without a trace in the rest: no room, no module
of the ground and no verb imports it; `shoal lab NAME RUN_DIR` finds a part by its name.

A part is a module or a folder with `Settings`, a section of keys, and `work`, a function of a run and these settings
that returns what is to be printed. What it writes goes to lab/ in the run directory.

    command      `shoal lab`: the parts, and what runs one
    delta        how far a donor's layers are from the model's
    depth_use    what models that descend from each other use their layers for
    diagnostics  who writes, erases and decides along the depth
    disputed     questions that people answer in different ways
    edits        what parts that change layers share
    grow         new layers between others
    heads        which heads copy what is asked for
    local_heal   gaps healed on hidden states before the student is trained
    merge        neighbours into one
    patching     through which states the answer reaches the last token
    probes       where a concept can be read off
    reading      reading against writing
    relations    losses on attention, values and pooled states
    replace      one trained layer for a run
    results      results of parts: made once, in lab/ of the run directory
    samples      drawn texts, pass@k, answers demoted or gone
    skip         attention, MLP or heads silent for good
    swap         a donor's layers
    sweeps       tasks without heads, with ever fewer layers, with a donor's layers
    training     the recipe's training, but for what a part changes
    vision       layers, states of the tower and models over rows of images
"""
