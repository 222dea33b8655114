"""lm-eval's requests over a model in memory, and what it answered.

engine           lm-eval's interface over a model in memory
vllm             lm-eval's own over vLLM, for finished checkpoints
perplexity       running text
samples          from lm-eval's log to scores per item
rates            how written text fails
writing          how texts are asked for and ended
item_cache       answers on disk as they come in
tokenizer_check  whether roles read the same tokens
item_texts       what is asked, to look for it in training text
"""
