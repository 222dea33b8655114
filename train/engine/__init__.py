"""DeepSpeed and many processes, any of which may die.

arguments   TrainingArguments and the DeepSpeed configuration that a recipe means
kernels     compiled regions, and Liger's kernels in the place of norms and MLPs
sharding    what DeepSpeed needs of process group and teacher
checkpoint  complete or absent, for any number of ranks
stop        SIGTERM, a launcher that is gone, a rank that is late
"""
