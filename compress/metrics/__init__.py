"""Scores of layers from plain text.

registry        all metrics by name, and the pass for each need
metric          what a metric says of itself, and what a pass is given
hidden_pass     one forward for all metrics of hidden states
hidden_metrics  their formulae
observation     what they share of a batch
weight_metrics  magnitude, Taylor, merging
loss_metrics    metrics of the loss under variants, means over subnetworks
variant_losses  that loss, each variant measured once
greedy          orders, one removal after the other
"""
