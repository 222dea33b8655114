"""Train the cut model on the full one: the stage `distill`, and `record`, which writes down what the teacher says.

The stage: from settings to distilled/
    distill             all of it, in order
    assembly            models, teacher, loss and Trainer put together
    arguments           TrainingArguments and the DeepSpeed configuration that a recipe means
    text                the rows that are learnt from
    trainer             one optimizer step, its curves, its checkpoint
    results             distilled/ and distill.json

Before it starts: what it will take
    preflight           what fits, what is refused
    job                 a run as far as its size goes
    sizes               models without their weights, what autograd keeps of them
    memory              bytes of a rank
    pace                time
    peak                how fast this machine could train at most
    dry_run             all of it for a reader
    zero_check          a perfect student must have loss 0

The loss: sums over supervised tokens
    student             the loss inside the student's forward; layers run once for both models
    head                terms of the logits, a chunk of tokens at a time
    losses              their formulae
    states              terms of what happens inside the layers
    capture             what these compare, taken in passing
    on_host             what need not be asked of the device
    recompute           what is kept for the backward pass

The teacher: what the student is compared with
    signals             live or recorded, one interface
    record              writes a recording
    recording_plan      what identifies it and what of it is missing
    recording_reader    reads it in training
    recording_format    how it lies on the disk

What is trained
    trainable           which parts
    lora                adapters beside them
    frozen              one copy of the rest, written as it was stored
    local               every gap on its own, before the rest

Written text: not given, but made
    writing             by the teacher, before training
    sifting             what of it is kept
    on_policy           by the student, in the middle of training
    sampling            token by token

While it trains
    watch               scores of the student, its best state
    guard               a loss that jumps or is no number
    progress            what training tells of itself: steps, loss, rate, time left
    tracking            Weights & Biases

Ranks: many processes, any of which may die
    sharding            what DeepSpeed needs of process group and teacher
    checkpoint          complete or absent, for any number of ranks
    stop                SIGTERM, a launcher that is gone
    heartbeat           which rank is late
"""
