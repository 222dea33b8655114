"""Changes of layers besides dropping them.

apply        carries out a plan's edits
sublayers    where a layer keeps its attention, MLP and heads
masks        reversible: skips, masks
swapping     a donor's layers
zeroing      skips and masks for good
merging      neighbours into one
replacement  one trained layer for a run
"""
