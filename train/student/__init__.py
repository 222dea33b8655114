"""Which weights are trained.

spec         one training, described once
known_cut    what a student in memory was cut by
control      that of the uncut teacher beside it
trainable    which parts
lora         adapters beside them
frozen       one copy of the rest, written as it was stored
sizes        models without their weights, what autograd keeps of them
"""
