"""The lab: what a paper needs and a pruner does not. It may be deleted without a trace in the rest: no room, no module
of the ground and no verb imports it; `shoal lab NAME RUN_DIR` finds a part by its name.

A part is a module with `work`, a function of a run and of the part's settings that returns what is to be printed. What
it writes goes to lab/ in the run directory.

    command      `shoal lab`: the parts, and what runs one
    settings     keys of every part
    part         what parts share: a result that is made once
    depth_use    what models that descend from each other use their layers for
    diagnostics  who writes, erases and decides along the depth
    donor        layers of another model in the place of the model's own
    heads        which heads copy what is asked for
    patching     through which states the answer reaches the last token
    reading      reading against writing
    sweeps       tasks without heads, with ever fewer layers, with a donor's layers

Folders:

    attention  what is seen of attention, and prompts for it
    depth      what is seen and changed along the depth
"""
