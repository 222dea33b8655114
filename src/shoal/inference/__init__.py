"""Likelihoods and text of many prompts, no token computed twice.

decoder         hidden states, logits, a cache whose rows branch, where an answer is predicted
prefix_sharing  what prompts begin with alike
scoring         likelihoods
generation      text, and which token comes next
vllm            vLLM in their place
"""
