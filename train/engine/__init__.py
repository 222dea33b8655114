"""DeepSpeed and many processes, any of which may die.

arguments             TrainingArguments and the DeepSpeed configuration that a recipe means
distillation_config   the same for a Trainer script, with the settings of loss and data
kernels               compiled regions, and Liger's kernels in the place of norms and MLPs
sharding              what DeepSpeed needs of process group and teacher
checkpoint            complete or absent, for any number of ranks
background            files of a checkpoint, written while training goes on
stop                  SIGTERM, a launcher that is gone, a rank that is late
"""
