"""Variants scored on tasks, and what follows from it.

sweep        variants scored on lm-eval tasks
table        units by columns, with intervals and tests; scores of every item, on disk
atlas        what follows from single-layer removals; how far columns rank alike
columns      scores by name; what a plan is expected to cost on tasks
placeholder  what will be measured, without its scores: choices that nothing can make possible
"""
