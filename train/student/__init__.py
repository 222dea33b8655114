"""Which weights are trained.

spec         one training, described once
control      that of the uncut teacher beside it
trainable    which parts
lora         adapters beside them
frozen       one copy of the rest, written as it was stored
local_stage  every gap on its own, before the rest
sizes        models without their weights, what autograd keeps of them
"""
