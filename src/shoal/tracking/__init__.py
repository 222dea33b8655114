"""Weights & Biases.

wandb_run      the Weights & Biases run
wandb_results  what is logged there
"""
