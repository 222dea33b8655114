"""Many edits of one model, what they share computed once.

variants            what a variant is; likelihoods of all at once
layerwise           a decoder run one layer at a time
variant_generation  their texts
streamed            from the files of a model larger than memory
streamed_model      a model whose layers are there while it is their turn
final_states        what the head of such a model reads
state_store         where states wait, in memory or in a file
"""
