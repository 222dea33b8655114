"""Many edits of one model, what they share computed once.

variants            what a variant is; likelihoods of all at once
layerwise           a decoder run one layer at a time
variant_generation  their texts
"""
