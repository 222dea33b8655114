"""Train the cut model on the full one: the stage `distill`, and `record`, which writes down what the teacher says.

    distill    all of it, in order: models, teacher, loss and Trainer put together, distilled/ and distill.json
    record     writes a recording
    identity   what identifies a training and its checkpoints
    trainer    one optimizer step in the transformers Trainer, whole checkpoints, a clean stop
    curves     the curves of its steps, and the one that is not sound
    distillation_trainer  the same for a model and a data set in memory
    callbacks  what looks on: how far it is, W&B, scores of the student
    dataset    the rows that are learnt from
    writing    text that the teacher writes before training, and what of it is kept
    on_policy  text that the student writes in the middle of training, and what of it teaches nothing

Folders:

    engine     deepSpeed and many processes, any of which may die
    objective  the loss: sums over supervised tokens
    preflight  what a training will take, before it starts
    student    which weights are trained
    teacher    what the student is compared with: a model or a recording
"""
