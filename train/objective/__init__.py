"""The loss: sums over supervised tokens.

objective     the loss inside the student's forward; layers run once for both models
chunked_loss  terms of the logits, a chunk of tokens at a time
divergences   their formulae
layer_losses  terms of what happens inside the layers, taken in passing
host_batch    what need not be asked of the device
"""
