"""Measure what layers are worth, choose which go, and write the student that is proven to be the teacher without them.

    measure      every asked metric, pass by pass
    plan         the choice
    free_layers  what of it needs no score, and what prune.target asks
    layer_sizes  what every layer takes of files, memory and time
    estimate     what a cut would make, for a reader
    apply        writes the student of a plan
    gguf         the student as a file for llama.cpp, and what llama.cpp would take it for

Folders:

    changes   changes of layers that stay: compensation without training, width
    edits     changes of layers besides dropping them
    metrics   scores of layers from plain text
    surgery   the student in memory and on disk, proven to be the teacher without the dropped layers
    sweeps    variants scored on tasks, and what follows from it
    variants  many edits of one model, what they share computed once
"""
