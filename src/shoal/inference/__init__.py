"""Likelihoods and greedy text of many prompts, no token computed twice.

decoder         hidden states, logits, a cache whose rows branch
prefix_sharing  what prompts begin with alike
scoring         likelihoods
generation      greedy text
"""
