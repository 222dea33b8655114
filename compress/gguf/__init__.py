"""The student as a file for llama.cpp.

patterns   what llama.cpp tells from the number of a layer, so that a cut may make it read another model
export     one GGUF file by llama.cpp's own converter, proven against the checkpoint
"""
