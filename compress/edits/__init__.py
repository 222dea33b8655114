"""What sweeps and metrics take out of layers while a block runs, and tensors of layers.

layer_edits  the table of what can be taken out of a layer, and hooks that do it
sublayers    where a layer keeps its attention, MLP and heads
tensors      tensors of single layers, put in
"""
