"""Train the cut model on the full one: the stage `distill`, and `record`, which writes down what the teacher says.

    distill    all of it, in order
    record     writes a recording
    assembly   models, teacher, loss and Trainer put together
    objective_trainer  one optimizer step and its curves in the transformers Trainer
    trainer    the same in a run directory: whole checkpoints, samples, a clean stop
    distillation_trainer  the same for a model and a data set in memory
    dataset    the rows that are learnt from
    save       distilled/ and distill.json

Folders:

    callbacks  what looks on while a model trains
    engine     deepSpeed and many processes, any of which may die
    generated  training text that a model writes
    objective  the loss: sums over supervised tokens
    preflight  what a training will take, before it starts
    student    which weights are trained
    teacher    what the student is compared with: a model or a recording
"""
