"""Weights & Biases.

wandb_run  the Weights & Biases run: begun, gone on with, and what is logged there
"""
