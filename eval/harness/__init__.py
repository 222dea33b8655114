"""lm-eval's requests over a model in memory, and what it answered.

engine           lm-eval's interface over a model in memory, how texts are asked for and ended
vllm             lm-eval's own over vLLM, for finished checkpoints
perplexity       running text
samples          from lm-eval's log to scores per item, and what items ask
rates            how written text fails
item_cache       answers on disk as they come in
"""
