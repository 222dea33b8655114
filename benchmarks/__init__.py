"""Scripts that measure; the folder is a package for `python -m benchmarks.gpu`."""
