"""Who writes, erases and decides along the depth of a model.

diagnostics     all of it
residual_flow   directions and sizes of what is written
logit_lens      what the head makes of every state
effects         skipped layers, erased states
path_gradients  integrated gradients
runs            runs from any layer on
probes          where a concept can be read off
"""
