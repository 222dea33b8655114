"""Quantised copies of checkpoints; the formats are other libraries' own.

formats          which library makes which format, and whether it is here
in_transformers  torchao and bitsandbytes, as transformers loads and saves them
compressor       llm-compressor: compressed-tensors, for vLLM
llama_quantize   llama.cpp's quantiser: one GGUF file
copy             one checkpoint to one format
"""
