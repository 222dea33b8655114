"""Other programs that load students.

check      where the student will load
vllm       what vLLM makes of a configuration
llama_cpp  what llama.cpp makes of it
gguf       for llama.cpp
"""
