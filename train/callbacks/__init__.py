"""What looks on while a model trains.

validation    scores of the student, its best state
loss_spikes   a loss that jumps or is no number
progress      what training tells of itself: steps, loss, rate, time left
wandb_curves  Weights & Biases
"""
