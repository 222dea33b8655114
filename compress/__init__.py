"""Measure what layers are worth, choose which go, and write the student that is proven to be the teacher without them.

Metrics: scores from plain text
    measure             every asked metric, pass by pass
    metrics             all metrics by name, and the pass for each need
    metric              what a metric says of itself, and what a pass is given
    hidden_pass         one forward for all metrics of hidden states
    hidden_metrics      their formulae
    observation         what they share of a batch
    mka                 similarity of layers as manifolds
    weight_metrics      magnitude, Taylor
    laco                how little merging neighbours changes
    loss_metrics        metrics of the loss under variants
    variant_losses      that loss, each variant measured once
    greedy              orders, one removal after the other
    shapley             means over subnetworks

Variants: many edits of one model, what they share computed once
    variants            what a variant is; likelihoods of all at once
    layerwise           a decoder run one layer at a time
    variant_generation  their texts
    sweep               variants scored on lm-eval tasks
    streamed            from the files of a model larger than memory
    streamed_model      a model whose layers are there while it is their turn
    state_store         where states wait, in memory or in a file

Atlas: from scores per item to conclusions
    atlas               what follows from single-layer removals
    sweep_table         units by columns, with intervals and tests
    agreement           how far columns rank alike

Depth: who writes, erases and decides
    diagnostics         all of it
    residual_flow       directions and sizes of what is written
    logit_lens          what the head makes of every state
    depth_effects       skipped layers, erased states
    path_gradients      integrated gradients
    depth_runs          runs from any layer on
    probes              where a concept can be read off

Plan: what goes
    plan                the choice
    columns             scores by name
    sacrifice           what a plan is expected to cost on tasks
    dry_run             what a plan would do
    targets             where the student will load
    vllm_rules          what vLLM makes of a configuration
    llama_cpp_rules     what llama.cpp makes of it
    delta               how far a donor's layers are from the base's

Cut: the student
    apply               writes the student of a plan
    surgery             in memory
    config_cut          its configuration
    special_cuts        families with rules of their own
    shards              by copying stored bytes
    stored_names        which tensors those are
    quantised           settings that name layers
    staging             a folder that is complete or absent
    proof               that the result is right
    gguf_export         for llama.cpp

Edit: other changes of layers
    edit                carries out a plan's edits
    sublayers           where a layer keeps its attention, MLP and heads
    operators           reversible: skips, masks
    swapping            a donor's layers
    zeroing             skips and masks for good
    merging             neighbours into one
    replacement         one trained layer for a run
"""
