"""Load and save causal language models, and know their parts.

resolve           the folder that a model's name means: a path, the Hub, the demo model
download          what the Hub has
load              load causal language models
in_memory         models and tokenizers that a caller has
anatomy           where their decoder layers live
attention         which kernels compute it: flash, sdpa, eager
families          what single families do otherwise
hub_kernels       none is used that nobody asked for
checkpoint_files  folders of files: whole or damaged, and what identifies them
looks             what is wrong with them before torch is loaded
cost              what a model takes to keep and to run, told from its configuration
document_masks    documents of a row stay apart, and where they cannot
packed_attention  torch's own flash kernels for them
"""
