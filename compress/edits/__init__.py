"""Changes of layers besides dropping them.

apply        carries out a plan's edits
layer_edits  the table of what can be taken out of a layer
sublayers    where a layer keeps its attention, MLP and heads
masks        reversible: skips, masks
swapping     a donor's layers
zeroing      skips and masks for good
merging      neighbours into one
lesa         a layer predicted from those on both sides
replacement  one trained layer for a run
growing      new layers between others
"""
