"""Likelihoods and text of many prompts, no token computed twice.

decoder           hidden states, logits, a cache whose rows branch
answer_positions  where a forward predicts an answer, for edits that hold at some positions
prefix_sharing    what prompts begin with alike
scoring           likelihoods
generation        text
drawing           which token comes next
vllm              vLLM in their place
"""
