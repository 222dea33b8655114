"""Weights & Biases.

login          whether somebody is logged in to W&B here
wandb_run      the Weights & Biases run
wandb_results  what is logged there
"""
